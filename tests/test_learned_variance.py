"""A learned range of variances: its loss, its objective, its samples, against formulas and the fixed variances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_editing import Passes
from torch import distributions as D
from torch import nn

import genkern as gk
from genkern.noise import Noise, Purpose
from genkern.samplers import DDIM, DDPM

F64 = torch.float64
SHAPE = (4, 2, 5)


class Doubled(nn.Module):
    """Predicts by one little network and says the variance by another."""

    def __init__(self):
        super().__init__()
        self.mean, self.range = nn.Linear(5, 5, dtype=F64), nn.Linear(5, 5, dtype=F64)

    def forward(self, x, t, y=0.0):
        scale = (1 + 0.1 * torch.sin(t.to(F64))).reshape(-1, 1, 1).to(x.dtype)
        y = y if isinstance(y, float) else y.reshape(-1, 1, 1)
        x = x.to(F64)
        return torch.cat([torch.tanh(self.mean(x)) * scale + y, torch.tanh(self.range(x)) + y], dim=1)


def constant(v):
    """A network whose range is v everywhere."""
    return lambda x, t: torch.cat([torch.sin(x + t.reshape(-1, 1, 1)), torch.full_like(x, v)], dim=1)


def first_half(x, t):
    return torch.sin(x + t.reshape(-1, 1, 1))


def diffusions(prediction="epsilon", timesteps=8):
    return {
        variance: gk.Diffusion("squared_cosine", timesteps, prediction, variance=variance)
        for variance in ("fixed_small", "fixed_large", "learned_range")
    }


def parts(diffusion, model, x, t, z):
    """Of (13.7) and the network: q and p of torch.distributions, each [B, ...]; p at t = 0 is of x itself."""
    a = torch.tensor(np.append(1.0, diffusion.alphas_cumprod), dtype=F64)
    here, before = (a[t + k].reshape(-1, 1, 1) for k in (1, 0))
    x_t = here.sqrt() * x + (1 - here).sqrt() * z
    m, v = model(x_t, t).chunk(2, dim=1)
    f = (x_t - (1 - here).sqrt() * m) / here.sqrt()
    small = (1 - before) / (1 - here) * (1 - here / before)
    large = 1 - here / before
    first = ((1 - a[1]) / (1 - a[2]) * (1 - a[2] / a[1])).expand_as(small)
    low = torch.where(small > 0, small, first)
    std = (((1 + v) / 2) * large.log() + ((1 - v) / 2) * low.log()).div(2).exp()
    e = (1 - before - small).clamp(min=0).sqrt() / (1 - here).sqrt()

    def mean(y):
        return before.sqrt() * y + e * (x_t - here.sqrt() * y)

    return m, D.Normal(mean(x), low.sqrt().expand_as(x)), D.Normal(mean(f.detach()), std), D.Normal(f.detach(), std)


def test_loss_adds_the_objective_of_the_range_and_leaves_the_prediction_to_its_own():
    diffusion, model = diffusions()["learned_range"], Doubled()
    x, noise, t = torch.randn(SHAPE, dtype=F64), Noise(3), torch.tensor([0, 3, 7, 1])
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64)
    m, q, p, first = parts(diffusion, model, x, t, z)
    divergence = D.kl_divergence(q, p)
    terms = torch.where((t == 0).reshape(-1, 1, 1), -first.log_prob(x), divergence)
    expected = (m - z).square().mean((1, 2)) + 0.001 * 8 * terms.mean((1, 2))
    got = diffusion.loss(model, x, t=t, noise=noise, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    found, slopes = (torch.autograd.grad(of.sum(), list(model.parameters())) for of in (got, expected))
    torch.testing.assert_close(found, slopes, rtol=1e-6, atol=1e-9)
    mask = torch.rand(SHAPE) > 0.4
    masked = diffusion.loss(model, x, t=t, noise=noise, reduction="none", mask=mask)
    expected = (((m - z).square() + 0.008 * terms) * mask).sum((1, 2)) / mask.sum((1, 2))
    torch.testing.assert_close(masked, expected, rtol=1e-7, atol=1e-9)
    for reduction, total in (("mean", got.mean()), ("sum", got.sum())):
        torch.testing.assert_close(diffusion.loss(model, x, t=t, noise=noise, reduction=reduction), total)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_objective_with_the_range_at_its_lower_end_is_that_of_the_ddpm(prediction):
    small, learned = (diffusions(prediction)[k] for k in ("fixed_small", "learned_range"))
    x = torch.randn(SHAPE, dtype=F64)
    one, other = small.vlb(first_half, x, noise=Noise(1)), learned.vlb(constant(-1.0), x, noise=Noise(1), batch_size=9)
    torch.testing.assert_close(other.steps, one.steps)
    torch.testing.assert_close(other.prior, one.prior)
    terms = learned.l_gamma(constant(0.3), x, noise=Noise(1))
    torch.testing.assert_close(terms, small.l_gamma(first_half, x, noise=Noise(1)))


def test_objective_is_the_written_out_divergence():
    diffusion, model, z = diffusions()["learned_range"], Doubled(), torch.randn(SHAPE, dtype=F64)
    x = torch.randn(SHAPE, dtype=F64)
    found = diffusion.vlb(model, x, noise=z)
    for t in range(8):
        _, q, p, first = parts(diffusion, model, x, torch.full((4,), t), z)
        expected = -first.log_prob(x) if t == 0 else D.kl_divergence(q, p)
        torch.testing.assert_close(found.steps[:, t], expected.sum((1, 2)).detach())


@pytest.mark.parametrize("v, variance", [(-1.0, "fixed_small"), (1.0, "fixed_large")])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_samples_at_the_ends_of_the_range_are_those_of_the_fixed_variances(v, variance, prediction):
    of = diffusions(prediction)
    fixed = of[variance].sample(first_half, SHAPE, steps=5, sampler="ddpm", seed=2, clip=1.0)
    learned = of["learned_range"].sample(constant(v), SHAPE, steps=5, sampler="ddpm", seed=2, clip=1.0)
    torch.testing.assert_close(learned, fixed)


def test_samples_are_the_written_out_walk():
    diffusion, model, times = diffusions()["learned_range"], Doubled(), [7, 4, 1]
    x, steps = torch.randn(SHAPE, dtype=F64), torch.randn(3, *SHAPE, dtype=F64)
    got = diffusion.sample(
        model, noise=x, timesteps=times, sampler="ddpm", step_noise=steps, final_sigma=0.05, dtype=F64
    )
    a = np.append(diffusion.alphas_cumprod[times], 1.0)
    for k in range(3):
        m, v = model(x, torch.full((4,), times[k])).detach().chunk(2, dim=1)
        f = (x - math.sqrt(1 - a[k]) * m) / math.sqrt(a[k])
        if k == 2:
            x = f + 0.05 * steps[k]
            break
        large, share = 1 - a[k] / a[k + 1], (1 + v) / 2
        small = (1 - a[k + 1]) / (1 - a[k]) * large
        mean = math.sqrt(a[k + 1]) * f + math.sqrt(1 - a[k + 1] - small) * m
        x = mean + (share * math.log(large) + (1 - share) * math.log(small)).div(2).exp() * steps[k]
    torch.testing.assert_close(got, x)


def test_other_samplers_take_the_prediction_alone():
    of = diffusions()
    for sampler in ("ddim", "dpmpp_2m", DDIM(0.5)):
        fixed = of["fixed_small"].sample(first_half, SHAPE, steps=4, sampler=sampler, seed=2)
        learned = of["learned_range"].sample(constant(0.7), SHAPE, steps=4, sampler=sampler, seed=2, batch_size=3)
        torch.testing.assert_close(learned, fixed)
    x = torch.randn(SHAPE)
    encoded = of["learned_range"].encode(constant(0.7), x, steps=4)
    torch.testing.assert_close(encoded, of["fixed_small"].encode(first_half, x, steps=4))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_ddpm_of_the_callers_own_has_its_own_variance(variance):
    of = diffusions()
    learned = of["learned_range"].sample(constant(0.0), SHAPE, steps=4, sampler=DDPM(variance=variance), seed=2)
    torch.testing.assert_close(learned, of[variance].sample(first_half, SHAPE, steps=4, sampler="ddpm", seed=2))


def test_the_objective_has_the_gradient_of_the_prediction_too():
    diffusion, model, z = diffusions()["learned_range"], Doubled(), torch.randn(SHAPE, dtype=F64)
    x = torch.randn(SHAPE, dtype=F64)
    found = diffusion.vlb(model, x, noise=z, differentiable=True).total.sum()
    slopes = torch.autograd.grad(found, list(model.parameters()))
    for weight, slope in zip(model.parameters(), slopes, strict=True):
        step = torch.zeros_like(weight)
        step.view(-1)[0] = 1e-5
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                weight += sign * step
                ends.append(float(diffusion.vlb(model, x, noise=z).total.sum()))
                weight -= sign * step
        assert float(slope.view(-1)[0]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("weight", [torch.tensor([0.0, 2.0, 0.5, 1.0]), 3.0, lambda t: 1.0 + t])
def test_a_weight_is_of_the_whole_loss_of_a_sample(weight):
    diffusion, model, t = diffusions()["learned_range"], Doubled(), torch.tensor([0, 3, 7, 1])
    x, options = torch.randn(SHAPE, dtype=F64), {"t": t, "noise": Noise(3), "weighting": "min_snr", "reduction": "none"}
    plain = diffusion.loss(model, x, **options)
    factor = weight(t) if callable(weight) else weight
    torch.testing.assert_close(diffusion.loss(model, x, weight=weight, **options), factor * plain)


def test_a_step_without_noise_has_none_where_alpha_0_is_alpha_1():
    """diffusers' set_alpha_to_one=False: beta of the step below t = 0 is 0."""
    a = gk.Diffusion("squared_cosine", 8).alphas_cumprod
    small, learned = (
        gk.Diffusion(alphas_cumprod=a, final_alphas_cumprod=a[0], variance=v) for v in ("fixed_small", "learned_range")
    )
    options = {"timesteps": [7, 3, 0], "sampler": "ddpm", "seed": 2}
    torch.testing.assert_close(
        learned.sample(constant(-1.0), SHAPE, **options), small.sample(first_half, SHAPE, **options)
    )
    # At t = 0 the variance lies between beta~ of t = 1 and that of the step to clean data, as with alpha_0 = 1.
    x, t, model = torch.randn(SHAPE, dtype=F64), torch.zeros(4, dtype=torch.int64), Doubled()
    one, other = (d.loss(model, x, t=t, noise=Noise(3)) for d in (learned, diffusions()["learned_range"]))
    torch.testing.assert_close(one, other)
    other.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert learned.vlb(model, x, noise=Noise(3)).steps.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"return_trajectory": True, "clip": 1.0},
        {"step_noise": torch.randn(6, *SHAPE)},
        {"mask": torch.eye(5)[:2] > 0.0, "known": torch.ones(SHAPE)},
        {"cond": {"y": torch.ones(4)}, "uncond": {"y": torch.zeros(4)}, "guidance_scale": 2.0},
    ],
    ids=["plain", "trajectory", "given noise", "inpainting", "guided"],
)
def test_captured_a_learned_variance_has_the_bits_of_the_uncaptured_loop(dtype, more, captures):
    diffusion, model = diffusions()["learned_range"], Doubled()
    loop = gk.Loop(diffusion, model)
    for graph in (loop, True):
        made = None
        for seed in range(3):
            options = {"steps": 6, "sampler": "ddpm", "seed": seed, "dtype": dtype, **more}
            wanted = diffusion.sample(model, SHAPE, **options)
            found = diffusion.sample(model, SHAPE, cuda_graph=graph, **options)
            for a, b in zip(found, wanted, strict=True) if isinstance(found, tuple) else [(found, wanted)]:
                assert torch.equal(a, b)
            made = made or [len(capture.graphs) for capture in captures]
            assert [len(capture.graphs) for capture in captures] == made
    assert loop.captured == 1 and loop.refusal is None


