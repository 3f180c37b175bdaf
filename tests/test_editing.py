"""Editing: a start part of the way from given data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_samplers import SHAPE, Recorder, every_family, rotating, runs
from torch.utils._python_dispatch import TorchDispatchMode

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


# Inpainting

MASK = torch.zeros(SHAPE)
MASK[:, 1:, :2] = 1.0
SOFT = torch.linspace(0.0, 1.0, 4)


def blended(method, x, t, last, mask, z):
    """The blend as it is written: what is known, noised to time t with z."""
    alpha, sigma = (1.0, 0.0) if last else scales_of(method, t)
    return mask * x + (1.0 - mask) * (alpha * DATA.to(z.dtype) + sigma * z)


@pytest.mark.parametrize("mask", [MASK, SOFT], ids=["hard", "soft"])
def test_inpainting_is_the_blend_of_every_step_with_one_noise(mask, path):
    f64, mask, seed = torch.float64, mask.double(), 5
    options = {"mask": mask, "known": DATA, "seed": seed, "dtype": f64, "steps": 4}
    flow = gk.FlowMatching(sigma_min=0.1)
    x = gk.ops.randn(SHAPE, noise=Noise(seed).at(Purpose.INITIAL), dtype=f64)
    for k in range(4):
        x = x + 0.25 * rotating(x, torch.full((5,), 0.25 * k))
        z = gk.ops.randn(SHAPE, noise=Noise(seed).at(Purpose.KNOWN, k), dtype=f64)  # a step without noise of its own
        x = blended(flow, x, 0.25 * (k + 1), k == 3, mask, z)
    torch.testing.assert_close(flow.sample(rotating, SHAPE, **options), x)

    diffusion = gk.Diffusion()
    x = gk.ops.randn(SHAPE, noise=Noise(seed).at(Purpose.INITIAL), dtype=f64)
    times = [999, 749, 499, 249, -1]
    for k, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        epsilon = rotating(x, torch.full((5,), t))
        z = gk.ops.randn(SHAPE, noise=Noise(seed).at(Purpose.STEP, k), dtype=f64)
        ends = (*scales_of(diffusion, t), *scales_of(diffusion, s))
        x = gk.reference.ddim_step(x, epsilon, *ends, eta=0.7, noise=z)
        x = blended(diffusion, x, s, k == 3, mask, z)
    torch.testing.assert_close(diffusion.sample(rotating, SHAPE, eta=0.7, **options), x)


def test_noise_given_for_a_step_is_that_of_what_is_known():
    given = torch.randn(4, *SHAPE)
    options = {"mask": torch.zeros(SHAPE), "known": DATA, "seed": 1, "eta": 1.0, "steps": 4, "return_trajectory": True}
    _, trajectory = gk.Diffusion().sample(rotating, SHAPE, step_noise=given, **options)
    for k, t in enumerate((749, 499, 249)):
        alpha, sigma = scales_of(gk.Diffusion(), t)
        torch.testing.assert_close(trajectory[k + 1], alpha * DATA + sigma * given[k])


class Passes(TorchDispatchMode):
    """Counts what is asked of the kernels, and what else reads or writes a state."""

    def __init__(self):
        super().__init__()
        self.kernel, self.others = 0, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.kernel += op.namespace == "genkern"
        if op.namespace != "genkern" and any(isinstance(t, torch.Tensor) and t.shape == SHAPE for t in args):
            self.others.add(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"model_dtype": torch.bfloat16}, {"sampler": "dpmpp_2m"}])
def test_inpainting_takes_no_pass_beside_the_steps(options, kernels):
    def model(x, t):
        return x

    counts = []
    for more in ({}, {"mask": MASK.bool(), "known": DATA}):
        with Passes() as passes:
            gk.Diffusion().sample(model, SHAPE, steps=5, seed=0, **options, **more)
        counts.append(passes.kernel)
    assert counts == [6, 6]
    assert not {name for name in passes.others if "lerp" in name or "mul" in name or "add" in name}


@every_family
@pytest.mark.parametrize("more", [{}, {"model_dtype": torch.bfloat16}, {"init": DATA.flip(1), "strength": 0.8}])
def test_inpainting_keeps_what_is_known_captured_and_split(family, more, captures):
    sample = runs()[family]

    def model(x, t):
        return rotating(x, t)

    for seed, mask in enumerate((MASK, MASK.bool(), SOFT, MASK[:, :1])):
        options = {"mask": mask, "known": DATA * (seed + 1), "seed": seed, **more}
        whole, trajectory = sample(model, return_trajectory=True, **options)
        kept = mask.to(torch.float32).expand(SHAPE) == 0.0
        assert torch.equal(whole[kept], options["known"][kept])
        assert not torch.equal(trajectory[-2][kept], whole[kept])
        assert torch.equal(trajectory[-1], whole)
        for way in ({"batch_size": 2}, {"cuda_graph": True}, {"batch_size": 3, "cuda_graph": True}):
            assert torch.equal(sample(model, **options, **way), whole)
        graphed = sample(model, return_trajectory=True, cuda_graph=True, **options)
        assert torch.equal(graphed[1], trajectory)


def test_network_sees_the_blended_state():
    for more in ({}, {"model_dtype": torch.float64}):
        model = Recorder()
        _, trajectory = gk.FlowMatching().sample(
            model, mask=MASK, known=DATA, init=DATA, strength=1.0, steps=4, seed=0, return_trajectory=True, **more
        )
        for x, seen in zip(trajectory, model.inputs, strict=False):
            torch.testing.assert_close(x, seen.float(), rtol=0, atol=0)


def test_generated_part_is_the_samplers_own_where_the_network_is_local():
    def local(x, t):
        return x.sin()

    plain = gk.Diffusion().sample(local, SHAPE, steps=5, seed=1, eta=1.0)
    part = gk.Diffusion().sample(local, SHAPE, steps=5, seed=1, eta=1.0, mask=MASK, known=DATA)
    assert torch.equal(part[MASK == 1.0], plain[MASK == 1.0])


def test_a_mask_that_requires_a_gradient_is_refused():
    mask = SOFT.clone().requires_grad_()
    options = {"steps": 2, "seed": 0, "mask": mask, "known": DATA}
    assert not gk.FlowMatching().sample(rotating, SHAPE, **options).requires_grad
    with pytest.raises(ValueError, match="mask: expected a tensor that requires no gradient"):
        gk.FlowMatching().sample(rotating, SHAPE, **options, differentiable=True)


def test_inpainting_keeps_the_gradient():
    known = DATA.double().requires_grad_()

    def loss(value):
        x = gk.FlowMatching().sample(
            rotating, SHAPE, steps=3, seed=0, mask=SOFT, known=value, differentiable=True, dtype=torch.float64
        )
        return x.square().sum()

    assert torch.autograd.gradcheck(loss, (known,), atol=1e-5)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"mask": MASK}, ValueError, "known: expected a tensor beside mask, got None"),
        ({"known": DATA}, ValueError, "mask: expected a tensor beside known, got None"),
        ({"mask": MASK, "known": DATA[:2]}, ValueError, r"known: expected shape \(5, 3, 4\), got \(2, 3, 4\)"),
        ({"mask": MASK, "known": DATA.long()}, TypeError, "known: expected a tensor of float32, .* got torch.int64"),
        ({"mask": 0.5, "known": DATA}, TypeError, "mask: expected a tensor of float32, .* got <class 'float'>"),
        ({"mask": MASK[:, :2], "known": DATA}, ValueError, "mask: expected a shape that broadcasts to"),
        ({"mask": 2.0 * MASK, "known": DATA}, ValueError, "mask: expected a number from 0 to 1, got 0 to 2"),
    ],
)
@every_family
def test_bad_mask_is_named(options, error, words, family):
    with pytest.raises(error, match=words):
        runs()[family](rotating, **options)
