"""Callbacks that change the state or end the loop, captured and not."""

from __future__ import annotations

import pytest
import torch
from test_samplers import SHAPE, Recorder, conditioned, every_family, rotating, runs

import genkern as gk

GUIDED = {"cond": {"y": torch.ones(5)}, "uncond": {"y": torch.full((5,), 0.5)}, "guidance_scale": 2.0}


def model(x, t, y=None):
    return rotating(x, t) if y is None else conditioned(rotating(x, t), t, y)


def halved(k, t, x):
    return x * 0.5 if k in (0, 2) else None


WAYS = ({}, {"batch_size": 2}, {"cuda_graph": True}, {"batch_size": 2, "cuda_graph": True})


@pytest.mark.parametrize("family", ["flow", "ddim", "consistency"])
@pytest.mark.parametrize("guided", [{}, GUIDED, {"model_dtype": torch.float64}])
def test_returned_state_is_the_one_that_the_loop_goes_on_with(family, guided, path):
    sample, seen = runs()[family], Recorder(model)
    x, trajectory = sample(seen, seed=1, return_trajectory=True, callback=halved, **guided)
    plain = sample(model, seed=1, return_trajectory=True, **guided)[1]
    assert torch.equal(trajectory[1], plain[1] * 0.5) and torch.equal(trajectory[-1], x)
    for k, given in enumerate(seen.inputs):
        for part in given.split(5):
            if family != "consistency":
                torch.testing.assert_close(part.float(), trajectory[k], rtol=0, atol=0)
            else:
                t = float((4.0 * seen.times[k][0].double()).exp())
                torch.testing.assert_close(part.float(), trajectory[k] / (t * t + 0.25) ** 0.5)


@every_family
@pytest.mark.parametrize("more", [{}, {"model_dtype": torch.bfloat16}, GUIDED, {"step_noise": torch.ones(4, *SHAPE)}])
def test_changed_states_are_the_same_captured_and_split(family, more, captures):
    sample = runs()[family]

    def call(x, t, y=None):
        return model(x, t, y)

    for seed in range(2):
        wanted = sample(call, seed=seed, callback=halved, **more)
        assert not torch.equal(wanted, sample(call, seed=seed, **more))
        for way in WAYS:
            assert torch.equal(sample(call, seed=seed, callback=halved, **more, **way), wanted)


@every_family
@pytest.mark.parametrize("last", [0, 2])
def test_stop_ends_the_loop_with_the_state_as_it_is(family, last, captures):
    sample = runs()[family]

    def call(x, t):
        return rotating(x, t)

    def stop(k, t, x):
        return gk.STOP if k == last else None

    full = sample(call, seed=2, return_trajectory=True)[1]
    for way in WAYS:
        x, trajectory = sample(call, seed=2, callback=stop, return_trajectory=True, **way)
        assert torch.equal(x, full[last + 1]) and torch.equal(trajectory, full[: last + 2])
    recorder = Recorder()
    sample(recorder, seed=2, callback=stop)
    assert len(recorder.inputs) < len(full) * 2 and (last or len(recorder.inputs) <= 2)


def test_parts_that_stop_at_different_steps_stay_where_they_were(captures):
    def call(x, t):
        return rotating(x, t)

    full = gk.FlowMatching().sample(call, SHAPE, steps=4, seed=0, return_trajectory=True)[1]
    for way in ({}, {"cuda_graph": True}):
        ends = iter((1, 3, 0))
        state = {"end": None}

        def stop(k, t, x, ends=ends, state=state):
            state["end"] = next(ends) if k == 0 else state["end"]
            return gk.STOP if k == state["end"] else None

        x, trajectory = gk.FlowMatching().sample(
            call, SHAPE, steps=4, seed=0, callback=stop, return_trajectory=True, batch_size=2, **way
        )
        assert trajectory.shape == (5, *SHAPE) and torch.equal(trajectory[-1], x)
        for part, end in zip((slice(0, 2), slice(2, 4), slice(4, 5)), (1, 3, 0), strict=True):
            assert torch.equal(x[part], full[end + 1, part])


def test_changed_state_keeps_the_gradient():
    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def loss(value):
        x = gk.FlowMatching().sample(
            rotating,
            SHAPE,
            steps=3,
            seed=0,
            dtype=torch.float64,
            differentiable=True,
            callback=lambda k, t, x: value * x,
        )
        return x.square().sum()

    assert torch.autograd.gradcheck(loss, (factor,), atol=1e-5)


@pytest.mark.parametrize(
    "returned, error, words",
    [
        (True, TypeError, "callback: expected it to return None, a tensor, the state, or genkern.STOP, got bool"),
        (torch.zeros(SHAPE, dtype=torch.float16), TypeError, "callback: expected it to return torch.float32"),
        (
            torch.zeros(5, 3),
            ValueError,
            r"callback: expected it to return shape \(5, 3, 4\), the state's, got \(5, 3\)",
        ),
        (torch.zeros(SHAPE, device="meta"), ValueError, "callback: expected it to return a tensor on cpu, got meta"),
    ],
)
def test_what_a_callback_may_not_return_is_named(returned, error, words, captures):
    def call(x, t):
        return rotating(x, t)

    for way in ({}, {"cuda_graph": True}):
        with pytest.raises(error, match=words):
            gk.FlowMatching().sample(call, SHAPE, steps=2, callback=lambda k, t, x: returned, **way)