def test_captured_other_samplers_keep_their_capture(captures):
    diffusion, model = diffusions()["learned_range"], Doubled()
    loop = gk.Loop(diffusion, model)
    for graph in (loop, True):
        made = None
        for seed in range(3):
            options = {"steps": 4, "seed": seed, "dtype": F64}
            wanted = diffusion.sample(model, SHAPE, **options)
            assert torch.equal(diffusion.sample(model, SHAPE, cuda_graph=graph, **options), wanted)
            made = made or [len(capture.graphs) for capture in captures]
            assert [len(capture.graphs) for capture in captures] == made
    assert loop.captured == 1


def test_a_capture_of_the_prediction_is_not_that_of_the_whole_network(captures):
    model = Doubled()
    diffusions()["learned_range"].sample(model, SHAPE, steps=4, seed=1, dtype=F64, cuda_graph=True)
    with pytest.raises(ValueError, match="model: expected output of shape"):
        diffusions()["fixed_small"].sample(model, SHAPE, steps=4, seed=1, dtype=F64, cuda_graph=True)


def test_a_learned_variance_is_that_of_data_to_start_from_too():
    diffusion, x = diffusions()["learned_range"], torch.randn(SHAPE)
    one, other = (
        diffusion.sample(constant(v), init=x, strength=0.5, steps=4, sampler="ddpm", seed=2) for v in (-1.0, 1.0)
    )
    assert not torch.equal(one, other)


