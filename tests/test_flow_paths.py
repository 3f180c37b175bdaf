"""Paths of flows: scales, derivatives and inverse noise levels; training on them; change of path after training."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from analytic import PathNetwork, gaussian, mixture
from torch import nn

import genkern as gk
from genkern import paths, samplers
from genkern.noise import Noise, Purpose

F64 = torch.float64
CUSTOM = paths.Custom(lambda t: torch.sin(0.5 * math.pi * t), lambda t: torch.cos(0.5 * math.pi * t))
PATHS = {
    "cond_ot": paths.CondOT(),
    "cosine": paths.Cosine(),
    "polynomial": paths.Polynomial(3.0),
    "line": paths.Polynomial(1.0),
    "custom": CUSTOM,
    "linear_vp": paths.Reversed(paths.LinearVP()),
    "cosine_vp": paths.Reversed(paths.CosineVP(-12.0, 12.0)),
    "ve": paths.Reversed(paths.VE(20.0)),
    "reversed": paths.Reversed(paths.Reversed(paths.Polynomial(2.0))),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@every_path
def test_derivatives_are_those_of_the_scales(path):
    h = 1e-6
    for t in (0.1, 0.37, 0.8):
        assert path.d_alpha(t) == pytest.approx((path.alpha(t + h) - path.alpha(t - h)) / (2 * h), abs=1e-7)
        assert path.d_sigma(t) == pytest.approx((path.sigma(t + h) - path.sigma(t - h)) / (2 * h), abs=1e-7)


@every_path
def test_scales_are_the_same_of_numbers_arrays_and_tensors(path):
    times = np.linspace(0.05, 0.95, 7)
    for of in (path.alpha, path.sigma, path.d_alpha, path.d_sigma):
        found = np.array([of(float(t)) for t in times])
        np.testing.assert_allclose(np.broadcast_to(of(times), 7), found, rtol=1e-14)
        tensor = torch.as_tensor(of(torch.from_numpy(times)), dtype=F64).expand(7)
        np.testing.assert_allclose(tensor, found, rtol=1e-12)
        assert isinstance(of(0.5), float)


@every_path
def test_time_of_a_noise_level_is_its_inverse(path):
    for t in (0.02, 0.3, 0.7, 0.97):
        assert path.time_at(path.sigma(t) / path.alpha(t)) == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize("name", ["cond_ot", "cosine", "polynomial", "custom"])
def test_ends_are_noise_and_data_alone(name):
    path = PATHS[name]
    np.testing.assert_allclose([path.alpha(0.0), path.sigma(0.0)], [0.0, 1.0], atol=1e-15)
    np.testing.assert_allclose([path.alpha(1.0), path.sigma(1.0)], [1.0, 0.0], atol=1e-15)
    assert path.time_at(math.inf) == pytest.approx(0.0, abs=1e-15)
    assert path.time_at(0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["cosine", "linear_vp", "cosine_vp", "custom"])
def test_variance_is_preserved(name):
    t = torch.linspace(0.0, 1.0, 11, dtype=F64)
    torch.testing.assert_close(PATHS[name].alpha(t) ** 2 + PATHS[name].sigma(t) ** 2, torch.ones(11, dtype=F64))


def test_cosine_is_spherical_interpolation_of_orthogonal_ends():
    x0, x1, t = torch.tensor([3.0, 0.0], dtype=F64), torch.tensor([0.0, 3.0], dtype=F64), 0.3
    angle = math.pi / 2
    slerp = (math.sin((1 - t) * angle) * x0 + math.sin(t * angle) * x1) / math.sin(angle)
    torch.testing.assert_close(paths.Cosine().alpha(t) * x1 + paths.Cosine().sigma(t) * x0, slerp)


def test_custom_functions_give_the_named_path():
    cosine, t = paths.Cosine(), torch.rand(9, dtype=F64, requires_grad=True)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(CUSTOM, name)(t), getattr(cosine, name)(t.detach()))
    constant = paths.Custom(lambda t: torch.ones_like(t), lambda t: t)
    assert (constant.d_alpha(0.3), constant.d_sigma(0.3)) == (0.0, 1.0)


@every_path
def test_every_prediction_gives_every_other(path):
    t = 0.4
    y, e = torch.randn(2, 4, 3, dtype=F64)
    x = path.alpha(t) * y + path.sigma(t) * e
    values = {}
    for prediction in paths.PREDICTIONS:
        c_y, c_e = path.composition(prediction, t)
        values[prediction] = c_y * y + c_e * e
    for source, target in itertools.product(paths.PREDICTIONS, paths.PREDICTIONS):
        torch.testing.assert_close(path.convert(values[source], x, t, source, target), values[target])


@every_path
def test_loss_on_a_path_is_the_written_out_formula(path, device):
    flow, model, noise = gk.FlowMatching(path), nn.Linear(5, 5, dtype=F64).to(device), Noise(2)
    x1 = torch.randn(6, 3, 5, dtype=F64, device=device)
    t = gk.ops.uniform((6,), noise=noise.at(Purpose.TIMES), dtype=F64, device=device)
    x0 = gk.ops.randn((6, 3, 5), noise=noise.at(Purpose.TRAINING), dtype=F64, device=device)
    alpha, sigma, d_alpha, d_sigma = (
        torch.as_tensor(of(t), dtype=F64, device=device).expand(6)[:, None, None]
        for of in (path.alpha, path.sigma, path.d_alpha, path.d_sigma)
    )
    seen = []
    got = flow.loss(lambda x, t: seen.append(x) or model(x), x1, noise=noise)
    torch.testing.assert_close(seen[0], alpha * x1 + sigma * x0)
    expected = (model(seen[0]) - (d_alpha * x1 + d_sigma * x0)).square().mean()
    torch.testing.assert_close(got, expected)


def test_drawn_times_stay_below_one_where_the_slope_is_infinite():
    def last(u):
        return torch.ones_like(u)

    flow, x = gk.FlowMatching("vp"), torch.randn(4, 3)
    assert torch.isfinite(flow.loss(lambda x, t: x, x, times=last))
    with pytest.raises(ValueError, match="x_coef|noise_coef|finite"):
        flow.loss(lambda x, t: x, x, t=1.0)


@pytest.mark.parametrize("name", ["cond_ot", "cosine", "polynomial", "cosine_vp", "ve"])
def test_flow_on_a_path_moves_its_noise_to_the_gaussian(name):
    path, mean, std = PATHS[name], 1.5, 0.4
    flow = gk.FlowMatching(path)
    network = PathNetwork(gaussian(mean, std), path, "velocity")
    start = {"seed": 3, "dtype": F64}
    z = gk.ops.randn((8, 2), noise=Noise(3).at(Purpose.INITIAL), dtype=F64)
    x = flow.sample(network, (8, 2), steps=300, sampler="heun" if name == "cosine_vp" else "midpoint", **start)
    # The quantile is kept: x_0 = sigma(0) z is deviate z' of N(alpha mean, alpha^2 std^2 + sigma^2).
    alpha, sigma = path.alpha(0.0), path.sigma(0.0)
    deviate = (sigma * z - alpha * mean) / math.sqrt(alpha**2 * std**2 + sigma**2)
    end = path.alpha(1.0) * mean + math.sqrt(path.alpha(1.0) ** 2 * std**2 + path.sigma(1.0) ** 2) * deviate
    torch.testing.assert_close(x, end, rtol=0, atol=2e-3)


CHANGES = [
    ("cond_ot", "cosine"), ("cond_ot", "polynomial"), ("cond_ot", "cosine_vp"), ("cond_ot", "ve"),
    ("cosine", "cond_ot"),
    ("polynomial", "cosine"), ("custom", "line"), ("reversed", "cond_ot"), ("cosine", "cosine"),
]  # fmt: skip


@pytest.mark.parametrize("trained, along", CHANGES)
@pytest.mark.parametrize("sampler", ["euler", "midpoint"])
def test_network_of_one_path_steps_along_another_like_that_paths_own_network(trained, along, sampler):
    trained, along = PATHS[trained], PATHS[along]
    # At the start of t^n, n > 1, the velocity is 0 and no data can be read off it.
    first = 0.1 if trained.d_alpha(0.0) == 0.0 else 0.0
    times = [first, 0.2, 0.5, 0.6, 0.9]
    x = along.sigma(0.0) * torch.randn(16, 2, dtype=F64)
    options = {"x0": x, "times": times, "sampler": sampler, "dtype": F64, "return_trajectory": True}
    own = gk.FlowMatching(along).sample(PathNetwork(mixture(), along, "velocity"), **options)
    changed = gk.FlowMatching(trained).sample(PathNetwork(mixture(), trained, "velocity"), along=along, **options)
    torch.testing.assert_close(changed, own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("along", ["cosine", "polynomial", "cond_ot"])
def test_samples_of_a_gaussian_along_any_path_are_the_exact_ones(along):
    flow, mean, std = gk.RectifiedFlow(), 1.5, 0.4
    network = PathNetwork(gaussian(mean, std), flow.path, "velocity")
    z = torch.randn(8, 2, dtype=F64)
    x = flow.sample(network, x0=z, along=PATHS[along], steps=60, sampler="rk4", dtype=F64)
    torch.testing.assert_close(x, mean + std * z, rtol=0, atol=1e-5)


def test_change_of_path_takes_every_sampler_and_option_of_the_loop():
    path, data = paths.Reversed(paths.CosineVP(-12.0, 12.0)), mixture()
    network = PathNetwork(data, paths.CondOT(), "velocity")
    own = PathNetwork(data, path, "velocity")
    for sampler in (samplers.DDIM(), samplers.DPMSolver(2), samplers.Heun()):
        options = {"steps": 12, "sampler": sampler, "seed": 2, "dtype": F64, "batch_size": 5}
        got = gk.RectifiedFlow().sample(network, (8, 2), along=path, **options)
        torch.testing.assert_close(got, gk.FlowMatching(path).sample(own, (8, 2), **options), rtol=1e-6, atol=1e-6)


def test_captured_loops_tell_the_paths_apart(captures):
    flow, model = gk.RectifiedFlow(), nn.Linear(4, 4).eval()

    def network(x, t):
        return model(x).sin() + t[:, None]

    for along in (None, paths.Cosine(), paths.Polynomial(2.0), None, paths.Cosine()):
        wanted = flow.sample(network, (5, 4), steps=4, seed=1, along=along)
        assert torch.equal(flow.sample(network, (5, 4), steps=4, seed=1, along=along, cuda_graph=True), wanted)
    assert captures


@pytest.mark.parametrize("make, error, words", [
    (lambda: gk.FlowMatching(paths.LinearVP()), ValueError, "path: expected noise at t = 0 and data at t = 1"),
    (lambda: gk.FlowMatching(paths.VE(5.0)), ValueError, "path: expected a path on t from 0 to 1, got"),
    (lambda: gk.FlowMatching(3), TypeError, "path: expected a path, got int"),
    (lambda: gk.FlowMatching("cosine", sigma_min=0.1), ValueError, "sigma_min: expected 0 with another path"),
    (lambda: paths.Polynomial(0.5), ValueError, "n: expected a finite number >= 1, got 0.5"),
    (lambda: paths.Reversed(paths.VE()), ValueError, "path: expected finite ends in t"),
    (lambda: paths.Reversed("vp"), TypeError, "path: expected a path with continuous times, got str"),
    (lambda: paths.Custom(1.0, torch.cos), TypeError, "alpha: expected a callable"),
    (lambda: paths.Custom(torch.sin, torch.cos, 1.0, 0.0), ValueError, "start, stop: expected start < stop"),
    (lambda: paths.Custom(lambda t: 1.0, torch.cos).alpha(0.3), TypeError, "alpha: expected a tensor from"),
    (lambda: paths.Custom(lambda t: t, torch.cos).time_at(-1.0), ValueError, "noise_level: expected sigma / alpha"),
    (lambda: paths.Cosine().alpha(1.1), ValueError, "t: expected a number from 0 to 1"),
    (lambda: gk.FlowMatching(sigma_min=0.1).sample(lambda x, t: x, (2, 2), along=paths.Cosine()), ValueError,
     "along: expected noise levels sigma / alpha that the network's path has"),
    (lambda: gk.FlowMatching().sample(lambda x, t: x, (2, 2), along="cosine"), TypeError, "along: expected a path"),
])  # fmt: skip
def test_bad_argument_of_a_path_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
