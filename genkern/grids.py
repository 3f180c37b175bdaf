"""Time grids: the times that a sampler visits, strictly monotone, float64 on the host.

    uniform      t_k = start + (stop - start) k / steps                                       steps + 1 times
    karras       t_i = (eps^{1/rho} + (i-1)/(N-1) (T^{1/rho} - eps^{1/rho}))^rho,  i = 1 .. N      eq. (13.30)
    leading, trailing, linspace      integer timesteps of a discrete path, from noise to data

(13.30) is printed with its fraction's bar missing; this is how it reads. Karras et al., arXiv:2206.00364, eq. (5); the
spacings of timesteps are those of Lin et al., arXiv:2305.08891, table 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import check

SPACINGS = ("leading", "trailing", "linspace")


def uniform(steps: int, start: float = 0.0, stop: float = 1.0) -> np.ndarray:
    """steps + 1 even times from start to stop, either way round. ValueError: steps < 1, or start = stop."""
    steps = check.integer("steps", steps, 1)
    return given(np.linspace(check.number("start", start), check.number("stop", stop), steps + 1))


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """t_1 = sigma_min < ... < t_N = sigma_max of eq. (13.30), the ends exactly.

    Args:
        n: N, at least 2.
        sigma_min, sigma_max: epsilon and T of the seed, 0 < sigma_min < sigma_max.
        rho: > 0; larger puts more times near sigma_min.

    Raises:
        ValueError: n < 2, or not 0 < sigma_min < sigma_max, or rho <= 0.
    """
    n = check.integer("n", n, 2)
    if not 0.0 < check.number("sigma_min", sigma_min) < check.number("sigma_max", sigma_max):
        raise ValueError(f"sigma_min, sigma_max: expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    if not check.number("rho", rho) > 0.0:
        raise ValueError(f"rho: expected a number > 0, got {rho}")
    low, high = sigma_min ** (1.0 / rho), sigma_max ** (1.0 / rho)
    times = (low + np.arange(n) / (n - 1) * (high - low)) ** rho
    times[0], times[-1] = sigma_min, sigma_max
    return given(times)


def timesteps(steps: int, total: int, spacing: str = "leading") -> np.ndarray:
    """Decreasing integers of 0 .. total-1, [steps] int64.

        leading     k (total // steps), k = steps-1 .. 0
        trailing    round(total - k total / steps) - 1, k = 0 .. steps-1
        linspace    round of steps even numbers from total-1 to 0

    Raises:
        ValueError: steps < 1 or > total; an unknown spacing.
    """
    steps = check.integer("steps", steps, 1, total)
    check.choice("spacing", spacing, SPACINGS)
    k = np.arange(steps)
    if spacing == "leading":
        return (k * (total // steps))[::-1].astype(np.int64)
    if spacing == "trailing":
        return np.round(total - k * total / steps).astype(np.int64) - 1
    return np.round(np.linspace(total - 1, 0, steps)).astype(np.int64)


def given(times: Any, name: str = "times", low: float | None = None, high: float | None = None) -> np.ndarray:
    """Times given by the caller: at least two, finite, strictly monotone, in [low, high]; float64.

    Raises:
        ValueError: they are not.
    """
    grid = np.array(times, dtype=np.float64)
    if grid.ndim != 1 or grid.size < 2:
        raise ValueError(f"{name}: expected at least two times in one dimension, got shape {grid.shape}")
    if not np.isfinite(grid).all():
        raise ValueError(f"{name}: expected finite times, got {grid}")
    steps = np.diff(grid)
    if not ((steps > 0.0).all() or (steps < 0.0).all()):
        raise ValueError(f"{name}: expected strictly increasing or strictly decreasing times, got {grid}")
    if (low is not None and grid.min() < low) or (high is not None and grid.max() > high):
        raise ValueError(f"{name}: expected times from {low} to {high}, got {grid.min()} to {grid.max()}")
    return grid


def given_timesteps(times: Any, total: int) -> np.ndarray:
    """Timesteps given by the caller: strictly decreasing integers of 0 .. total-1, [steps] int64.

    Raises:
        ValueError: they are not.
    """
    values = np.array(times)
    if values.ndim != 1 or not values.size or values.dtype.kind not in "iu":
        raise ValueError(f"timesteps: expected integers in one dimension, got {values.dtype} of shape {values.shape}")
    if values.min() < 0 or values.max() >= total:
        raise ValueError(f"timesteps: expected integers from 0 to {total - 1}, got {values.min()} to {values.max()}")
    if (np.diff(values) >= 0).any():
        raise ValueError(f"timesteps: expected strictly decreasing integers, got {values}")
    return values.astype(np.int64)