def test_a_learned_variance_is_the_same_in_any_split_of_the_batch():
    diffusion, model = diffusions()["learned_range"], Doubled()
    options = {"steps": 4, "sampler": "ddpm", "seed": 5, "dtype": F64}
    whole = diffusion.sample(model, SHAPE, **options)
    torch.testing.assert_close(diffusion.sample(model, SHAPE, batch_size=3, **options), whole, rtol=1e-12, atol=1e-12)


def test_a_step_of_a_learned_variance_is_one_pass(kernels):
    with Passes() as passes:
        diffusions()["learned_range"].sample(constant(0.3), SHAPE, steps=5, sampler="ddpm", seed=0)
    assert passes.kernel == 6


@pytest.mark.parametrize("interval", [(0.0, 7.0), (2.0, 5.0)])
def test_guidance_in_an_interval_has_the_range_of_the_condition(interval):
    diffusion, model = diffusions()["learned_range"], Doubled()
    y, null, x = torch.linspace(0.0, 1.0, 4, dtype=F64), torch.zeros(4, dtype=F64), torch.randn(SHAPE, dtype=F64)

    def manual(x, t):
        m, v = model(x, t, y).chunk(2, 1)
        m_u, _ = model(x, t, null).chunk(2, 1)
        inside = (t >= interval[0]) & (t <= interval[1])
        return torch.cat([torch.where(inside.reshape(-1, 1, 1), m_u + 2.0 * (m - m_u), m), v], 1)

    options = {"noise": x, "steps": 4, "sampler": "ddpm", "seed": 5, "dtype": F64}
    guided = diffusion.sample(
        model, cond={"y": y}, uncond={"y": null}, guidance_scale=2.0, guidance_interval=interval, **options
    )
    torch.testing.assert_close(guided, diffusion.sample(manual, **options))


