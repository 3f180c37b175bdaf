"""One process and two GPUs: what lies on the second one is computed there, on its current stream, whichever is the
current device."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from op_cases import CASES, NOISE, on
from op_cases import LOSSES as PATH_LOSSES
from processes import NO_GPUS, two_gpus
from test_consistency_cuda import LOSSES, Net
from torch import nn
from torch.utils._pytree import tree_map_only

import genkern as gk
from genkern import eager, flows, rows, stat
from genkern.graphs import plan
from genkern.noise import Noise
from genkern.training import EMA, Checkpoint, Guard, fit

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not two_gpus(), reason=NO_GPUS)]

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
SHAPE = (3, 4, 32, 32)


@pytest.fixture(autouse=True)
def _current_device_is_the_first():
    with torch.cuda.device(0):
        yield
        assert torch.cuda.current_device() == 0


@pytest.fixture(params=["plain calls", "dispatcher"])
def way(request, monkeypatch):
    """Through csrc/python/eager.cpp, and without it."""
    if request.param == "dispatcher":
        monkeypatch.setattr(eager, "face", None)
    return request.param


def same(found, expected):
    """Results on the second GPU with the bits of those on the first."""
    assert isinstance(found, torch.Tensor) == isinstance(expected, torch.Tensor)
    if isinstance(found, torch.Tensor):
        found, expected = (found,), (expected,)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.device == SECOND and b.device == FIRST
        assert torch.equal(a.cpu(), b.cpu())


def both(call, *given, **options):
    """call() of the same arguments on the second GPU and on the first."""
    found = []
    for device in (SECOND, FIRST):
        moved, named = tree_map_only(torch.Tensor, lambda t, to=device: t.to(to), (given, options))
        found.append(call(*moved, **named))
    return found


@pytest.mark.parametrize("layout", ["plain", "channels_last", "strided"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_op_has_the_same_bits_on_the_second_gpu(case, layout, way):
    def call(**given):
        if layout == "channels_last":
            given = {name: t.contiguous(memory_format=torch.channels_last) for name, t in given.items()}
        elif layout == "strided":
            given = {name: t.transpose(1, 2) for name, t in given.items()}
        device = next(iter(given.values())).device
        return dataclasses.replace(case, options=on(case.options, device)).run(gk.ops, **given)

    same(*both(call, **{name: torch.randn(SHAPE) for name in case.arrays}))


@pytest.mark.parametrize("options", PATH_LOSSES)
def test_a_loss_and_its_gradient_have_the_same_bits_on_the_second_gpu(options, way):
    def call(m, x):
        m = m.detach().requires_grad_()
        loss = gk.ops.path_loss(m, x, **on(options, m.device))
        loss.sum().backward()
        return loss.detach(), m.grad

    same(*both(call, *torch.randn(2, *SHAPE)))


@pytest.mark.parametrize("device", ["cuda:1", SECOND])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_noise_alone_is_drawn_on_the_second_gpu(device, dtype, way):
    ids = torch.tensor([5, 1 << 40, 0])
    for noise in (NOISE, Noise(3, sample_ids=ids), Noise(torch.tensor([3]), sample_ids=ids.to(SECOND))):
        for draw in (gk.ops.randn, gk.ops.uniform):
            found = draw(SHAPE, noise=noise, device=device, dtype=dtype)
            assert found.device == SECOND
            assert torch.equal(found.cpu(), draw(SHAPE, noise=noise, device="cpu", dtype=dtype))


@pytest.mark.parametrize("size", [1000, 1 << 20])  # of one block, of several and their workspace
def test_statistics_of_the_second_gpu_are_those_of_the_first(size):
    row = rows.Row((rows.Out(x=0.7, m=-0.2),))

    def call(x, m):
        return stat.stat_row(row, x=x, m=m), stat.quantile_row(row, 0.9, x=x, m=m)

    same(*both(call, *torch.randn(2, 3, size)))


def test_a_kernel_is_on_the_current_stream_of_its_tensors_device(way):
    """x becomes 2 on a stream of the second GPU that is busy for a while: what does not wait for it reads 1."""
    x, side = torch.ones(1 << 16, 4, device=SECOND), torch.cuda.Stream(SECOND)

    def run():
        with torch.cuda.device(0):
            stepped, loss = gk.ops.euler_step(x, x, 0.5), gk.ops.path_loss(x, x, x_coef=0.5)
            return stepped, loss, stat.stat_row(rows.Row((rows.Out(x=1.0),)), x=x)

    torch.cuda.synchronize(SECOND)
    with torch.cuda.stream(side):
        run()  # kernels are loaded, which may wait for what runs
        side.synchronize()
        torch.cuda._sleep(1 << 28)
        x.fill_(2.0)
        stepped, loss, sums = run()
        assert not side.query()
    side.synchronize()
    assert torch.equal(stepped, torch.full_like(x, 3.0))
    assert float(loss) == 1.0 and torch.equal(sums[:, 0], torch.full((1 << 16,), 8.0, device=SECOND).double())


def mlp():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)).eval().requires_grad_(False)


SAMPLERS = {
    "flow, heun": (gk.FlowMatching(), {"sampler": "heun"}),
    "flow, sde": (gk.FlowMatching(), {"sampler": "sde"}),
    "flow, dopri5": (gk.FlowMatching(), {"sampler": "dopri5", "steps": None}),
    "diffusion, unipc": (gk.Diffusion(prediction="v"), {"sampler": "unipc"}),
    "diffusion, thresholded": (gk.Diffusion(prediction="v"), {"sampler": "ddpm", "clip": gk.DynamicThreshold(0.9)}),
    "consistency": (gk.Consistency(), {}),
}


@pytest.mark.parametrize("mode", ["whole", "steps"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_loop_is_captured_on_the_second_gpu(name, mode, monkeypatch):
    monkeypatch.setattr(plan, "SHORT", 1e9 if mode == "whole" else 0.0)
    method, options = SAMPLERS[name]
    options = {"steps": 4, **options}
    net, other = mlp().to(SECOND), mlp().to(FIRST)

    def model(x, t):
        return net(x)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cuda_graph")
        loop = gk.Loop(method, model)
        for seed in range(3):
            found = loop.sample((8, 16), seed=seed, device="cuda:1", **options)
            expected = method.sample(model, (8, 16), seed=seed, device=SECOND, **options)
            assert found.device == expected.device == SECOND and torch.equal(found, expected)
            same(found, method.sample(lambda x, t: other(x), (8, 16), seed=seed, device="cuda", **options))
    assert loop.captured == 1 and loop.refusal is None
    side = torch.cuda.Stream(SECOND)
    torch.cuda.synchronize(SECOND)
    with torch.cuda.stream(side):
        torch.cuda._sleep(1 << 28)
        with torch.cuda.device(0):
            again = loop.sample((8, 16), seed=2, device="cuda:1", **options)
    side.synchronize()
    assert torch.equal(again, found)


def test_one_loop_serves_both_gpus():
    def model(x, t):
        return x.sin()

    flow = gk.FlowMatching()
    loop = gk.Loop(flow, model)
    for seed in range(2):
        for device in (SECOND, FIRST, "cuda"):  # the last is the current one
            found = loop.sample((8, 16), steps=3, seed=seed, device=device)
            assert found.device == (SECOND if device == SECOND else FIRST)
            assert torch.equal(found, flow.sample(model, (8, 16), steps=3, seed=seed, device=device))
    assert loop.captured == 2
    with torch.cuda.device(1):  # "cuda" is another device now
        found = loop.sample((8, 16), steps=3, seed=0, device="cuda")
    assert found.device == SECOND and loop.captured == 2


def test_a_capture_that_fails_on_the_second_gpu_leaves_both_healthy():
    def looks(x, t):
        return x * float(x.mean())

    flow, net = gk.FlowMatching(), mlp().to(SECOND)
    with pytest.warns(UserWarning, match="looks runs uncaptured"):
        gk.Loop(flow, looks).sample((8, 16), steps=2, device=SECOND)
    for device in (FIRST, SECOND):
        assert not torch.equal(torch.randn(9, device=device), torch.randn(9, device=device))
    loop = gk.Loop(flow, lambda x, t: net(x))
    assert torch.equal(
        loop.sample((8, 16), steps=2, seed=0, device=SECOND),
        flow.sample(loop.model, (8, 16), steps=2, seed=0, device=SECOND),
    )
    assert loop.captured == 1


FLOWS = {
    "flow matching, Sinkhorn": {"coupling": flows.Sinkhorn(0.1)},
    "flow matching, optimal": {"coupling": flows.Optimal(), "times": "stratified"},
    "flow matching, beta": {"times": flows.Beta(2.0, 0.7)},
}


@pytest.mark.parametrize("name", [*LOSSES, *FLOWS])
def test_a_training_loss_on_the_second_gpu_is_that_on_the_first(name):
    if name == "flow matching, optimal":
        pytest.importorskip("scipy")
    torch.manual_seed(1)
    net, teacher, x = Net(), Net().eval(), torch.randn(64, 8)

    def call(x):
        student, frozen = Net().to(x.device), Net().to(x.device).eval()
        student.load_state_dict(net.state_dict())
        frozen.load_state_dict(teacher.state_dict())
        torch.manual_seed(7)  # dropout
        noise = gk.Noise(0, stream=3)
        if name in FLOWS:
            loss = gk.FlowMatching().loss(student, x, noise=noise, **FLOWS[name])
        else:
            loss = LOSSES[name](student, frozen, x, noise)
        loss.backward()
        return [loss.detach(), *(p.grad for p in student.parameters())]

    for a, b in zip(*both(call, x), strict=True):
        assert a.device == SECOND and b.device == FIRST
        torch.testing.assert_close(a.cpu(), b.cpu())


@pytest.mark.parametrize("bad", [None, 5])
def test_a_training_on_the_second_gpu_is_that_on_the_first(bad, tmp_path):
    pytest.importorskip("safetensors")
    flow = gk.FlowMatching()

    def call(x):
        torch.manual_seed(4)
        net = nn.Linear(8, 8).to(x.device)
        average = EMA(net, 0.5)
        guard = Guard(x.device)

        def loss(x, k):
            return flow.loss(lambda x, t: net(x), x, noise=gk.Noise(0, stream=k)) * (float("nan") if k == bad else 1.0)

        def update(k):
            average.update(net, guard=guard)

        kept = Checkpoint(tmp_path / str(x.device.index), {}, network=net, average=average, every=3)
        options = {"steps": 12, "guard": guard, "warmup": 0, "after_step": update}
        try:
            fit(net.parameters(), loss, lambda start: [x] * (12 - start), checkpoint=kept, **options)
        except FloatingPointError as error:
            assert bad is not None and f"at step {bad} of 12" in str(error)
        else:
            assert bad is None
        return [p.detach() for p in (*net.parameters(), *average.module.parameters())]

    for a, b in zip(*both(call, torch.randn(16, 8)), strict=True):
        assert a.device == SECOND and b.device == FIRST
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_brownian_noise_is_drawn_on_the_second_gpu():
    diffusion, net = gk.Diffusion(prediction="v"), mlp()

    def call(x):
        model = mlp().to(x.device)
        model.load_state_dict(net.state_dict())
        options = {"steps": 4, "sampler": "dpmpp_2m_sde", "step_noise": gk.BrownianNoise(Noise(5)), "seed": 1}
        return diffusion.sample(lambda x, t: model(x), (8, 16), device=x.device, **options)

    same(*both(call, torch.zeros(1)))


def test_tensors_of_two_gpus_are_refused(way):
    x, m = torch.ones(SHAPE, device=SECOND), torch.ones(SHAPE, device=FIRST)
    for call in (
        lambda: gk.ops.euler_step(x, m, 0.5),
        lambda: gk.ops.euler_step(x, x, 0.5, out=m),
        lambda: gk.ops.add_noise(x, torch.ones(3, device=FIRST), 1.0, noise=NOISE),
        lambda: gk.ops.path_loss(m, x, x_coef=1.0),
    ):
        with pytest.raises(ValueError, match="expected device cuda:[01]"):
            call()
