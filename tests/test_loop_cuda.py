"""Captured loops on a GPU: real CUDA graphs, their networks, streams and failures, and nothing that waits."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from conftest import NO_CUDA, cuda_works
from loop_cases import OPTIONS, SAMPLERS, same
from test_samplers import conditioned, every_family, rotating, runs
from torch import nn
from torch.utils._pytree import tree_map_only

import genkern as gk
from genkern.graphs import plan
from genkern.noise import Noise

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not cuda_works(), reason=NO_CUDA)]

FLOW = gk.FlowMatching()


@pytest.fixture(params=["whole", "steps"], autouse=True)
def mode(request, monkeypatch):
    """Every test runs with a loop that is one graph, and with one of single steps; a refusal is an error."""
    monkeypatch.setattr(plan, "SHORT", 1e9 if request.param == "whole" else 0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cuda_graph")
        yield request.param


class Net(nn.Module):
    """A network of cuBLAS and elementwise kernels, the same bits captured or not."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(65, 64), nn.Linear(64, 64), nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x, t, y=None):
        self.calls += 1
        joined = torch.cat([x, t.to(x.dtype)[:, None]], dim=1)
        out = self.last(self.dropout(nn.functional.silu(self.first(joined))))
        return out if y is None else out * y[:, None].to(x.dtype)


def net(**options):
    return Net(**options).cuda().eval().requires_grad_(False)


BATCH = (32, 64)


def healthy():
    """torch's CUDA state works: memory, generator, streams, and another capture."""
    x = torch.randn(1000, device="cuda")
    torch.cuda.synchronize()
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(x)
    with torch.cuda.graph(graph):
        torch.mul(x, 2.0, out=out)
    graph.replay()
    assert torch.equal(out, 2.0 * x)
    assert not torch.equal(torch.randn_like(x), torch.randn_like(x))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        y = x + 1.0
        y.record_stream(torch.cuda.current_stream())
    side.synchronize()
    del y, graph
    torch.cuda.empty_cache()


@every_family
@pytest.mark.parametrize("given", OPTIONS)
def test_captured_loop_has_the_bits_of_the_uncaptured_one(family, given):
    sample = runs()[family]
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[given].items()}
    options["device"] = "cuda"

    def model(x, t):
        return rotating(x, t)

    wanted = sample(model, **options)
    for _ in range(3):
        same(sample(model, **options, cuda_graph=True), wanted)


@every_family
@pytest.mark.parametrize("w", [2.5, torch.tensor([0.0, 1.0, 2.0, 3.5, -1.0])])
@pytest.mark.parametrize("more", [{}, {"model_dtype": torch.bfloat16}, {"batch_size": 2, "return_trajectory": True}])
def test_guidance_has_the_bits_of_the_uncaptured_one(family, w, more):
    sample, w = runs()[family], w.cuda() if isinstance(w, torch.Tensor) else w

    def model(x, t, y):
        return conditioned(x, t, y)

    for seed in range(3):
        y, null = torch.rand(2, 5, device="cuda")
        options = {"cond": {"y": y}, "uncond": {"y": null}, "guidance_scale": w - seed, "seed": seed, "device": "cuda"}
        wanted = sample(model, **options, **more)
        same(sample(model, **options, **more, cuda_graph=True), wanted)


CONDITIONS = {"cond": {"y": torch.linspace(0.1, 0.5, 5)}, "uncond": {"y": torch.full((5,), 0.7)}, "guidance_scale": 2.5}
DATA = torch.linspace(-1.0, 1.0, 60).reshape(5, 3, 4)
CONTROLS = {
    "interval": {**CONDITIONS, "guidance_interval": (0.3, 600.0)},
    "rescale": {**CONDITIONS, "guidance_rescale": 0.7},
    "several": {**CONDITIONS, "cond": [CONDITIONS["cond"], CONDITIONS["uncond"]], "guidance_scale": [2.5, 0.5]},
    "projected": {**CONDITIONS, "apg": gk.APG(eta=0.3, norm=1.5, momentum=-0.5)},
    "init": {"init": DATA, "strength": 0.75},
    "inpainting": {"mask": torch.linspace(0.0, 1.0, 4).round(), "known": DATA},
    "changed": {"callback": lambda k, t, x: 0.5 * x if k in (0, 2) else None},
    "stopped": {"callback": lambda k, t, x: gk.STOP if k == 1 else None},
}


