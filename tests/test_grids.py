"""Time grids."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genkern import grids


def test_uniform_runs_both_ways():
    np.testing.assert_allclose(grids.uniform(4), [0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(grids.uniform(2, 1.0, 0.0), [1.0, 0.5, 0.0])


def test_karras_times_are_equation_13_30():
    t = grids.karras(18, 0.002, 80.0, 7.0)
    i = np.arange(1, 19)
    expected = (0.002 ** (1 / 7) + (i - 1) / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    np.testing.assert_allclose(t, expected, rtol=1e-12)
    assert (t[0], t[-1]) == (0.002, 80.0)


def test_spacings_of_twelve_timesteps_by_their_formulas():
    assert grids.timesteps(5, 12, "leading").tolist() == [8, 6, 4, 2, 0]
    assert grids.timesteps(4, 12, "trailing").tolist() == [11, 8, 5, 2]
    assert grids.timesteps(3, 12, "linspace").tolist() == [11, 6, 0]


@pytest.mark.parametrize("spacing", grids.SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 333, 999, 1000])
def test_spacing_gives_distinct_timesteps_of_the_path(spacing, steps):
    t = grids.timesteps(steps, 1000, spacing)
    assert t.size == steps
    assert (np.diff(t) < 0).all()
    assert t.min() >= 0
    assert t.max() <= 999


@pytest.mark.parametrize("spacing", grids.SPACINGS)
def test_all_timesteps_are_the_same_in_every_spacing(spacing):
    assert grids.timesteps(10, 10, spacing).tolist() == list(range(9, -1, -1))


@pytest.mark.parametrize("times", [[0.0, 0.5, 0.5, 1.0], [0.0, 1.0, 0.5], [0.0], [], [[0.0, 1.0]], [0.0, math.nan]])
def test_times_that_are_not_strictly_monotone_are_refused(times):
    with pytest.raises(ValueError, match="times: expected"):
        grids.given(times)


def test_times_outside_the_path_are_refused():
    with pytest.raises(ValueError, match=r"times: expected times from 0\.0 to 1\.0, got 0\.0 to 1\.5"):
        grids.given([0.0, 1.5], low=0.0, high=1.0)


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_steps_outside_the_path_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps: expected an integer from 1 to 10, got {steps}"):
        grids.timesteps(steps, 10)


@pytest.mark.parametrize("steps", [2.5, "3", None])
def test_steps_that_are_no_integer_are_refused(steps):
    with pytest.raises(TypeError, match="steps: expected an integer"):
        grids.uniform(steps)


@pytest.mark.parametrize("given", [[3, 3, 1], [1, 2], [10, 1], [3, -1], [2.5, 1.0], []])
def test_given_timesteps_that_do_not_decrease_inside_the_path_are_refused(given):
    with pytest.raises(ValueError, match="timesteps: expected"):
        grids.given_timesteps(given, 10)


def test_bad_karras_arguments_are_refused():
    with pytest.raises(ValueError, match="n: expected an integer >= 2, got 1"):
        grids.karras(1)
    for low, high in ((0.0, 1.0), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
            grids.karras(5, low, high)
    with pytest.raises(ValueError, match="rho: expected a number > 0"):
        grids.karras(5, rho=0.0)
