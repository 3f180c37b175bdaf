"""gk.Loop and cuda_graph=True: whatever is asked of a captured loop, it returns the bits of the uncaptured one.

On the CPU, with a capture that records operations and runs them again (fake_capture.py); test_loop_cuda.py has the GPU.
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
import weakref

import pytest
import torch
from fake_capture import FakeCapture
from test_samplers import SHAPE, conditioned, every_family, rotating, runs
from torch import nn

import genkern as gk
from genkern import samplers
from genkern.graphs import loop as graphs_loop
from genkern.graphs import plan
from genkern.graphs.capture import capture_on
from genkern.noise import Noise

FLOW = gk.FlowMatching()


@pytest.fixture(params=["whole", "steps"])
def captures(request, monkeypatch):
    """The captures that a test has made, of loops whose steps are short or long."""
    monkeypatch.setattr(graphs_loop, "capture_on", FakeCapture)
    monkeypatch.setattr(FakeCapture, "made", [])
    monkeypatch.setattr(FakeCapture, "step_seconds", 1e-5 if request.param == "whole" else 1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cuda_graph")
        yield FakeCapture.made


class Net(nn.Module):
    """Counts how often its code runs; a replay does not run it."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.inner, self.dropout, self.calls = nn.Linear(4, 4), nn.Dropout(dropout), [0]

    def forward(self, x, t, y=None, more=None, flag=None):
        self.calls[0] += 1
        out = self.dropout(self.inner(x)).sin() + 1e-3 * t.reshape(-1, 1, 1).to(x.dtype)
        for given in (y, None if more is None else more["z"][0]):
            out = out if given is None else out * given.reshape(-1, 1, 1).to(x.dtype)
        return out


def same(got, wanted):
    assert torch.equal(got[0], wanted[0]) if isinstance(got, tuple) else torch.equal(got, wanted)
    if isinstance(got, tuple):
        assert torch.equal(got[1], wanted[1])


OPTIONS = {
    "plain": {"seed": 1},
    "noise": {"noise": Noise(3, stream=5, sample_ids=[7, 1 << 40, 0, 3, 4])},
    "seed on the device": {"noise": Noise(torch.tensor([3]), stream=torch.tensor([1 << 62]))},
    "initial state": {"noise": torch.linspace(-1, 1, 60).reshape(SHAPE), "seed": 1},
    "strided initial state": {"noise": torch.linspace(-1, 1, 60).reshape(3, 5, 4).transpose(0, 1), "seed": 1},
    "half network": {"model_dtype": torch.bfloat16, "seed": 1},
    "float64": {"dtype": torch.float64, "seed": 1},
    "split": {"batch_size": 2, "seed": 1},
    "trajectory": {"return_trajectory": True, "seed": 1},
    "split trajectory": {"return_trajectory": True, "batch_size": 3, "seed": 1},
    "step noise": {"step_noise": torch.linspace(-2, 2, 4 * 60).reshape(4, *SHAPE), "seed": 1},
    "step noise by a function": {"step_noise": lambda k: torch.full(SHAPE, 0.1 * k), "seed": 1, "batch_size": 2},
}


@every_family
@pytest.mark.parametrize("given", OPTIONS)
def test_captured_loop_has_the_bits_of_the_uncaptured_one(family, given, captures):
    options, sample = OPTIONS[given], runs()[family]

    def model(x, t):
        return rotating(x, t)

    wanted = sample(model, **options)
    for _ in range(3):
        same(sample(model, **options, cuda_graph=True), wanted)
    assert captures and all(graph.replays for capture in captures for graph in capture.graphs)


@every_family
@pytest.mark.parametrize("w", [2.5, torch.tensor([1.5]), torch.tensor([0.0, 1.0, 2.0, 3.5, -1.0])])
@pytest.mark.parametrize("more", [{}, {"model_dtype": torch.bfloat16}, {"batch_size": 2, "return_trajectory": True}])
def test_guidance_is_captured_once_and_each_call_has_its_own_scale(family, w, more, captures):
    sample = runs()[family]

    def model(x, t, y):
        return conditioned(x, t, y)

    made = None
    for seed in range(3):
        options = {"cond": {"y": torch.rand(5)}, "uncond": {"y": torch.rand(5)}, "guidance_scale": w - seed}
        wanted = sample(model, seed=seed, **options, **more)
        same(sample(model, seed=seed, **options, **more, cuda_graph=True), wanted)
        made = made or [len(capture.graphs) for capture in captures]
        assert [len(capture.graphs) for capture in captures] == made


