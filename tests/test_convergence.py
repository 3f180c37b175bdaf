"""Orders of convergence of the samplers with perfect networks of Gaussian mixtures, and their closed forms; float64.

The order is read off three runs, each with twice the steps of the one before:
log2(|x_h - x_{h/2}| / |x_{h/2} - x_{h/4}|).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from analytic import DenoiserNetwork, PathNetwork, gaussian, mixture

import genkern as gk
from genkern import paths

F64 = torch.float64
OPTIONS = {"dtype": F64, "seed": 0}
SHAPE = (32, 2)
FLOW_ORDERS = [("euler", 1), ("ab2", 2), ("midpoint", 2), ("heun", 2), ("rk4", 4)]


def observed_order(run, steps):
    coarse, middle, fine = (run(steps * k) for k in (1, 2, 4))
    return math.log2((coarse - middle).norm() / (middle - fine).norm())


@pytest.mark.parametrize("sampler, order", FLOW_ORDERS)
@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_order_of_flow_samplers_on_a_mixture(sampler, order, sigma_min):
    flow = gk.FlowMatching(sigma_min=sigma_min)
    network = PathNetwork(mixture(), flow.path, "velocity")
    found = observed_order(lambda n: flow.sample(network, SHAPE, steps=n, sampler=sampler, **OPTIONS), 32)
    assert found == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("sampler, order", FLOW_ORDERS)
def test_order_of_backward_flow_samplers_on_a_mixture(sampler, order):
    flow = gk.RectifiedFlow()
    network = PathNetwork(mixture(), flow.path, "velocity")
    x1 = mixture().sample(32, seed=1)
    found = observed_order(
        lambda n: flow.sample(network, x1=x1, direction="backward", steps=n, sampler=sampler, dtype=F64), 32
    )
    assert found == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("sampler, order", FLOW_ORDERS)
def test_order_on_the_karras_grid_without_the_final_zero(sampler, order):
    consistency = gk.Consistency()
    network = DenoiserNetwork(mixture())
    found = observed_order(lambda n: consistency.sample_ode(network, SHAPE, steps=n, sampler=sampler, **OPTIONS), 64)
    assert found == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_order_of_ddim_on_a_mixture(prediction):
    diffusion = gk.Diffusion(timesteps=8192, prediction=prediction)
    network = PathNetwork(mixture(), diffusion.path, prediction)
    found = observed_order(lambda n: diffusion.sample(network, SHAPE, steps=n, **OPTIONS), 128)
    assert found == pytest.approx(1, abs=0.15)


def test_flow_of_a_gaussian_is_its_affine_map():
    flow, mean, std = gk.RectifiedFlow(), 1.5, 0.4
    network = PathNetwork(gaussian(mean, std), flow.path, "velocity")
    z = torch.randn(SHAPE, dtype=F64)
    x = flow.sample(network, x0=z, steps=400, sampler="heun", dtype=F64)
    torch.testing.assert_close(x, mean + std * z, rtol=0, atol=1e-4)


def test_velocity_network_of_a_gaussian_is_the_closed_form():
    mean, std, t = 1.5, 0.4, 0.3
    x = torch.randn(SHAPE, dtype=F64)
    expected = mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2) * (x - t * mean)
    network = PathNetwork(gaussian(mean, std), paths.CondOT(), "velocity")
    torch.testing.assert_close(gk.RectifiedFlow().velocity(network, x, t), expected)


def test_probability_flow_of_a_gaussian_scales_by_its_deviations():
    consistency, std = gk.Consistency(), 0.5
    network = DenoiserNetwork(gaussian(0.0, std), sigma_data=0.5)
    x = 80.0 * torch.randn(SHAPE, dtype=F64)
    end = consistency.sample_ode(network, noise=x, steps=200, sampler="heun", dtype=F64)
    expected = x * math.sqrt((std**2 + 0.002**2) / (std**2 + 80.0**2))
    torch.testing.assert_close(end, expected, rtol=1e-3, atol=0)


def test_ddim_of_a_gaussian_keeps_the_quantile():
    diffusion, std = gk.Diffusion(timesteps=4000), 0.5
    network = PathNetwork(gaussian(0.0, std), diffusion.path, "epsilon")
    x = torch.randn(SHAPE, dtype=F64)
    end = diffusion.sample(network, noise=x, steps=4000, dtype=F64)
    abar = diffusion.alphas_cumprod[-1]
    expected = x * std / math.sqrt(abar * std**2 + 1 - abar)
    torch.testing.assert_close(end, expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("sampler, at_most", [("ddim", 0.02), ("ddpm", 0.04)])
def test_samples_have_the_moments_of_the_mixture(sampler, at_most):
    diffusion, data, n = gk.Diffusion(timesteps=1000), mixture(), 20_000
    network = PathNetwork(data, diffusion.path, "epsilon")
    x = diffusion.sample(network, (n, 2), steps=100, sampler=sampler, **OPTIONS)
    weights = data.weights[:, None]
    mean = (weights * data.means).sum(0)
    second = (weights * (data.means**2 + data.stds[:, None] ** 2)).sum(0)
    # Beside the sampler's bias, four standard errors of a mean over n draws.
    error = 4 * float((second - mean**2).max().sqrt()) / math.sqrt(n)
    assert (x.mean(0) - mean).abs().max() < at_most + error
    assert (x.square().mean(0) - second).abs().max() < 2 * at_most + 4 * error


def test_state_in_float32_follows_the_one_in_float64_over_many_steps():
    flow = gk.FlowMatching()
    network = PathNetwork(mixture(), flow.path, "velocity")
    z = torch.randn(SHAPE)
    single = flow.sample(network, x0=z, steps=500)
    double = flow.sample(network, x0=z, steps=500, dtype=F64)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, double, rtol=0, atol=5e-5)
