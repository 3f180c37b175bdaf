"""Editing: a start part of the way from given data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_samplers import SHAPE, Recorder, every_family, rotating, runs

import genkern as gk
from genkern import grids
from genkern.noise import Noise, Purpose

DATA = torch.linspace(-1.0, 1.0, 60).reshape(SHAPE).flip(0)
HEUN = {"sampler": "heun"}
CONSISTENCY = gk.Consistency()


def manual():
    """For each family: its method, options of 10 steps, the times of its grid, and options of a walk over times."""
    dpm = gk.Diffusion(prediction="v")
    leading = grids.timesteps(10, 1000, "trailing")
    even = grids.uniform(10, 0.0, 1.0)
    steps = CONSISTENCY.times(11)[::-1]
    return {
        "ddim": (gk.Diffusion(), {"eta": 0.7}, leading, lambda times: {"timesteps": times}),
        "unipc": (dpm, {"sampler": "unipc"}, leading, lambda times: {"timesteps": times}),
        "flow": (gk.FlowMatching(), {}, even, lambda times: {"times": times}),
        "heun": (gk.FlowMatching(sigma_min=0.1), HEUN, even, lambda times: {"times": times}),
        "consistency": (CONSISTENCY, {}, steps, lambda times: {"times": times[:-1]}),
    }


def scales_of(method, t):
    if isinstance(method, gk.Consistency):
        return 1.0, float(t)
    return float(method.path.alpha(t)), float(method.path.sigma(t))


@pytest.mark.parametrize("family", manual())
@pytest.mark.parametrize("strength, walked", [(1.0, 10), (0.8, 8), (0.35, 3), (0.7, 7), (0.01, 1)])
def test_start_at_a_strength_is_the_noised_data_and_the_remaining_steps(family, strength, walked, path):
    method, options, times, over = manual()[family]
    kept = times[10 - walked :]
    alpha, sigma = scales_of(method, float(kept[0]))
    x_t = gk.ops.add_noise(DATA, alpha, sigma, noise=Noise(3).at(Purpose.INITIAL))
    wanted = method.sample(rotating, seed=3, noise=x_t, **options, **over(kept))
    got = method.sample(rotating, seed=3, init=DATA, strength=strength, steps=10, **options)
    if family == "consistency":  # the first input is scaled in the noising pass, before the state is rounded
        torch.testing.assert_close(got, wanted)
    else:
        assert torch.equal(got, wanted)


@every_family
def test_start_from_data_is_captured_and_split_with_the_same_samples(family, captures):
    sample = runs()[family]

    def model(x, t):
        return rotating(x, t)

    for seed, data in enumerate((DATA, DATA.flip(0), DATA.transpose(1, 2).contiguous().transpose(1, 2))):
        options = {"init": data, "strength": 0.75, "seed": seed}
        whole = sample(model, **options)
        for more in ({"batch_size": 2}, {"cuda_graph": True}, {"batch_size": 3, "cuda_graph": True}):
            assert torch.equal(sample(model, **options, **more), whole)
        ids = torch.tensor([4, 2, 0, 3, 1])
        moved = {"init": data[ids], "strength": 0.75, "noise": Noise(seed, sample_ids=ids)}
        assert torch.equal(sample(model, **moved, cuda_graph=True), whole[ids])


def test_strength_counts_the_steps_as_diffusers_does():
    for steps in (1, 2, 7, 50, 100):
        for strength in np.arange(1, 101) / 100:
            wanted = max(1, int(round(steps * strength * 100)) // 100)
            model = Recorder()
            gk.FlowMatching().sample(model, steps=steps, init=torch.zeros(1, 1, 1), strength=strength)
            assert len(model.inputs) == wanted


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"strength": 0.5}, ValueError, "strength: expected None without init, got 0.5"),
        ({"init": DATA}, ValueError, "strength: expected a number > 0, at most 1, beside init, got None"),
        ({"init": DATA, "strength": 0.0}, ValueError, "strength: expected a number > 0, at most 1, got 0.0"),
        ({"init": DATA, "strength": 1.5}, ValueError, "strength: expected a number from 0 to 1, got 1.5"),
        ({"init": DATA, "strength": "much"}, TypeError, "strength: expected a number"),
        ({"init": DATA.long(), "strength": 0.5}, TypeError, "init: expected a tensor of float32"),
        ({"init": DATA[:2], "strength": 0.5}, ValueError, r"init: expected shape \(5, 3, 4\), got \(2, 3, 4\)"),
        ({"init": DATA, "strength": 0.5, "noise": DATA}, ValueError, "noise: expected a Noise beside init, got a"),
    ],
)
@every_family
def test_bad_start_is_named(options, error, words, family):
    with pytest.raises(error, match=words):
        runs()[family](rotating, **options)


def test_a_walk_toward_the_noise_has_no_init():
    with pytest.raises(ValueError, match=r"init: expected None in encode\(\), which starts from x"):
        gk.Diffusion().encode(rotating, DATA, steps=2, init=DATA, strength=0.5)
    with pytest.raises(ValueError, match="init: expected None with direction='backward'"):
        gk.FlowMatching().sample(rotating, x1=DATA, direction="backward", steps=2, init=DATA, strength=0.5)
    with pytest.raises(ValueError, match="init: expected None where the initial state is given"):
        gk.FlowMatching().sample(rotating, x0=DATA, steps=2, init=DATA, strength=0.5)
