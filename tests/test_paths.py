"""Paths: the scales, their derivatives, the table of predictions, the schedules."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from analytic import PathNetwork, mixture

from genkern import paths

F64 = torch.float64
PATHS = {
    "cond_ot": (paths.CondOT(0.1), 0.4),
    "linear": (paths.CondOT(0.0), 0.7),
    "ve": (paths.VE(80.0), 1.7),
    "discrete": (paths.DiscreteVP(paths.alphas_cumprod_of(paths.betas("linear", 1000))), 400),
}


@pytest.mark.parametrize("name", ["cond_ot", "linear", "ve"])
def test_derivatives_are_those_of_the_scales(name):
    path, t = PATHS[name]
    h = 1e-6
    assert path.d_alpha(t) == pytest.approx((path.alpha(t + h) - path.alpha(t - h)) / (2 * h), abs=1e-9)
    assert path.d_sigma(t) == pytest.approx((path.sigma(t + h) - path.sigma(t - h)) / (2 * h), abs=1e-9)


def test_conditional_velocity_is_equation_13_22():
    path, t = paths.CondOT(0.1), 0.3
    x0, x1 = torch.randn(2, 4, 3, dtype=F64)
    x = path.alpha(t) * x1 + path.sigma(t) * x0
    u = path.d_sigma(t) / path.sigma(t) * (x - t * x1) + x1
    torch.testing.assert_close(u, path.d_alpha(t) * x1 + path.d_sigma(t) * x0)


@pytest.mark.parametrize("name", PATHS)
def test_every_prediction_gives_every_other(name):
    path, t = PATHS[name]
    known = [p for p in paths.PREDICTIONS if not (p == "velocity" and name == "discrete")]
    y, e = torch.randn(2, 4, 3, dtype=F64)
    x = path.alpha(t) * y + path.sigma(t) * e
    values = {}
    for prediction in known:
        c_y, c_e = path.composition(prediction, t)
        values[prediction] = c_y * y + c_e * e
    for source, target in itertools.product(known, known):
        torch.testing.assert_close(path.convert(values[source], x, t, source, target), values[target])


def test_conversion_broadcasts_times_of_the_batch():
    path = paths.CondOT(0.05)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    y, e = torch.randn(2, 3, 2, 4, dtype=F64)
    wide = t[:, None, None]
    x = path.alpha(wide) * y + path.sigma(wide) * e
    velocity = y + path.d_sigma(0.0) * e
    torch.testing.assert_close(path.convert(velocity, x, t, "velocity", "epsilon"), e)


def test_perfect_network_obeys_the_score_identity():
    path, t, data = paths.CondOT(0.1), 0.6, mixture()
    x = torch.randn(5, 2, dtype=F64)
    v = PathNetwork(data, path, "velocity")(x, torch.full((5,), t, dtype=F64))
    score = path.convert(v, x, t, "velocity", "score")
    torch.testing.assert_close(score, data.score(x, path.alpha(t), path.sigma(t)))


def test_snr_is_the_ratio_of_the_squares():
    path = paths.CondOT(0.0)
    assert path.snr(0.75) == pytest.approx(9.0)


def test_linear_schedule_is_the_product_of_its_betas():
    betas = np.linspace(1e-4, 0.02, 1000)
    path = paths.DiscreteVP(paths.alphas_cumprod_of(paths.betas("linear", 1000)))
    np.testing.assert_allclose(path.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-13)
    np.testing.assert_allclose(path.alpha(10) ** 2 + path.sigma(10) ** 2, 1.0, rtol=1e-15)


def test_scaled_linear_schedule_is_even_in_the_root():
    roots = np.sqrt(paths.betas("scaled_linear", 1000))
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-9)
    assert roots[0] ** 2 == pytest.approx(0.00085)
    assert roots[-1] ** 2 == pytest.approx(0.012)


def test_squared_cosine_schedule_follows_its_formula():
    abar = paths.alphas_cumprod_of(paths.betas("squared_cosine", 100))
    t = np.arange(1, 100)  # the last beta is capped

    def f(u):
        return np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    np.testing.assert_allclose(abar[:-1], f(t / 100) / f(0.0), rtol=1e-10)


@pytest.mark.parametrize("timesteps", [50, 200, 4000])
def test_default_betas_end_as_noisy_for_every_number_of_timesteps(timesteps):
    abar = paths.alphas_cumprod_of(paths.betas("linear", timesteps))
    assert math.log(abar[-1]) == pytest.approx(-10.0, rel=0.3)


def test_below_the_first_timestep_stands_clean_data():
    path = PATHS["discrete"][0]
    assert (path.alpha(-1), path.sigma(-1)) == (1.0, 0.0)
    assert paths.DiscreteVP([0.9, 0.5], final=0.95).alpha(-1) == pytest.approx(math.sqrt(0.95))


def test_device_table_is_the_host_table():
    path = PATHS["discrete"][0]
    t = torch.tensor([0, 7, 999])
    torch.testing.assert_close(path.alpha(t), torch.tensor(path.alpha(t.numpy()), dtype=torch.float32))


def test_posterior_variance_is_the_seeds():
    path = PATHS["discrete"][0]
    a = np.append(1.0, path.alphas_cumprod)  # the seed's index
    t = np.arange(1, 1001)
    np.testing.assert_allclose(
        path.posterior_variance(t - 1), (1 - a[t - 1]) / (1 - a[t]) * (1 - a[t] / a[t - 1]), rtol=1e-9, atol=1e-16
    )
    assert path.posterior_variance(0) == 0.0


@pytest.mark.parametrize(
    "table, words",
    [
        ([0.5, 0.9], "decreasing"),
        ([0.5, 0.5], "decreasing"),
        ([1.2, 0.5], r"\[0, 1\)"),
        ([1.0, 0.5], r"\[0, 1\)"),
        ([0.5, -0.1], r"\[0, 1\)"),
        ([0.5, math.nan], r"\[0, 1\)"),
        ([[0.5, 0.4]], "one dimension"),
        ([], "one dimension"),
    ],
)
def test_bad_schedule_is_refused(table, words):
    with pytest.raises(ValueError, match=f"alphas_cumprod.*{words}"):
        paths.DiscreteVP(table)


def test_final_alphas_cumprod_continues_the_decrease():
    with pytest.raises(ValueError, match=r"final_alphas_cumprod: expected a number from 0\.9 to 1, got 0\.8"):
        paths.DiscreteVP([0.9, 0.5], final=0.8)


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.5], [-0.1], []])
def test_bad_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas: expected numbers in"):
        paths.alphas_cumprod_of(betas)


@pytest.mark.parametrize("given", ["abc", ["a", "b"], [[0.1], [0.1, 0.2]], {"a": 1}])
def test_a_schedule_that_holds_no_numbers_is_named(given):
    functions = (paths.DiscreteVP, paths.rescale_zero_snr, lambda abar: paths.shift_noise_level(abar, 2.0))
    for function in functions:
        with pytest.raises(TypeError, match="alphas_cumprod: expected a sequence of numbers, got"):
            function(given)
    with pytest.raises(TypeError, match="betas: expected a sequence of numbers, got"):
        paths.alphas_cumprod_of(given)


def test_bad_arguments_of_paths_are_refused():
    with pytest.raises(ValueError, match="schedule: expected one of"):
        paths.betas("quadratic", 10)
    with pytest.raises(ValueError, match="timesteps: expected an integer >= 1, got 0"):
        paths.betas("linear", 0)
    with pytest.raises(ValueError, match="beta_end"):
        paths.betas("linear", 10)  # 0.02 * 100 is no probability
    with pytest.raises(ValueError, match="sigma_min"):
        paths.CondOT(1.0)
    with pytest.raises(ValueError, match="sigma_min"):
        paths.CondOT(-0.1)
    with pytest.raises(ValueError, match="prediction: expected one of"):
        paths.CondOT().data("x0", 0.5)
    with pytest.raises(ValueError, match="velocity"):
        PATHS["discrete"][0].read("epsilon", "velocity", 3)


def test_time_outside_the_path_is_refused():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="t: expected a number from 0 to 1, got 1.5"):
        paths.CondOT().convert(x, x, 1.5, "velocity", "epsilon")
    with pytest.raises(ValueError, match="t: expected a number from -1 to 999"):
        PATHS["discrete"][0].convert(x, x, 1000, "epsilon", "v")
    with pytest.raises(ValueError, match="t: expected an integer"):
        PATHS["discrete"][0].convert(x, x, 2.5, "epsilon", "v")


OUTSIDE = {
    "cond_ot": (2.0, -0.1, math.nan, math.inf),
    "ve": (-1.0, 81.0, math.nan),
    "discrete": (-5, 1000, 999.5, math.nan, -0.5),
    "linear_vp": (1.5, -0.5, math.nan),
    "cosine_vp": (1.5, -0.5, math.nan),
}
OF = PATHS | {"linear_vp": (paths.LinearVP(), 0.3), "cosine_vp": (paths.CosineVP(), 0.3)}


@pytest.mark.parametrize("name, t", [(name, t) for name, times in OUTSIDE.items() for t in times])
def test_scales_and_slopes_outside_the_path_are_refused(name, t):
    path = OF[name][0]
    kinds = [t, np.float64(t), np.array([0.0, t])]
    if name != "discrete" or isinstance(t, int):  # a tensor of timesteps is of integers
        kinds.append(torch.tensor([0, t]))
    functions = [path.alpha, path.sigma, path.snr]
    functions += [] if name == "discrete" else [path.d_alpha, path.d_sigma]
    for time, function in itertools.product(kinds, functions):
        with pytest.raises(ValueError, match="t: expected a"):
            function(time)


def test_timesteps_of_a_tensor_are_integers():
    with pytest.raises(TypeError, match="t: expected a tensor of int64, got torch.float32"):
        PATHS["discrete"][0].alpha(torch.tensor([0.5]))


def test_times_of_a_batch_outside_the_path_are_not_converted():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="t: expected a number from 0 to 1, got 2 to 3"):
        paths.CondOT().convert(x, x, torch.tensor([2.0, 3.0]), "velocity", "epsilon")
    with pytest.raises(ValueError, match="t: expected a number from 0 to 999, got -1 to 4"):
        PATHS["discrete"][0].convert(x, x, torch.tensor([4, -1]), "v", "epsilon")


@pytest.mark.parametrize("source, target", [*itertools.permutations(["epsilon", "sample", "v", "score"], 2)])
def test_conversion_at_timesteps_of_a_batch_has_the_precision_of_the_state(source, target):
    path, t = PATHS["discrete"][0], torch.tensor([0, 400, 999])
    m, x = torch.randn(2, 3, 5, dtype=F64)
    together = path.convert(m, x, t, source, target)
    for k in range(3):  # a host number is converted in float64
        one = path.convert(m[k : k + 1], x[k : k + 1], int(t[k]), source, target)
        torch.testing.assert_close(together[k : k + 1], one, rtol=1e-12, atol=1e-12)
    half = path.convert(m.float(), x.float(), t, source, target)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("schedule, fewest", [("linear", 21), ("scaled_linear", 13), ("sigmoid", 21)])
def test_too_few_timesteps_for_the_default_betas_are_named(schedule, fewest):
    with pytest.raises(ValueError, match=f"timesteps: expected at least {fewest} with the default .* got 10"):
        paths.betas(schedule, 10)
    assert paths.betas(schedule, fewest)[-1] < 1.0
    assert paths.betas(schedule, 10, 0.1, 0.5)[-1] == pytest.approx(0.5, rel=0.01)


def test_prediction_that_does_not_determine_the_data_is_refused():
    with pytest.raises(ValueError, match="'epsilon' does not determine the data at t = 0"):
        paths.CondOT().data("epsilon", 0.0)
    with pytest.raises(ValueError, match="'sample' does not determine the noise at t = 1"):
        paths.CondOT().read("sample", "velocity", 1.0)
