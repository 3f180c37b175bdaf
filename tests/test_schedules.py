"""Schedules of discrete and continuous time, what Diffusion makes of them, and the grids of noise levels on them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from analytic import PathNetwork, mixture

import genkern as gk
from genkern import grids, paths
from genkern.noise import Noise, Purpose

F64 = torch.float64
SHAPE = (6, 3, 5)
CONTINUOUS = {
    "linear": paths.LinearVP(),
    "shifted": paths.LinearVP(0.3, 12.0, shift=2.5),
    "cosine": paths.CosineVP(),
    "bounded": paths.CosineVP(-6.0, 9.0, shift=0.5),
}


def network(x, t):
    return torch.tanh(x + 0.1 * torch.sin(t.to(x.dtype)).reshape(-1, 1, 1))


# Discrete time


def test_sigmoid_betas_are_even_in_the_argument_of_the_sigmoid():
    found = (paths.betas("sigmoid", 1000, 1e-4, 0.02) - 1e-4) / (0.02 - 1e-4)
    np.testing.assert_allclose(np.log(found / (1 - found)), np.linspace(-6, 6, 1000), atol=1e-9)


def test_laplace_schedule_has_the_log_snr_of_a_laplace_distribution():
    abar = paths.alphas_cumprod_of(paths.betas("laplace", 200))[:-1]  # the last beta is capped
    log_snr, u = np.log(abar / (1 - abar)), np.arange(1, 200) / 200
    below = 0.5 * np.exp(-np.abs(log_snr) / 0.5)  # of Laplace(0, 1/2): the tail beyond |log SNR|
    np.testing.assert_allclose(np.where(log_snr > 0, below, 1 - below), u, atol=1e-9)


@pytest.mark.parametrize("schedule", paths.SCHEDULES)
def test_rescaled_schedule_keeps_its_start_and_ends_without_signal(schedule):
    before = gk.Diffusion(schedule).alphas_cumprod
    after = gk.Diffusion(schedule, prediction="v", rescale_zero_snr=True).alphas_cumprod
    assert after[-1] == 0.0
    assert after[0] == pytest.approx(before[0], rel=1e-12)
    # The square roots are an affine function of the former ones.
    slope = np.diff(np.sqrt(after)) / np.diff(np.sqrt(before))
    np.testing.assert_allclose(slope, slope[0], rtol=1e-6)


@pytest.mark.parametrize("prediction", ["v", "sample"])
@pytest.mark.parametrize("spacing", [*grids.SPACINGS, *grids.NOISE_LEVELS])
def test_schedule_without_signal_at_its_end_is_sampled_in_every_spacing(prediction, spacing):
    diffusion = gk.Diffusion(prediction=prediction, rescale_zero_snr=True)
    seen = []

    def model(x, t):
        seen.append(int(t[0]))
        return 0.1 * x

    x = diffusion.sample(model, SHAPE, steps=6, spacing=spacing, seed=0)
    assert x.isfinite().all()
    assert spacing == "leading" or seen[0] == 999


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shift_multiplies_the_noise_levels(shift):
    t = np.arange(1000)
    plain, shifted = gk.Diffusion().path, gk.Diffusion(shift=shift).path
    np.testing.assert_allclose(shifted.noise_level(t), shift * plain.noise_level(t), rtol=1e-10)


def test_between_timesteps_the_log_noise_level_is_linear_and_variance_preserved():
    path = gk.Diffusion().path
    t = np.array([0.25, 400.5, 998.9])
    low, high = np.log(path.noise_level(np.floor(t))), np.log(path.noise_level(np.floor(t) + 1))
    np.testing.assert_allclose(np.log(path.noise_level(t)), low + (t % 1) * (high - low), rtol=1e-12)
    np.testing.assert_allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, 1.0, rtol=1e-14)
    np.testing.assert_allclose(path.time_at(path.noise_level(t)), t, rtol=1e-10)
    np.testing.assert_array_equal(path.alpha(np.array([-1.0, 0.0, 999.0])), path.alpha(np.array([-1, 0, 999])))


@pytest.mark.parametrize("t", [-0.5, 998.5])
def test_times_beside_an_end_without_a_noise_level_are_refused(t):
    path = gk.Diffusion(prediction="v", rescale_zero_snr=True).path
    with pytest.raises(ValueError, match="t: expected an integer, or a number from 0 to 998"):
        path.alpha(t)


@pytest.mark.parametrize("level", [0.009, 200.0, math.nan, 0.0, -1.0])
def test_noise_levels_outside_the_schedule_are_refused(level):
    with pytest.raises(ValueError, match=r"sigmas: expected noise levels sigma / alpha from 0\.01"):
        gk.Diffusion().path.time_at(level)


# Continuous time


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_paths_preserve_variance_and_have_their_derivatives(name):
    path, t, h = CONTINUOUS[name], np.array([0.01, 0.3, 0.7, 0.99]), 1e-6
    np.testing.assert_allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, 1.0, rtol=1e-14)
    for scale, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        np.testing.assert_allclose(derivative(t), (scale(t + h) - scale(t - h)) / (2 * h), atol=1e-6)
    np.testing.assert_allclose(path.time_at(path.noise_level(t)), t, rtol=1e-10)
    tensor = path.alpha(torch.as_tensor(t))
    np.testing.assert_allclose(tensor.numpy(), path.alpha(t), rtol=1e-14)
    assert path.alpha(0.3) == pytest.approx(path.alpha(t)[1], rel=1e-15)


def test_linear_path_is_the_limit_of_the_discrete_schedule():
    path, t = paths.LinearVP(0.1, 20.0), np.arange(10, 100_000, 999)
    discrete = gk.Diffusion(timesteps=100_000, beta_start=0.1 / 1e5, beta_end=20.0 / 1e5).path
    np.testing.assert_allclose(path.alpha((t + 1) / 1e5), discrete.alpha(t), rtol=2e-3)


def test_linear_path_begins_with_clean_data():
    path = paths.LinearVP()
    assert (path.alpha(0.0), path.sigma(0.0)) == (1.0, 0.0)
    assert path.alpha(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_cosine_path_has_its_log_snr_at_the_ends_and_is_shifted_by_the_resolution():
    path, shifted = paths.CosineVP(-15.0, 12.0), paths.CosineVP(-15.0, 12.0, shift=256 / 64)
    for t, log_snr in ((0.0, 12.0), (1.0, -15.0)):
        assert math.log(path.snr(t)) == pytest.approx(log_snr, rel=1e-9)
        assert math.log(shifted.snr(t)) == pytest.approx(log_snr + 2 * math.log(64 / 256), rel=1e-9)
    wide = paths.CosineVP(-60.0, 60.0)
    assert wide.alpha(0.3) == pytest.approx(math.cos(0.3 * math.pi / 2), rel=1e-9)


@pytest.mark.parametrize("schedule", ["continuous_vp", "cosine_log_snr", CONTINUOUS["bounded"]])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "score"])
def test_loss_in_continuous_time_is_the_written_out_formula(schedule, prediction):
    diffusion, x, noise = gk.Diffusion(schedule, prediction=prediction), torch.randn(SHAPE, dtype=F64), Noise(3)
    t = torch.linspace(0.05, 1.0, 6, dtype=F64)
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64)
    alpha, sigma = (f(t).reshape(-1, 1, 1) for f in (diffusion.path.alpha, diffusion.path.sigma))
    m = network(alpha * x + sigma * z, t)
    residual = {
        "epsilon": m - z, "v": m - (alpha * z - sigma * x), "sample": m - x, "score": sigma * (m + z / sigma)
    }  # fmt: skip
    expected = residual[prediction].square().mean()
    torch.testing.assert_close(diffusion.loss(network, x, t=t, noise=noise), expected)


def test_times_of_continuous_training_are_uniform():
    seen = []
    gk.Diffusion("continuous_vp").loss(lambda x, t: seen.append(t) or x, torch.zeros(20_000, 1), noise=Noise(1))
    t = np.sort(seen[0].double().numpy())
    distance = np.abs(t - (np.arange(20_000) + 0.5) / 20_000).max()
    assert distance < 1.63 / math.sqrt(20_000)  # Kolmogorov-Smirnov at 1%


def test_score_loss_is_the_epsilon_loss_of_the_same_network():
    x, noise, t = torch.randn(SHAPE, dtype=F64), Noise(3), torch.arange(6) * 150
    epsilon, score = gk.Diffusion(), gk.Diffusion(prediction="score")
    sigma = torch.as_tensor(epsilon.path.sigma(t.numpy())).reshape(-1, 1, 1)
    got = score.loss(lambda x, t: -network(x, t) / sigma, x, t=t, noise=noise)
    torch.testing.assert_close(got, epsilon.loss(network, x, t=t, noise=noise))


@pytest.mark.parametrize("schedule", ["linear", "continuous_vp", "cosine_log_snr"])
@pytest.mark.parametrize("prediction", ["v", "sample", "score"])
def test_every_prediction_of_the_perfect_network_gives_the_same_samples(schedule, prediction):
    class Score(PathNetwork):
        def __call__(self, x, t):
            return super().__call__(x, t) / (-self.path.sigma(t[0].item()) if prediction == "score" else 1.0)

    def run(of):
        diffusion = gk.Diffusion(schedule, prediction=of)
        model = Score(mixture(), diffusion.path, of) if of != "score" else Score(mixture(), diffusion.path, "epsilon")
        if of == "epsilon":
            model = PathNetwork(mixture(), diffusion.path, of)
        return diffusion.sample(model, (32, 2), steps=20, eta=0.5, seed=0, dtype=F64)

    torch.testing.assert_close(run(prediction), run("epsilon"), rtol=1e-7, atol=1e-7)


# Grids of noise levels


@pytest.mark.parametrize("rho", [1.0, 2.5])
def test_polyexponential_is_a_power_of_a_ramp_in_the_logarithm(rho):
    found = grids.polyexponential(9, 0.01, 50.0, rho)
    ramp = np.log(found / 0.01) / np.log(50.0 / 0.01)
    np.testing.assert_allclose(ramp, (np.arange(9) / 8) ** rho, atol=1e-12)
    np.testing.assert_allclose(np.diff(np.log(grids.exponential(5))), np.log(80.0 / 0.002) / 4, rtol=1e-12)


def test_beta_grid_holds_the_quantiles_of_its_distribution():
    stats = pytest.importorskip("scipy.stats")
    found = grids.beta(11, 0.1, 10.0, 0.6, 0.8)
    np.testing.assert_allclose(stats.beta.cdf((found - 0.1) / 9.9, 0.6, 0.8), np.arange(11) / 10, atol=1e-12)


@pytest.mark.parametrize("kind", grids.NOISE_LEVELS)
def test_bad_noise_levels_are_refused(kind):
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        grids.noise_levels(kind, 4, 2.0, 1.0)
    with pytest.raises(ValueError, match="steps: expected an integer >= 1"):
        grids.noise_levels(kind, 0, 1.0, 2.0)
    with pytest.raises(ValueError, match="spacing"):
        grids.noise_levels("linear", 4, 1.0, 2.0)
    for name in {"polyexponential": ("rho",), "beta": ("a", "b")}.get(kind, ()):
        with pytest.raises(ValueError, match=f"{name}: expected a number > 0"):
            getattr(grids, kind)(4, 1.0, 2.0, **{name: 0.0})


@pytest.mark.parametrize("schedule", ["linear", "squared_cosine", "continuous_vp"])
@pytest.mark.parametrize("kind", grids.NOISE_LEVELS)
def test_network_is_called_at_the_noise_levels_of_the_grid(schedule, kind):
    diffusion, times = gk.Diffusion(schedule), []

    def model(x, t):
        times.append(t)
        return x

    diffusion.sample(model, SHAPE, steps=7, spacing=kind, round_times=False)
    path = diffusion.path
    low = path.noise_level(0) if diffusion.discrete else path.noise_level(1e-3)
    levels = grids.noise_levels(kind, 7, low, path.noise_level(path.stop))
    assert {t.dtype for t in times} == {torch.float32}
    exact = path.time_at(levels)
    np.testing.assert_allclose([float(t[0]) for t in times], exact, rtol=1e-6, atol=1e-6)
    if diffusion.discrete:
        times.clear()
        diffusion.sample(model, SHAPE, steps=7, spacing=kind)
        assert {t.dtype for t in times} == {torch.int64}
        assert [int(t[0]) for t in times] == [round(t) for t in exact]


def test_given_noise_levels_are_stepped_through_exactly():
    diffusion = gk.Diffusion()
    x, eps = torch.randn(2, *SHAPE, dtype=F64)
    _, trajectory = diffusion.sample(
        lambda x, t: eps, noise=x, sigmas=[30.0, 1.7, 0.2], dtype=F64, return_trajectory=True
    )
    # With a constant epsilon x / alpha moves along eps with the noise level.
    u = x * math.sqrt(1 + 30.0**2)
    for state, level in zip(trajectory, (30.0, 1.7, 0.2, 0.0), strict=True):
        torch.testing.assert_close(state * math.sqrt(1 + level**2), u + (level - 30.0) * eps)


def test_one_step_of_a_grid_of_noise_levels_is_from_the_highest():
    seen = []
    gk.Diffusion().sample(lambda x, t: seen.append(int(t[0])) or x, SHAPE, steps=1, spacing="karras")
    assert seen == [999]


# Bad input


@pytest.mark.parametrize("options, error, words", [
    ({"shift": 0.0}, ValueError, "shift: expected a number > 0, got 0.0"),
    ({"schedule": "continuous_vp", "shift": -1.0}, ValueError, "shift: expected a number > 0"),
    ({"schedule": CONTINUOUS["linear"], "shift": 2.0}, ValueError, "shift: expected 1 with a given path"),
    ({"schedule": "laplace", "beta_start": 0.1}, ValueError, "beta_start, beta_end: expected None with .*'laplace'"),
    ({"schedule": "cosine_log_snr", "beta_end": 0.1}, ValueError, "beta_start, beta_end: expected None"),
    ({"schedule": "continuous_vp", "beta_start": 0.0}, ValueError, "beta_min, beta_max: expected 0 < beta_min"),
    ({"schedule": "continuous_vp", "rescale_zero_snr": True}, ValueError, "expected a schedule of discrete time"),
    ({"rescale_zero_snr": True}, ValueError, "prediction: expected 'v' or 'sample' .* got 'epsilon'"),
    ({"rescale_zero_snr": True, "prediction": "score"}, ValueError, "prediction: expected 'v' or 'sample'"),
    ({"rescale_zero_snr": True, "betas": [0.1], "prediction": "v"}, ValueError, "expected a decreasing sequence"),
])  # fmt: skip
def test_bad_argument_of_the_method_is_named(options, error, words):
    with pytest.raises(error, match=words):
        gk.Diffusion(**options)


@pytest.mark.parametrize("schedule, options, words", [
    ("linear", {"sigmas": [1.0, 2.0]}, "sigmas: expected strictly"),
    ("linear", {"sigmas": [1.0, 0.0]}, "sigmas: expected strictly"),
    ("linear", {"sigmas": [1e3]}, "sigmas: expected noise levels"),
    ("continuous_vp", {"sigmas": [1e9]}, "sigmas: expected a number from 0 to 1"),
    ("linear", {"sigmas": [1.0], "steps": 3}, "steps: expected None beside sigmas"),
    ("linear", {"sigmas": [1.0], "timesteps": [3]}, "timesteps: expected None beside sigmas"),
    ("linear", {"spacing": "uniform"}, "spacing: expected one of 'leading', 'trailing', 'linspace', 'karras'"),
    ("continuous_vp", {"spacing": "leading"}, "spacing: expected one of 'uniform', 'karras'"),
    ("continuous_vp", {"timesteps": [0.5, 0.7]}, "timesteps: expected strictly"),
    ("continuous_vp", {"timesteps": [1.5, 0.7]}, "timesteps: expected times from"),
    ("continuous_vp", {"timesteps": [0.5, 0.0]}, "timesteps: expected strictly"),
])  # fmt: skip
def test_bad_grid_is_named(schedule, options, words):
    with pytest.raises(ValueError, match=words):
        gk.Diffusion(schedule).sample(lambda x, t: x, SHAPE, **options)


def test_continuous_diffusion_has_no_timesteps():
    with pytest.raises(AttributeError, match="continuous time"):
        _ = gk.Diffusion("continuous_vp").timesteps
