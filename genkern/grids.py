"""Time grids: the times that a sampler visits, strictly monotone, float64 on the host.

    uniform      t_k = start + (stop - start) k / steps                                       steps + 1 times
    karras       t_i = (eps^{1/rho} + (i-1)/(N-1) (T^{1/rho} - eps^{1/rho}))^rho,  i = 1 .. N      eq. (13.30)
    exponential, polyexponential     log t_i = log eps + ((i-1)/(N-1))^rho log(T / eps), rho = 1 for the first
    beta         t_i = eps + q((i-1)/(N-1)) (T - eps), q the quantiles of Beta(a, b)
    leading, trailing, linspace      integer timesteps of a discrete path, from noise to data

(13.30) is printed with its fraction's bar missing; this is how it reads. Karras et al., arXiv:2206.00364, eq. (5). The
exponential ones are k-diffusion's; beta: Lee et al., arXiv:2407.12173. They are grids of noise levels sigma / alpha,
which a path turns into times (Path.time_at). The spacings of timesteps are those of Lin et al., arXiv:2305.08891,
table 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import check

SPACINGS = ("leading", "trailing", "linspace")
NOISE_LEVELS = ("karras", "exponential", "polyexponential", "beta")


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
    ramp = _ramp(n, sigma_min, sigma_max)
    low, high = (end ** (1.0 / _positive("rho", rho)) for end in (sigma_min, sigma_max))
    return _between((low + ramp * (high - low)) ** rho, sigma_min, sigma_max)


def exponential(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> np.ndarray:
    """Evenly spaced in the logarithm. ValueError: n < 2, or not 0 < sigma_min < sigma_max."""
    return polyexponential(n, sigma_min, sigma_max, 1.0)


def polyexponential(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 1.0) -> np.ndarray:
    """A power rho of an even ramp in the logarithm, the ends exactly; a larger rho puts more times near sigma_min.

    Raises:
        ValueError: n < 2, or not 0 < sigma_min < sigma_max, or rho <= 0.
    """
    ramp = _ramp(n, sigma_min, sigma_max) ** _positive("rho", rho)
    low, high = np.log(sigma_min), np.log(sigma_max)
    return _between(np.exp(low + ramp * (high - low)), sigma_min, sigma_max)


def beta(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Quantiles of a beta distribution, the ends exactly; a, b < 1 put more times near both.

    Raises:
        ValueError: n < 2, or not 0 < sigma_min < sigma_max, or a or b <= 0. ImportError: scipy is not installed.
    """
    ramp = _ramp(n, sigma_min, sigma_max)
    a, b = _positive("a", a), _positive("b", b)
    try:
        from scipy import special
    except ImportError:
        raise ImportError("the beta grid needs scipy: pip install scipy") from None
    return _between(sigma_min + special.betaincinv(a, b, ramp) * (sigma_max - sigma_min), sigma_min, sigma_max)


def noise_levels(kind: str, steps: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    """A named grid with its own defaults, decreasing from sigma_max, [steps]; one step is at sigma_max.

    Raises:
        ValueError: an unknown kind, steps < 1, or not 0 < sigma_min < sigma_max.
    """
    of = {"karras": karras, "exponential": exponential, "polyexponential": polyexponential, "beta": beta}
    check.choice("spacing", kind, NOISE_LEVELS)
    if check.integer("steps", steps, 1) == 1:
        return np.array([sigma_max])
    return of[kind](steps, sigma_min, sigma_max)[::-1]


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


def _ramp(n: int, sigma_min: float, sigma_max: float) -> np.ndarray:
    n = check.integer("n", n, 2)
    if not 0.0 < check.number("sigma_min", sigma_min) < check.number("sigma_max", sigma_max):
        raise ValueError(f"sigma_min, sigma_max: expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return np.arange(n) / (n - 1)


def _between(times: np.ndarray, sigma_min: float, sigma_max: float) -> np.ndarray:
    times[0], times[-1] = sigma_min, sigma_max
    return given(times)


def _positive(name: str, value: float) -> float:
    if not check.number(name, value) > 0.0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return float(value)