SAMPLERS = {
    "ddim": {"clip": 1.0}, "ddpm": {"clip": (-0.5, 2.0), "final_sigma": 0.1}, "euler": {}, "euler_ancestral": {},
    "dpmpp_1": {}, "dpmpp_2m": {"clip": 1.0}, "dpmpp_3m": {}, "dpmpp_1_sde": {}, "dpmpp_2m_sde": {}, "unipc": {},
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_every_sampler_of_diffusion_is_captured(name, prediction, steps, captures):
    method, model = gk.Diffusion(prediction=prediction), Net()
    for seed in range(2):
        options = {"steps": steps, "sampler": name, "seed": seed, "model_dtype": torch.float16} | SAMPLERS[name]

        def call(x, t):
            return rotating(x, t)

        same(method.sample(call, SHAPE, **options, cuda_graph=True), method.sample(call, SHAPE, **options))
    x = torch.randn(SHAPE)
    loop = gk.Loop(method, model)
    same(method.encode(model, x, steps=3, cuda_graph=loop), method.encode(model, x, steps=3))


@pytest.mark.parametrize("path", ["kernel", "reference"], indirect=True)
def test_both_paths_are_captured(path, captures):
    for name in ("ddim", "rectified", "unipc", "sde"):
        sample = runs()[name]
        options = {"cond": {"y": torch.ones(5)}, "uncond": {"y": torch.zeros(5)}, "guidance_scale": 2.0, "seed": 3}

        def model(x, t, y):
            return conditioned(x, t, y)

        same(sample(model, **options, cuda_graph=True), sample(model, **options))


def test_each_call_draws_its_own_noise_and_the_network_is_not_called_again(captures):
    model, sample = Net().eval(), runs()["ddpm"]
    loop = gk.Loop(gk.Diffusion(prediction="v"), model)
    run = functools.partial(loop.sample, SHAPE, steps=4, sampler="ddpm")
    first = run(seed=1)
    called, copy = model.calls[0], first.clone()
    others = [run(seed=seed) for seed in (2, 1 << 63, (1 << 64) - 1, 1)]
    assert model.calls[0] == called
    for seed, other in zip((2, 1 << 63, (1 << 64) - 1, 1), others, strict=True):
        assert torch.equal(other, sample(model, seed=seed))
    assert torch.equal(first, copy) and torch.equal(first, others[-1])
    assert len({x.data_ptr() for x in (first, *others)}) == 5
    torch.manual_seed(0)
    drawn = run(), run()
    torch.manual_seed(0)
    assert torch.equal(run(), drawn[0]) and not torch.equal(*drawn)


def test_conditions_are_copied_in_at_every_call(captures):
    model = Net().eval()
    loop = gk.Loop(FLOW, model)
    for k in range(3):
        cond = {"y": torch.rand(5), "more": {"z": [torch.rand(5)]}, "flag": "word"}
        wanted = FLOW.sample(model, SHAPE, steps=3, seed=k, cond=cond)
        same(loop.sample(SHAPE, steps=3, seed=k, cond=cond), wanted)
    assert loop.captured == 1
    loop.sample(SHAPE, steps=3, cond={**cond, "flag": "another"})
    assert loop.captured == 2


def test_callback_and_progress_come_between_steps(captures, capsys):
    model, seen = Net().eval(), {False: [], True: []}
    for graphed in seen:
        FLOW.sample(
            model, SHAPE, steps=4, sampler="heun", seed=1, cuda_graph=graphed, progress=True,
            callback=lambda k, t, x, graphed=graphed: seen[graphed].append((k, t, x, model.calls[0])),
        )  # fmt: skip
    assert "4/4" in capsys.readouterr().err
    for (k, t, x, _), (other_k, other_t, other_x, _) in zip(*seen.values(), strict=True):
        assert (k, t) == (other_k, other_t) and torch.equal(x, other_x)
    assert len({calls for *_, calls in seen[True]}) == 1  # all steps are replays


def test_a_short_loop_is_one_graph_and_steps_are_captured_when_they_are_watched(captures):
    short, model = FakeCapture.step_seconds < plan.SHORT, Net().eval()
    loop = gk.Loop(FLOW, model)
    loop.sample(SHAPE, steps=6, seed=0)
    (capture,) = captures
    assert [graph.replays for graph in capture.graphs] == ([1, 1] if short else [4, 3])  # 1: timed
    loop.sample(SHAPE, steps=6, seed=0, return_trajectory=True)
    assert [graph.replays for graph in capture.graphs] == ([4, 1, 3] if short else [7, 6])


# Stale captures


def stale(change):
    """Captures, changes the model, and compares."""
    model = Net(0.5).eval()
    loop = gk.Loop(FLOW, model)
    loop.sample(SHAPE, steps=2, seed=1)
    called = model.calls[0]
    change(model)
    got = loop.sample(SHAPE, steps=2, seed=1)
    again = model.calls[0] != called
    assert torch.equal(got, FLOW.sample(model, SHAPE, steps=2, seed=1))
    return again


def moved(model):
    model.inner.weight.data = 2.0 * model.inner.weight.data


def replaced(model):
    model.inner.weight = nn.Parameter(torch.rand(4, 4))


def new_module(model):
    model.inner = nn.Linear(4, 4)


def lower(model):
    model.to(torch.bfloat16)


def hooked(model):
    model.inner.register_forward_hook(lambda module, given, out: 2.0 * out)


def patched(model):
    model.inner.forward = lambda x: x


@pytest.mark.parametrize("change", [moved, replaced, new_module, lower, hooked, patched])
def test_a_model_that_has_changed_is_captured_anew(change, captures):
    assert stale(change)


def test_parameters_changed_in_place_are_seen_without_a_new_capture(captures):
    def change(model):
        with torch.no_grad():
            model.inner.weight.mul_(2.0)

    assert not stale(change)


def test_a_function_around_a_module_is_watched_through(captures):
    net = Net().eval()
    wrappers = [lambda x, t: net(x, t), functools.partial(lambda x, t, n: n(x, t), n=net), net.forward]
    for model in wrappers:
        first = FLOW.sample(model, SHAPE, steps=2, seed=1, cuda_graph=True)
        net.inner.weight.data = net.inner.weight.data + 1.0
        second = FLOW.sample(model, SHAPE, steps=2, seed=1, cuda_graph=True)
        assert torch.equal(second, FLOW.sample(model, SHAPE, steps=2, seed=1)) and not torch.equal(first, second)


def test_a_bound_method_is_captured_once(captures):
    net = Net().eval()
    FLOW.sample(net.forward, SHAPE, steps=2, cuda_graph=True)
    called = net.calls[0]
    FLOW.sample(net.forward, SHAPE, steps=2, cuda_graph=True)
    assert net.calls[0] == called


def test_a_lambda_around_a_module_is_captured_once_for_what_it_holds(captures):
    net, scale = Net().eval(), torch.ones(4)

    def run(factor, scale=scale):
        return FLOW.sample(lambda x, t: factor * net(x, t) * scale, SHAPE, steps=2, seed=1, cuda_graph=True)

    first = run(1.0)
    called = net.calls[0]
    assert torch.equal(run(1.0), first) and net.calls[0] == called
    assert not torch.equal(run(2.0), first)
    assert not torch.equal(run(1.0, torch.zeros(4)), first)
    assert torch.equal(run(1.0), first)


def test_captures_beside_a_model_die_with_it(captures):
    model = Net().eval()
    model.own, model.inner.parent = model.forward, [model]
    FLOW.sample(model, SHAPE, steps=2, cuda_graph=True)
    FLOW.sample((lambda net: lambda x, t: net(x, t))(model), SHAPE, steps=2, cuda_graph=True)
    held = [weakref.ref(model), *map(weakref.ref, captures)]
    captures.clear()
    del model
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_a_loop_keeps_the_captures_used_last(captures):
    model = Net().eval()
    loop = gk.Loop(FLOW, model)
    for steps in range(1, 10):
        loop.sample(SHAPE, steps=steps)
    assert loop.captured == 8
    called = model.calls[0]
    loop.sample(SHAPE, steps=2)
    assert model.calls[0] == called
    loop.sample(SHAPE, steps=1)
    assert model.calls[0] > called
    loop.clear()
    assert loop.captured == 0


def test_captures_that_serve_one_call_each_are_warned_of_once(captures):
    loop = gk.Loop(FLOW, Net().eval())
    for steps in range(1, 16):
        loop.sample(SHAPE, steps=steps)
    with pytest.warns(UserWarning, match="8 captures in a row have served one call each") as caught:
        for steps in range(16, 30):
            loop.sample(SHAPE, steps=steps)
    assert [w.filename for w in caught] == [__file__]


def test_kinds_of_calls_are_captures_of_their_own(captures):
    model = Net().eval()
    loop = gk.Loop(FLOW, model)
    kinds = [
        {}, {"sampler": "heun"}, {"times": [0.0, 0.1, 1.0]}, {"dtype": torch.float64}, {"model_dtype": torch.float64},
        {"cond": {"y": torch.ones(5)}}, {"x0": torch.zeros(SHAPE)},
    ]  # fmt: skip
    for _ in range(2):
        for more in kinds:
            options = {"steps": None if "times" in more else 2, "seed": 1, **more}
            model.inner.to(options.get("model_dtype") or torch.float32)
            assert torch.equal(loop.sample(SHAPE, **options), FLOW.sample(model, SHAPE, **options))


# Networks that cannot be captured


def draws(x, t):
    return x + torch.rand_like(x)


def looks(x, t):
    return x * float(x.mean())


@pytest.mark.parametrize(
    "model, words", [(draws, "draws random numbers"), (looks, "the capture failed, as where a network waits")]
)
def test_a_network_that_cannot_be_captured_runs_uncaptured_with_one_warning(model, words, monkeypatch):
    monkeypatch.setattr(graphs_loop, "capture_on", FakeCapture)
    loop = gk.Loop(FLOW, model)
    torch.manual_seed(3)
    wanted = FLOW.sample(model, SHAPE, steps=3, seed=1)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=f"cuda_graph: {model.__name__} runs uncaptured: .*{words}") as caught:
        got = [loop.sample(SHAPE, steps=3, seed=1) for _ in range(3)]
    assert len(caught) == 1 and words in loop.refusal and loop.captured == 0
    assert caught[0].filename == __file__
    assert torch.equal(got[0], wanted)  # what was tried has drawn nothing


