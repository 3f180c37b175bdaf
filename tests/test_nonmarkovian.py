"""The non-Markovian family (13.6)-(13.8), (13.10): marginals, Bayes' rule, variances, steps and sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import genkern as gk
from genkern.rows import Out
from genkern.samplers import DDIM, DDPM, DPMSolverSDE, NonMarkovian, OnPath
from genkern.samplers.nonmarkovian import backward, ddpm_std, forward

F64 = torch.float64
SHAPE = (6, 3, 5)
SCALES = [(0.3, math.sqrt(1 - 0.09), 0.7, math.sqrt(1 - 0.49)), (0.95, math.sqrt(1 - 0.9025), 0.99, math.sqrt(0.0199))]
GRID = np.array([999.0, 700.0, 300.0, 20.0, 0.0, -1.0])


def small(timesteps=10):
    return gk.Diffusion("squared_cosine", timesteps)


# Equations


@pytest.mark.parametrize("alpha_t, sigma_t, alpha_s, sigma_s", SCALES)
@pytest.mark.parametrize("part", [0.0, 0.2, 0.7, 1.0])
def test_equation_13_7_keeps_the_marginals_for_any_sigma(alpha_t, sigma_t, alpha_s, sigma_s, part):
    out = backward(alpha_t, sigma_t, alpha_s, sigma_s, part * sigma_s)
    assert out.y + out.x * alpha_t == pytest.approx(alpha_s, rel=1e-12)
    assert (out.x * sigma_t) ** 2 + out.z**2 == pytest.approx(sigma_s**2, rel=1e-12)


@pytest.mark.parametrize("alpha_t, sigma_t, alpha_s, sigma_s", SCALES)
@pytest.mark.parametrize("part", [0.2, 0.7, 1.0])
def test_equation_13_8_is_bayes_rule_on_densities(alpha_t, sigma_t, alpha_s, sigma_s, part):
    """q(x_s | x_t) q(x_t) = q(x_t | x_s) q(x_s) at every pair of points, y fixed."""
    y, d = 0.4, part * sigma_s

    def log_normal(x, mean, std):
        return -0.5 * ((x - mean) / std) ** 2 - math.log(std)

    back, ahead = (of(alpha_t, sigma_t, alpha_s, sigma_s, d) for of in (backward, forward))
    for x_t, x_s in ((0.0, 0.0), (1.3, -0.2), (-2.0, 0.9)):
        left = log_normal(x_s, back.y * y + back.x * x_t, back.z) + log_normal(x_t, alpha_t * y, sigma_t)
        right = log_normal(x_t, ahead.y * y + ahead.x * x_s, ahead.z) + log_normal(x_s, alpha_s * y, sigma_s)
        assert left == pytest.approx(right, rel=1e-10)


@pytest.mark.parametrize("alpha_t, sigma_t, alpha_s, sigma_s", SCALES)
def test_the_forward_conditional_of_the_ddpm_is_the_markov_chain_13_3(alpha_t, sigma_t, alpha_s, sigma_s):
    out = forward(alpha_t, sigma_t, alpha_s, sigma_s, ddpm_std(alpha_t, sigma_t, alpha_s, sigma_s))
    assert out.y == pytest.approx(0.0, abs=1e-12)
    assert out.x == pytest.approx(alpha_t / alpha_s, rel=1e-12)
    assert out.z**2 == pytest.approx(1 - (alpha_t / alpha_s) ** 2, rel=1e-12)


def test_the_forward_conditional_from_clean_data_is_equation_13_4():
    out = forward(0.6, 0.8, 1.0, 0.0, 0.3)
    assert (float(out.y), float(out.x), float(out.z)) == (0.6, 0.0, 0.8)


# Steps


@pytest.mark.parametrize("per_sample", [False, True])
def test_steps_are_the_written_out_formulas(per_sample):
    diffusion = small()
    a = np.append(1.0, diffusion.alphas_cumprod)
    std = np.sqrt(1 - a[:-1]) * np.linspace(0.3, 0.9, 10)
    std[0] = 0.05
    t = torch.tensor([1, 2, 5, 8, 9, 4]) if per_sample else 5
    state, x, z = torch.randn(3, *SHAPE, dtype=F64)
    k = (torch.as_tensor(t) + 1).reshape(-1, 1, 1)
    a_t, a_s = (torch.tensor(a, dtype=F64)[i] for i in (k, k - 1))
    d = torch.tensor(std, dtype=F64)[k - 1]
    e = (1 - a_s - d**2).sqrt()
    expected = a_s.sqrt() * x + e * (state - a_t.sqrt() * x) / (1 - a_t).sqrt() + d * z
    torch.testing.assert_close(diffusion.posterior_step(state, x, t, posterior_std=std, noise=z), expected)
    precision = 1 / (1 - a_t) + (e / d) ** 2 / (1 - a_t)
    mean = a_t.sqrt() * x + (e / (1 - a_t).sqrt() / d**2) * (state - a_s.sqrt() * x) / precision
    expected = mean + precision**-0.5 * z
    torch.testing.assert_close(diffusion.forward_step(state, x, t, posterior_std=std, noise=z), expected)


def test_first_step_is_the_gaussian_of_13_10_and_starts_from_the_data():
    diffusion = small()
    state, x, z = torch.randn(3, *SHAPE, dtype=F64)
    torch.testing.assert_close(diffusion.posterior_step(state, x, 0, sigma_1=0.2, noise=z), x + 0.2 * z)
    a = diffusion.alphas_cumprod[0]
    torch.testing.assert_close(diffusion.forward_step(x, x, 0, noise=z), math.sqrt(a) * x + math.sqrt(1 - a) * z)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_walking_forward_and_back_keeps_the_marginals(eta):
    """By the moments of 200,000 scalars, four standard errors."""
    diffusion, n = small(6), 200_000
    x = torch.full((n, 1), 0.8, dtype=F64)
    state = x
    for t in range(6):
        state = diffusion.forward_step(state, x, t, eta=eta, noise=gk.Noise(1, stream=t))
        check_moments(state, diffusion, t)
    for t in range(5, 0, -1):
        state = diffusion.posterior_step(state, x, t, eta=eta, noise=gk.Noise(2, stream=t))
        check_moments(state, diffusion, t - 1)


def check_moments(state, diffusion, t):
    a, n = diffusion.alphas_cumprod[t], len(state)
    assert float(state.mean()) == pytest.approx(0.8 * math.sqrt(a), abs=4 * math.sqrt((1 - a) / n))
    assert float(state.var()) == pytest.approx(1 - a, rel=4 * math.sqrt(2 / n))


def test_posterior_std_is_the_ddpms_with_sigma_1_given():
    diffusion = small()
    expected = np.sqrt(diffusion.posterior_variance(np.arange(1, 10)))
    np.testing.assert_allclose(diffusion.posterior_std(0.5)[1:], 0.5 * expected)
    assert diffusion.posterior_std()[0] == diffusion.posterior_std()[1]
    assert diffusion.posterior_std(sigma_1=0.03)[0] == 0.03


# Samplers


def rows(sampler, prediction="sample"):
    return [stage.out for stage in sampler.stages(OnPath(gk.Diffusion().path, prediction), GRID)]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_of_the_family(eta):
    path = gk.Diffusion().path
    alpha, sigma = path.alpha(GRID), path.sigma(GRID)
    std = eta * ddpm_std(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
    std[-1] = 0.02
    for one, other in zip(rows(NonMarkovian(std)), rows(DDIM(eta, final_sigma=0.02)), strict=True):
        for term in ("y", "x", "z"):
            assert getattr(one, term) == pytest.approx(getattr(other, term), rel=1e-9, abs=1e-12)


def test_any_sigma_keeps_the_marginals_along_the_sampler():
    path, std = gk.Diffusion().path, [0.9, 0.1, 0.07, 0.0, 0.7]
    for out, t, s, d in zip(rows(NonMarkovian(std)), GRID[:-1], GRID[1:], std, strict=True):
        if s < 0:
            assert out == Out(y=1.0, z=0.7)
            continue
        assert out.y + out.x * path.alpha(t) == pytest.approx(path.alpha(s), abs=1e-12)
        assert (out.x * path.sigma(t)) ** 2 + out.z**2 == pytest.approx(path.sigma(s) ** 2, abs=1e-12)
        assert out.z == d


def test_fixed_large_has_the_chains_variance_and_the_posteriors_mean():
    a = np.append(gk.Diffusion().alphas_cumprod[GRID[:-1].astype(int)], 1.0)
    for k, (large, plain) in enumerate(zip(rows(DDPM(variance="fixed_large")), rows(DDPM()), strict=True)):
        assert (large.y, large.x) == (plain.y, plain.x)
        assert large.z**2 == pytest.approx(0.0 if k == 4 else 1 - a[k] / a[k + 1], abs=1e-12)


def test_fixed_small_is_exact_for_one_point_and_fixed_large_for_standard_normal_data():
    """A chain of the whole schedule, followed by the variance of a scalar; the data are y = 0, or y ~ N(0, 1)."""
    path, grid = gk.Diffusion().path, np.arange(999.0, -1.0, -1.0)
    for variance, exact in (("fixed_small", 0.0), ("fixed_large", 1.0)):
        v = path.alpha(999.0) ** 2 * exact + path.sigma(999.0) ** 2
        for stage, t, s in zip(
            DDPM(variance=variance).stages(OnPath(path, "sample"), grid), grid[:-1], grid[1:], strict=True
        ):
            # The perfect prediction of the data is 0 of the first, and alpha x of the second.
            gain = stage.out.x + stage.out.y * path.alpha(t) * exact
            v = gain**2 * v + stage.out.z**2
            assert v == pytest.approx(path.alpha(s) ** 2 * exact + path.sigma(s) ** 2, rel=1e-9)


def test_first_order_sde_solver_is_of_the_family():
    for one, other in zip(rows(DPMSolverSDE(1)), rows(DDPM()), strict=True):
        assert one.y == pytest.approx(other.y, rel=1e-9)


def test_samples_with_given_sigma_are_the_written_out_walk():
    diffusion, std = gk.Diffusion(), [0.3, 0.2, 0.1]
    times = [800, 400, 100]
    x, z = torch.randn(2, *SHAPE, dtype=F64)
    outputs = list(torch.randn(3, *SHAPE, dtype=F64))
    calls = iter(outputs)
    got = diffusion.sample(
        lambda x, t: next(calls), noise=x, timesteps=times, sampler=NonMarkovian(std), step_noise=lambda k: z, dtype=F64
    )
    a = np.append(diffusion.alphas_cumprod[times], 1.0)
    for k in range(3):
        f = (x - math.sqrt(1 - a[k]) * outputs[k]) / math.sqrt(a[k])
        x = f + std[2] * z if k == 2 else math.sqrt(a[k + 1]) * f + math.sqrt(1 - a[k + 1] - std[k] ** 2) * outputs[k]
        x = x if k == 2 else x + std[k] * z
    torch.testing.assert_close(got, x)


# Bad input


@pytest.mark.parametrize("make, words", [
    (lambda: NonMarkovian([-0.1]), "posterior_std: expected a finite number >= 0"),
    (lambda: NonMarkovian(0.1), r"posterior_std: expected one dimension, got shape \(\)"),
    (lambda: rows(NonMarkovian([0.1])), "posterior_std: expected 5 numbers, one a step, got 1"),
    (lambda: rows(NonMarkovian([1.0, 0, 0, 0, 0])), "posterior_std: expected at most sigma_s = 0.99.* got 1"),
    (lambda: DDPM(variance="learned"), "variance: expected one of 'fixed_small', 'fixed_large', got 'learned'"),
    (lambda: small().posterior_std(9.0), "eta: expected at most .* with this schedule, got 9"),
    (lambda: gk.Diffusion(betas=[0.1]).posterior_std(), "sigma_1: expected a number where T = 1, got None"),
    (lambda: small().forward_step(*torch.zeros(2, 3, 1), 10), "t: expected an integer from 0 to 9, got 10"),
    (lambda: small().posterior_step(*torch.zeros(2, 3, 1), torch.tensor([1])), r"t: expected int64 of shape \(3,\)"),
    (lambda: small().posterior_step(*torch.zeros(2, 3, 1), 1, posterior_std=[1.0]), r"expected shape \(10,\)"),
    (lambda: small().posterior_step(*torch.zeros(2, 3, 1), 1, posterior_std=[1.0] * 10), "at most .* at t = 1"),
    (lambda: small().posterior_step(*torch.zeros(2, 3, 1), 1, posterior_std=[0.0] * 10, eta=0.5), "eta, sigma_1: "),
])  # fmt: skip
def test_bad_argument_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_continuous_time_has_no_family():
    with pytest.raises(AttributeError, match="a diffusion of continuous time has no timesteps"):
        gk.Diffusion("continuous_vp").posterior_std()
