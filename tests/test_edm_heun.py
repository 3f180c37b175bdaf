"""Heun on noise levels with churn: EDM's algorithm 2, its order, its moments, its rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from analytic import DenoiserNetwork, PathNetwork, gaussian, mixture
from test_solvers import even_grid

import genkern as gk
from genkern import paths
from genkern.noise import Noise, Purpose
from genkern.rows import Out
from genkern.samplers import DDIM, EDMHeun, Heun, OnPath, Preconditioned

F64 = torch.float64
VP = paths.LinearVP()


def algorithm_2(denoise, x, levels, noise, s_churn, s_min, s_max, s_noise):
    """arXiv:2206.00364, algorithm 2, line by line: sigma(t) = t, s(t) = 1."""
    n = len(levels) - 1
    for i in range(n):
        t, t_next = levels[i], levels[i + 1]
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * s_noise * noise[i]
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next != 0:
            d_next = (x - denoise(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (0.5 * d + 0.5 * d_next)
    return x


@pytest.mark.parametrize("options", [
    (0.0, 0.0, math.inf, 1.0), (5.0, 0.0, math.inf, 1.0), (40.0, 0.05, 50.0, 1.003), (1e6, 0.0, 10.0, 0.9),
])  # fmt: skip
@pytest.mark.parametrize("to_zero", [True, False])
def test_it_is_algorithm_2(options, to_zero):
    consistency, data, seed = gk.Consistency(), mixture(), Noise(4)
    x = 80.0 * torch.randn(8, 2, dtype=F64)
    levels = np.append(consistency.times(7)[::-1], 0.0) if to_zero else consistency.times(8)[::-1]
    noise = [gk.ops.randn((8, 2), noise=seed.at(Purpose.CHURN), dtype=F64)]
    noise += [gk.ops.randn((8, 2), noise=seed.at(Purpose.STEP, k), dtype=F64) for k in range(6)]
    expected = algorithm_2(lambda x, s: data.data(x, 1.0, s), x, levels, noise, *options)
    got = consistency.sample_ode(
        DenoiserNetwork(data), noise=x, times=levels, sampler=EDMHeun(*options), seed=4, dtype=F64
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_without_churn_on_the_exploding_path_it_is_heuns_method():
    grid, network = np.array([80.0, 20.0, 3.0, 0.1, 0.0]), Preconditioned()
    for one, other in zip(EDMHeun().stages(network, grid), Heun().stages(network, grid), strict=True):
        pred = one.pred
        assert (one.model_time, one.input_scale, one.step, one.time) == (
            other.model_time, other.input_scale, other.step, other.time,
        )  # fmt: skip
        assert one.out.x + one.out.y * pred.x == pytest.approx(other.out.x, rel=1e-9, abs=1e-12)
        assert one.out.y * pred.m == pytest.approx(other.out.m, rel=1e-9, abs=1e-12)
        assert one.out.h == pytest.approx(other.out.h)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_order_two_on_a_mixture_along_a_variance_preserving_path(prediction):
    network, data = OnPath(VP, prediction), PathNetwork(mixture(), VP, prediction)
    z = torch.randn(16, 2, dtype=F64, generator=torch.Generator().manual_seed(0))

    def run(n):
        stages = EDMHeun().stages(network, even_grid(VP, 1.0, 0.02, n))
        return gk.samplers.run(data, stages, None, start=z, dtype=F64)

    coarse, middle, fine = (run(n) for n in (64, 128, 256))
    assert math.log2((coarse - middle).norm() / (middle - fine).norm()) == pytest.approx(2, abs=0.15)


def test_weak_order_two_with_churn_on_gaussian_data():
    """The perfect network of N(0, std^2) is linear: the covariance of (state, the one before) follows from the rows."""
    std, consistency = 0.5, gk.Consistency(0.05, 80.0)

    def variance(n):
        grid = consistency.times(n + 1)[::-1]
        table = EDMHeun(s_churn=10.0, s_max=50.0).stages(Preconditioned(), grid)
        cov, t = np.zeros((2, 2)), grid[0]
        cov[0, 0] = std**2 + t**2
        for stage in table:
            s = math.exp(4.0 * stage.model_time)
            y = std**2 / (std**2 + s**2)
            new = np.array([[stage.out.y * y + stage.out.x, sum(stage.out.h)], [1.0, 0.0]])
            cov = new @ cov @ new.T
            cov[0, 0] += stage.out.z**2
        return cov[0, 0]

    exact = std**2 + 0.05**2
    errors = [abs(variance(n) - exact) for n in (100, 200, 400)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("sampler", [EDMHeun(), EDMHeun(s_churn=20.0)])
def test_samples_have_the_moments_of_the_mixture(sampler):
    diffusion, data, n = gk.Diffusion(), mixture(), 5_000
    x = diffusion.sample(
        PathNetwork(data, diffusion.path, "epsilon"), (n, 2), steps=40, sampler=sampler, seed=0, dtype=F64
    )
    weights = data.weights[:, None]
    mean = (weights * data.means).sum(0)
    second = (weights * (data.means**2 + data.stds[:, None] ** 2)).sum(0)
    error = 4 * float((second - mean**2).max().sqrt()) / math.sqrt(n)  # four standard errors
    assert (x.mean(0) - mean).abs().max() < 0.02 + error
    assert (x.square().mean(0) - second).abs().max() < 0.04 + 4 * error


def test_churn_raises_the_noise_level_and_keeps_the_marginals():
    """A state of the path's marginal is one at the churned level, with S_noise = 1: data scale and noise variance."""
    path = gk.Diffusion().path
    grid = np.array([900.0, 500.0, 100.0, -1.0])
    table = EDMHeun(s_churn=1.0).stages(OnPath(path, "sample", round_times=False), grid)
    t = table[0].model_time
    assert t > 900.0
    assert table[0].before.x * path.alpha(900) == pytest.approx(path.alpha(t), rel=1e-12)
    variance = (table[0].before.x * path.sigma(900)) ** 2 + table[0].before.z ** 2
    assert variance == pytest.approx(path.sigma(t) ** 2, rel=1e-12)
    assert path.noise_level(t) == pytest.approx(path.noise_level(900) * (1 + 1 / 3), rel=1e-9)
    assert [stage.time for stage in table] == [None, table[2].model_time, None, table[4].model_time, -1.0]
    assert table[4].out.z == 0.0