def test_a_network_in_train_mode_is_captured_once_it_is_in_eval_mode(monkeypatch):
    monkeypatch.setattr(graphs_loop, "capture_on", FakeCapture)
    model = Net(0.5).train()
    loop = gk.Loop(FLOW, model)
    with pytest.warns(UserWarning, match="cuda_graph: Net runs uncaptured: it draws random numbers"):
        loop.sample(SHAPE, steps=2)
    model.eval()
    assert torch.equal(loop.sample(SHAPE, steps=2, seed=1), FLOW.sample(model, SHAPE, steps=2, seed=1))
    assert loop.refusal is None and loop.captured == 1


@every_family
def test_on_a_cpu_cuda_graph_warns_once_and_runs_uncaptured(family):
    sample = runs()[family]

    def model(x, t):
        return rotating(x, t)

    with pytest.warns(UserWarning, match="a CUDA graph needs a CUDA device, and its samples are on cpu") as caught:
        got = [sample(model, seed=1, cuda_graph=True) for _ in range(2)]
    assert len(caught) == 1
    assert all(torch.equal(x, sample(model, seed=1)) for x in got)


def test_an_error_of_the_network_is_its_own(captures):
    def model(x, t):
        raise ZeroDivisionError("of the network")

    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="of the network"):
            FLOW.sample(model, SHAPE, cuda_graph=True)


