"""gk.Loop: which captures it keeps and for how long, what it runs uncaptured, and who may run it."""

from __future__ import annotations

import functools
import gc
import threading
import weakref

import pytest
import torch
from fake_capture import FakeCapture
from loop_cases import FLOW, Net, same
from test_samplers import SHAPE, conditioned, every_family, rotating, runs
from torch import nn

import genkern as gk
from genkern import samplers
from genkern.graphs import loop as graphs_loop
from genkern.graphs.capture import capture_on

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


def another_hook(module, given, out):
    return 3.0 * out


@pytest.mark.parametrize("kind", ["hook", "forward", "buffer"])
def test_what_takes_the_place_of_another_is_seen(kind, captures):
    """As many hooks, attributes and buffers as before."""
    model = Net(0.5).eval()
    handle = model.inner.register_forward_hook(lambda module, given, out: 2.0 * out)
    plain = model.inner.forward
    model.inner.forward = lambda x: plain(x) + 1.0
    model.inner.register_buffer("late", None)
    loop = gk.Loop(FLOW, model)
    loop.sample(SHAPE, steps=2, seed=1)
    if kind == "hook":
        handle.remove()
        model.inner.register_forward_hook(another_hook)
    elif kind == "forward":
        model.inner.forward = lambda x: plain(x) - 1.0
    else:
        model.inner.late = torch.ones(4)
    called = model.calls[0]
    assert torch.equal(loop.sample(SHAPE, steps=2, seed=1), FLOW.sample(model, SHAPE, steps=2, seed=1))
    assert model.calls[0] > called + 2


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