def test_the_initial_noise_has_the_churned_deviation():
    consistency = gk.Consistency()
    _, trajectory = consistency.sample_ode(
        lambda x, t: x, (3, 2), steps=4, sampler=EDMHeun(s_churn=100.0), noise=Noise(1), return_trajectory=True
    )
    z = gk.ops.randn((3, 2), noise=Noise(1).at(Purpose.INITIAL))
    torch.testing.assert_close(trajectory[0], 80.0 * math.sqrt(2.0) * z)


def test_it_stays_on_the_path_and_leaves_its_ends_by_single_steps():
    diffusion = gk.Diffusion(prediction="v", rescale_zero_snr=True)
    network = OnPath(diffusion.path, "v", round_times=True)
    table = EDMHeun(s_churn=100.0).stages(network, np.array([999.0, 998.0, 500.0, -1.0]))
    assert [stage.model_time for stage in table][0] == 999.0
    assert max(stage.model_time for stage in table[1:]) <= 998.0
    assert table[0].out == DDIM().stages(network, np.array([999.0, 998.0]))[0].out
    assert table[-1].out == Out(y=1.0)
    x = diffusion.sample(lambda x, t: 0.1 * x, (2, 3), steps=6, sampler=EDMHeun(s_churn=3.0), seed=0)
    assert x.isfinite().all()


@pytest.mark.parametrize("path", [paths.CondOT(0.1), paths.VE(), paths.LinearVP(), gk.Diffusion().path])
def test_the_time_of_a_noise_level_is_found_again(path):
    for level in (0.2, 1.0, 7.0):
        assert path.noise_level(path.time_at(level)) == pytest.approx(level, rel=1e-9)


def test_a_flow_is_sampled_with_churn_to_the_mean_of_the_mixture():
    flow, data, n = gk.RectifiedFlow(), mixture(), 5_000
    network = PathNetwork(data, flow.path, "velocity")
    levels = gk.grids.karras(30, 0.01, 30.0)[::-1]
    times = [*flow.path.time_at(levels), 1.0]
    start = float(flow.path.sigma(times[0])) * torch.randn(n, 2, dtype=F64)  # the data's part, 3%, is left out
    x = flow.sample(network, x0=start, times=times, sampler=EDMHeun(s_churn=10.0), seed=0, dtype=F64)
    weights = data.weights[:, None]
    mean = (weights * data.means).sum(0)
    variance = (weights * (data.means**2 + data.stds[:, None] ** 2)).sum(0) - mean**2
    assert ((x.mean(0) - mean).abs() < 0.03 + 4 * (variance / n).sqrt()).all()  # four standard errors
    plain = flow.sample(network, x0=start, times=times, sampler=EDMHeun(), seed=0, dtype=F64)
    assert (x - plain).abs().mean() > 0.1


def test_network_calls_and_batches():
    calls = []
    diffusion = gk.Diffusion()

    def model(x, t):
        calls.append(len(x))
        return torch.sin(x)

    whole = diffusion.sample(model, (5, 3), steps=4, sampler=EDMHeun(s_churn=2.0), seed=3)
    assert calls == [5] * 7
    for batch_size in (2, 3):
        split = diffusion.sample(model, (5, 3), steps=4, sampler=EDMHeun(s_churn=2.0), seed=3, batch_size=batch_size)
        assert torch.equal(split, whole)
    named = diffusion.sample(model, (5, 3), steps=4, sampler="heun", seed=3)
    assert torch.equal(named, diffusion.sample(model, (5, 3), steps=4, sampler=EDMHeun(), seed=3))


def test_predicted_data_are_clamped():
    x = gk.Diffusion().sample(lambda x, t: 3 * x, (5, 3), steps=5, seed=0, clip=0.5, sampler="heun")
    assert x.abs().max() <= 0.5


def test_prediction_of_a_gaussian_follows_the_quantile():
    diffusion, std = gk.Diffusion(), 0.5
    x = torch.randn(16, 2, dtype=F64)
    end = diffusion.sample(
        PathNetwork(gaussian(0.0, std), diffusion.path, "epsilon"), noise=x, steps=200, sampler="heun", dtype=F64
    )
    a = diffusion.alphas_cumprod[-1]
    torch.testing.assert_close(end, x * std / math.sqrt(a * std**2 + 1 - a), rtol=5e-3, atol=0)


@pytest.mark.parametrize("options, words", [
    ({"s_churn": -1.0}, "s_churn: expected a finite number >= 0"),
    ({"s_min": 2.0, "s_max": 1.0}, "s_max: expected a finite number >= 2"),
    ({"s_noise": -1.0}, "s_noise: expected a finite number >= 0"),
])  # fmt: skip
def test_bad_option_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        EDMHeun(**options)