def test_a_compiled_network_is_captured(captures):
    net = Net().eval()
    del net.calls
    net.forward = lambda x, t: net.inner(x).sin()
    model = torch.compile(net, backend="eager")
    for _ in range(2):
        same(FLOW.sample(model, SHAPE, steps=3, seed=1, cuda_graph=True), FLOW.sample(model, SHAPE, steps=3, seed=1))
    (capture,) = captures
    assert len(capture.graphs) == 2


def test_modes_of_torch_around_a_call_are_not_kept(captures):
    model = Net().eval()
    wanted = FLOW.sample(model, SHAPE, steps=3, seed=1)
    with torch.inference_mode():
        same(FLOW.sample(model, SHAPE, steps=3, seed=1, cuda_graph=True), wanted)
    same(FLOW.sample(model, SHAPE, steps=3, seed=1, cuda_graph=True), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        low = FLOW.sample(model, SHAPE, steps=3, seed=1)
        same(FLOW.sample(model, SHAPE, steps=3, seed=1, cuda_graph=True), low)
    assert not torch.equal(low, wanted)
    same(FLOW.sample(model, SHAPE, steps=3, seed=1, cuda_graph=True), wanted)


# Who may run a Loop, and what it refuses


def test_a_running_loop_refuses_another_run(captures):
    model, errors = Net().eval(), []
    loop = gk.Loop(FLOW, model)

    def again(*event):
        try:
            loop.sample(SHAPE, steps=1)
        except RuntimeError as error:
            errors.append(str(error))

    def elsewhere(*event):
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()

    loop.sample(SHAPE, steps=1, callback=again)
    loop.sample(SHAPE, steps=1, callback=elsewhere)
    assert len(errors) == 2 and all("expected a Loop that is not running" in text for text in errors)
    loop.sample(SHAPE, steps=1)


def test_threads_have_captures_of_their_own_beside_a_model(captures):
    model, results = Net().eval(), []
    wanted = FLOW.sample(model, SHAPE, steps=2, seed=1)

    def run():
        results.append(FLOW.sample(model, SHAPE, steps=2, seed=1, cuda_graph=True))

    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(captures) == 2 and all(torch.equal(x, wanted) for x in results)


class Slots:
    __slots__ = ()

    def __call__(self, x, t):
        return x


@pytest.mark.parametrize(
    "model, options, error, words",
    [
        (rotating, {"cuda_graph": 1}, TypeError, "cuda_graph: expected a bool or a Loop, got int"),
        (rotating, {"cuda_graph": None}, TypeError, "cuda_graph: expected a bool or a Loop, got NoneType"),
        (rotating, {"cuda_graph": gk.Loop(FLOW, conditioned)}, ValueError, "cuda_graph: expected a Loop of this model"),
        (
            rotating,
            {"cuda_graph": True, "differentiable": True},
            ValueError,
            "cuda_graph: expected False with differentiable=True",
        ),
        (Slots(), {"cuda_graph": True}, TypeError, "cuda_graph: expected a model that has a hash .*, got Slots"),
    ],
)
def test_bad_cuda_graph_is_named_before_anything_is_drawn(model, options, error, words):
    state = torch.get_rng_state()
    with pytest.raises(error, match=words):
        FLOW.sample(model, SHAPE, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_loop_is_named():
    with pytest.raises(TypeError, match="method: expected an object with sample"):
        gk.Loop(samplers, rotating)
    with pytest.raises(TypeError, match="model: expected a callable, got int"):
        gk.Loop(FLOW, 3)
    with pytest.raises(TypeError, match="cuda_graph: expected none in Loop.sample"):
        gk.Loop(FLOW, rotating).sample(SHAPE, cuda_graph=True)


def test_the_capture_of_a_device_without_graphs_says_so():
    with pytest.raises(Exception, match="needs a CUDA device, and its samples are on cpu"):
        capture_on(torch.device("cpu"))