@every_family
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("more", [{}, {"model_dtype": torch.bfloat16}, {"batch_size": 2}])
def test_guidance_and_editing_have_the_bits_of_the_uncaptured_loop(family, control, more):
    if control == "projected" and family == "rectified":
        return  # refused: its last call is at the data
    sample = runs()[family]
    options = {**tree_map_only(torch.Tensor, torch.Tensor.cuda, CONTROLS[control]), **more, "device": "cuda"}

    def model(x, t, y=None):
        return rotating(x, t) if y is None else conditioned(rotating(x, t), t, y)

    for seed in range(2):
        same(sample(model, seed=seed, **options, cuda_graph=True), sample(model, seed=seed, **options))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_of_diffusion_is_captured(name):
    method, model = gk.Diffusion(prediction="v"), net()
    loop = gk.Loop(method, model)
    for seed in range(2):
        options = {"steps": 17, "sampler": name, "seed": seed} | SAMPLERS[name]
        same(loop.sample(BATCH, **options), method.sample(model, BATCH, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_networks_of_every_dtype_are_captured(dtype):
    model = net().to(dtype)
    loop = gk.Loop(FLOW, model)
    for seed in range(3):
        wanted = FLOW.sample(model, BATCH, steps=5, sampler="heun", seed=seed)
        same(loop.sample(BATCH, steps=5, sampler="heun", seed=seed), wanted)
    assert loop.captured == 1


def test_each_call_draws_its_own_noise_and_results_stay():
    model, method = net(), gk.Diffusion(prediction="v")
    loop = gk.Loop(method, model)
    seeds = [1, 2, 1 << 63, (1 << 64) - 1, 1]
    found = [loop.sample(BATCH, steps=6, sampler="ddpm", seed=seed) for seed in seeds]
    called = model.calls
    loop.sample(BATCH, steps=6, sampler="ddpm", seed=9)
    assert model.calls == called
    for seed, x in zip(seeds, found, strict=True):
        assert torch.equal(x, method.sample(model, BATCH, steps=6, sampler="ddpm", seed=seed))


def placed(value):
    if isinstance(value, dict):
        return {k: placed(v) for k, v in value.items()}
    return value.cuda() if isinstance(value, torch.Tensor) else value


ONE, ZERO = {"y": torch.ones(32)}, {"y": torch.zeros(32)}


@pytest.mark.parametrize("options", [
    {}, {"seed": 3}, {"ids": torch.arange(32)}, {"return_trajectory": True}, {"noise": torch.ones(BATCH)},
    {"step_noise": torch.ones(6, *BATCH)}, {"batch_size": 16}, {"callback": lambda *event: None},
    {"cond": ONE, "uncond": ZERO, "guidance_scale": 3.0}, {"cond": ONE, "uncond": ZERO, "guidance_scale": ONE["y"]},
    {"clip": gk.DynamicThreshold()}, {"cond": ONE, "uncond": ZERO, "guidance_scale": 3.0, "guidance_rescale": 0.7},
])  # fmt: skip
def test_a_captured_loop_never_waits_for_the_device(options):
    options = placed(options)
    if "ids" in options:
        options["noise"] = Noise(1, sample_ids=options.pop("ids"))
    loop = gk.Loop(gk.Diffusion(prediction="v"), net())
    run = functools.partial(loop.sample, BATCH, steps=6, sampler="ddpm", **options)
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Stale captures


@pytest.mark.parametrize("change", ["move", "replace", "mode", "dtype", "in place"])
def test_a_model_that_has_changed_gives_its_new_results(change):
    model = net(dropout=0.5)
    loop = gk.Loop(FLOW, model)
    before = loop.sample(BATCH, steps=3, seed=1)
    called = model.calls
    if change == "move":
        model.cpu()
        junk = [torch.full_like(p, 7.0, device="cuda") for p in model.parameters()]  # where they were
        model.cuda()
        del junk
    elif change == "replace":
        model.last = nn.Linear(64, 64).cuda().requires_grad_(False)
    elif change == "dtype":
        model.bfloat16()
    elif change == "in place":
        model.last.weight.mul_(2.0)
    else:
        model.train()
        with pytest.warns(UserWarning, match="Net runs uncaptured: it draws random numbers"):
            loop.sample(BATCH, steps=3, seed=1)
        model.eval()
    captured = loop.sample(BATCH, steps=3, seed=1)
    assert (model.calls == called) is (change == "in place")
    assert torch.equal(captured, FLOW.sample(model, BATCH, steps=3, seed=1))
    assert torch.equal(captured, before) is (change in ("move", "mode"))


# Networks that cannot be captured


def draws(x, t):
    return x + torch.rand_like(x)


def looks(x, t):
    return x * float(x.mean())


def selects(x, t):
    return x * (x[x > 0].numel() / x.numel())


def copies(x, t):
    return x + torch.ones(64).to(x.device)


def replays(x, t):
    replays.graph.replay()
    return x + replays.out


@pytest.mark.parametrize("model", [draws, looks, selects, copies, replays])
def test_a_network_that_cannot_be_captured_runs_uncaptured_and_leaves_torch_healthy(model):
    if model is replays:
        model.graph, model.out, given = torch.cuda.CUDAGraph(), torch.zeros(64, device="cuda"), torch.ones(64).cuda()
        with torch.cuda.graph(model.graph):
            torch.add(given, 1.0, out=model.out)
    loop = gk.Loop(FLOW, model)
    torch.manual_seed(5)
    wanted = FLOW.sample(model, BATCH, steps=3, seed=1, device="cuda")
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=f"cuda_graph: {model.__name__} runs uncaptured") as caught:
        got = [loop.sample(BATCH, steps=3, seed=1, device="cuda") for _ in range(3)]
    assert len(caught) == 1 and loop.refusal and loop.captured == 0
    torch.testing.assert_close(got[0], wanted)
    healthy()
    other = gk.Loop(FLOW, net())
    same(other.sample(BATCH, steps=3, seed=1), FLOW.sample(other.model, BATCH, steps=3, seed=1))
    assert other.captured == 1


def test_memory_of_a_failed_capture_comes_back():
    def failing(x, t):
        big = torch.ones((1 << 26,), device="cuda")  # 256 MiB
        return x * float(x.mean() + big[0])

    FLOW.sample(net(), BATCH, steps=2, cuda_graph=True)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(4):
        with pytest.warns(UserWarning, match="runs uncaptured"):
            gk.Loop(FLOW, failing).sample(BATCH, steps=2, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before < 1 << 27
    healthy()


def elementwise(x, t):
    return (x.sin() + 1e-3 * t[:, None].to(x.dtype)) * x.cos()


@pytest.mark.parametrize("how", ["default", "reduce-overhead"])
def test_a_compiled_network_is_captured_unless_it_is_captured_already(how):
    torch.compiler.reset()
    compiled = torch.compile(elementwise, mode=how)
    loop = gk.Loop(FLOW, compiled)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wanted = FLOW.sample(compiled, BATCH, steps=4, seed=1, device="cuda")
        got = [loop.sample(BATCH, steps=4, seed=1, device="cuda") for _ in range(3)]
    refused = [str(w.message) for w in caught if "runs uncaptured" in str(w.message)]
    if how == "default":
        assert not refused and loop.refusal is None and loop.captured == 1
    else:
        assert len(refused) == 1 and loop.captured == 0
        assert "captured already" in loop.refusal or "capture failed" in loop.refusal
    for x in got:
        assert torch.equal(x, wanted)
    healthy()
    torch.compiler.reset()


def test_a_loop_inside_a_capture_of_the_callers_is_refused():
    loop = gk.Loop(FLOW, net())
    loop.sample(BATCH, steps=2)
    with pytest.raises(RuntimeError, match="cuda_graph: expected False while the current stream is being captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            loop.sample(BATCH, steps=2)
    healthy()
    loop.sample(BATCH, steps=2)


# Streams, threads, memory


def test_calls_on_other_streams_wait_for_each_other():
    model = net()
    loop = gk.Loop(FLOW, model)
    loop.sample(BATCH, steps=20, seed=0)
    wanted = [FLOW.sample(model, BATCH, steps=20, seed=seed) for seed in range(8)]
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in range(4)], []
    for seed in range(8):
        with torch.cuda.stream(streams[seed % 4]):
            got.append(loop.sample(BATCH, steps=20, seed=seed))
    torch.cuda.synchronize()
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)


def test_captures_of_a_loop_share_their_memory_and_outlive_each_other():
    """Activations of 64 MiB: two captures take no more than one, and a pool whose graphs are gone is not used again."""

    def model(x, t, y=None):
        wide = x.repeat(1, 1 << 13)
        return wide.sin()[:, : x.shape[1]] if y is None else x

    loop = gk.Loop(FLOW, model)
    wanted = [FLOW.sample(model, (32, 64), steps=steps, seed=1, device="cuda") for steps in (2, 3)]
    loop.sample((32, 64), steps=2, seed=1, device="cuda")
    one = torch.cuda.memory_reserved()
    for _ in range(2):
        for steps in (2, 3):
            assert torch.equal(loop.sample((32, 64), steps=steps, seed=1, device="cuda"), wanted[steps - 2])
    assert torch.cuda.memory_reserved() - one < 1 << 25
    for entry in loop._captures._entries:
        entry.plan = None
    for steps in (2, 3):
        assert torch.equal(loop.sample((32, 64), steps=steps, seed=1, device="cuda"), wanted[steps - 2])


def test_memory_of_a_loop_comes_back():
    big = (64, 64 * 64)
    model = nn.Identity()

    def call(x, t):
        return model(x).sin().cos().tanh()

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    loop = gk.Loop(FLOW, call)
    for seed in range(3):
        loop.sample(big, steps=4, seed=seed, device="cuda")
    one = torch.cuda.memory_allocated()
    for seed in range(3):
        loop.sample(big, steps=4, seed=seed, device="cuda")
    assert torch.cuda.memory_allocated() == one
    loop.clear()
    del loop
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_autocast_around_a_call_is_captured_without_its_cache():
    model = net().requires_grad_(True)
    loop = gk.Loop(FLOW, model)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            model(torch.zeros(BATCH, device="cuda"), torch.zeros(BATCH[0], device="cuda"))  # fills the cache
            got = loop.sample(BATCH, steps=4, seed=1)
            wanted = FLOW.sample(model, BATCH, steps=4, seed=1)
        assert torch.equal(got, wanted)
        junk = [torch.full_like(p, 9.0) for p in model.parameters()]
        del junk
    full = FLOW.sample(model, BATCH, steps=4, seed=1)
    assert torch.equal(loop.sample(BATCH, steps=4, seed=1), full) and not torch.equal(full, got)
    assert loop.captured == 2


def test_the_mode_of_a_loop_follows_the_time_of_a_step(monkeypatch):
    monkeypatch.setattr(plan, "SHORT", 100e-6)

    def slow(x, t):
        for _ in range(40):
            x = x @ eye
        return x

    eye = torch.eye(2048, device="cuda")
    short, long = gk.Loop(FLOW, net()), gk.Loop(FLOW, slow)
    short.sample(BATCH, steps=4)
    long.sample((512, 2048), steps=4, device="cuda")
    (one,), (other,) = ([e.plan for e in loop._captures._entries] for loop in (short, long))
    assert one._short is True and one._whole is not None
    assert other._short is False and other._whole is None