def test_under_guidance_the_range_is_the_conditional_ones():
    diffusion, model = diffusions()["learned_range"], Doubled()
    y, null, x = torch.linspace(0.0, 1.0, 4, dtype=F64), torch.zeros(4, dtype=F64), torch.randn(SHAPE, dtype=F64)

    def manual(x, t):
        m_u, _ = model(x, t, null).chunk(2, 1)
        m, v = model(x, t, y).chunk(2, 1)
        return torch.cat([m_u + 2.0 * (m - m_u), v], 1)

    options = {"noise": x, "steps": 4, "sampler": "ddpm", "seed": 5, "dtype": F64}
    guided = diffusion.sample(model, cond={"y": y}, uncond={"y": null}, guidance_scale=2.0, **options)
    torch.testing.assert_close(guided, diffusion.sample(manual, **options))


def test_seeds_and_torch_govern_the_samples():
    diffusion, model = diffusions()["learned_range"], Doubled()

    def sample(**options):
        return diffusion.sample(model, SHAPE, steps=4, sampler="ddpm", **options)

    assert torch.equal(sample(seed=4), sample(noise=Noise(4)))
    drawn = [sample(generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*drawn)
    torch.manual_seed(3)
    first, second = sample(), sample()
    torch.manual_seed(3)
    assert torch.equal(sample(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match="callback"):
        sample(callback=3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("call", ["loss", "vlb", "sample"])
def test_a_network_without_the_channels_is_named(call):
    diffusion = diffusions()["learned_range"]
    of = {
        "loss": lambda: diffusion.loss(first_half, torch.zeros(SHAPE)),
        "vlb": lambda: diffusion.vlb(first_half, torch.zeros(SHAPE)),
        "sample": lambda: diffusion.sample(first_half, SHAPE, steps=2, sampler="ddpm"),
    }
    with pytest.raises(ValueError, match=r"model: expected output of shape \(\d+, 4, 5\), channels doubled"):
        of[call]()


def ddpm(**options):
    return diffusions()["learned_range"].sample(constant(0.0), SHAPE, sampler="ddpm", **options)


@pytest.mark.parametrize("make, words", [
    (lambda: gk.Diffusion("continuous_vp", variance="learned_range"), "variance: expected a fixed one in continuous"),
    (lambda: gk.Diffusion(variance="learned"), "variance: expected one of 'fixed_small', 'fixed_large', 'learned_r"),
    (lambda: diffusions()["learned_range"].vlb(constant(0.0), torch.zeros(SHAPE), eta=0.5), "posterior_std, eta, sig"),
    (lambda: ddpm(guidance_scale=[2.0, 1.0], cond=[{}, {}], uncond={}), "cond: expected one condition with a learned"),
    (lambda: ddpm(step_noise=torch.zeros(2, *SHAPE), steps=4), r"step_noise: expected shape \(4, 4, 2, 5\), \[steps"),
    (lambda: ddpm(step_noise=lambda k: torch.zeros(2), steps=4), r"step_noise: expected shape \(4, 2, 5\) of step 0"),
    (lambda: ddpm(noise=torch.tensor(1.0), batch_size=2), "initial state: expected dimension 0 to be the batch"),
    (lambda: ddpm(init=torch.zeros(4, 2, 6), strength=0.5), r"init: expected shape \(4, 2, 5\)"),
    (lambda: ddpm(guide=lambda x, t, y: x.sum()), "guide: expected None with a learned variance"),
])  # fmt: skip
def test_unsupported_combination_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("options, words", [
    ({"step_noise": 3}, "step_noise: expected a tensor or a callable, got int"),
    ({"step_noise": lambda k: None}, None),
    ({"batch_size": "a"}, "batch_size: expected an integer"),
    ({"generator": 3}, "generator: expected a torch.Generator, got int"),
])  # fmt: skip
def test_argument_of_another_type_is_named_before_it_is_used(options, words):
    with pytest.raises(ValueError if words is None else TypeError, match=words or "step_noise: expected shape"):
        ddpm(steps=4, **options)
