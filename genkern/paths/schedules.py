"""Schedules: alphas_cumprod of T timesteps, float64 on the host. abar is alphas_cumprod, the seed's alpha.

    abar_t = prod_{s <= t} (1 - beta_s)                                                                (13.3)

    linear           beta from beta_start to beta_end, evenly                                   arXiv:2006.11239
    scaled_linear    its square root evenly                                                     arXiv:2112.10752
    sigmoid          beta_start + (beta_end - beta_start) / (1 + e^{-u}), u even in [-6, 6]     arXiv:2203.02923
    squared_cosine   abar = cos^2((t/T + 0.008)/1.008 pi/2)                                     arXiv:2102.09672
    laplace          log SNR = -(1/2) sgn(1/2 - t/T) log(1 - 2 |t/T - 1/2|), abar = SNR / (1 + SNR)     arXiv:2407.03297

The last two are given by abar at t = 1 .. T, with beta at most 0.999.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import check

SCHEDULES = ("linear", "scaled_linear", "sigmoid", "squared_cosine", "laplace")
_ENDS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "sigmoid": (1e-4, 0.02)}
_LARGEST = 0.999  # of a beta, so that abar stays above 0


def betas(schedule: str, timesteps: int, beta_start: float | None = None, beta_end: float | None = None) -> np.ndarray:
    """1 - alphas_cumprod_t / alphas_cumprod_{t-1} of a named schedule, [T] float64.

    Args:
        schedule: of SCHEDULES, the module's table.
        timesteps: T, at least 1.
        beta_start, beta_end: in (0, 1); not with squared_cosine and laplace. By default 1e-4 and 0.02 (scaled_linear:
            0.00085 and 0.012), times 1000/T, so that the last step is as noisy for every T.

    Raises:
        ValueError: an unknown schedule, timesteps < 1, a beta outside (0, 1): too few timesteps for the default
            beta_end among them.
    """
    check.choice("schedule", schedule, SCHEDULES)
    timesteps = check.integer("timesteps", timesteps, 1)
    if schedule not in _ENDS:
        if beta_start is not None or beta_end is not None:
            raise ValueError(f"beta_start, beta_end: expected None with schedule={schedule!r}")
        u = np.linspace(0.0, 1.0, timesteps + 1)
        if schedule == "squared_cosine":
            abar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        else:
            abar = _laplace(u)
        return np.minimum(1.0 - abar[1:] / abar[:-1], _LARGEST)
    fewest = math.floor(1000.0 * _ENDS[schedule][1]) + 1  # that the default end stays below 1 with
    if beta_end is None and timesteps < fewest:
        raise ValueError(
            f"timesteps: expected at least {fewest} with the default beta_end of {schedule!r}, got {timesteps}"
        )
    ends: list[float] = []
    for name, value, default in zip(("beta_start", "beta_end"), (beta_start, beta_end), _ENDS[schedule], strict=True):
        value = default * 1000.0 / timesteps if value is None else value
        if not 0.0 < check.number(name, value) < 1.0:
            raise ValueError(f"{name}: expected a number in (0, 1), got {value:g} ({timesteps} timesteps)")
        ends.append(float(value))
    if schedule == "linear":
        return np.linspace(ends[0], ends[1], timesteps)
    if schedule == "sigmoid":
        return ends[0] + (ends[1] - ends[0]) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, timesteps)))
    return np.linspace(math.sqrt(ends[0]), math.sqrt(ends[1]), timesteps) ** 2


def alphas_cumprod_of(betas: Sequence[float] | np.ndarray) -> np.ndarray:
    """prod_{s <= t} (1 - beta_s), float64.

    Raises:
        ValueError: a beta outside (0, 1].
    """
    values = numbers("betas", betas)
    if values.ndim != 1 or not values.size or not ((values > 0.0) & (values <= 1.0)).all():
        raise ValueError(f"betas: expected numbers in (0, 1], one a timestep, got {values}")
    return np.cumprod(1.0 - values)


def rescale_zero_snr(alphas_cumprod: Sequence[float] | np.ndarray) -> np.ndarray:
    """The schedule with no signal at its end: with r = sqrt(abar), r <- (r - r_T) r_1 / (r_1 - r_T).

    r_1 stays and r_T becomes 0, exactly. A network that predicts epsilon or the score says nothing there.

    Args:
        alphas_cumprod: decreasing, [T], T at least 2.

    Raises:
        ValueError: fewer than two timesteps, or the last not below the first.

    Source: Lin et al., arXiv:2305.08891, algorithm 1.
    """
    root = np.sqrt(numbers("alphas_cumprod", alphas_cumprod))
    if root.ndim != 1 or root.size < 2 or not root[-1] < root[0]:
        raise ValueError(f"alphas_cumprod: expected a decreasing sequence of two or more numbers, got {alphas_cumprod}")
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def shift_noise_level(alphas_cumprod: Sequence[float] | np.ndarray, shift: float) -> np.ndarray:
    """The schedule whose every noise level sigma / alpha is `shift` times as high: abar / (abar + s^2 (1 - abar)).

    Args:
        alphas_cumprod: [T].
        shift: s > 0; for images of side d instead of d_0, s = d / d_0.

    Raises:
        ValueError: shift <= 0.

    Source: Hoogeboom, Heek, Salimans, arXiv:2301.11093: log SNR + 2 log(d_0 / d).
    """
    if not check.number("shift", shift) > 0.0:
        raise ValueError(f"shift: expected a number > 0, got {shift}")
    abar = numbers("alphas_cumprod", alphas_cumprod)
    return abar / (abar + shift**2 * (1.0 - abar))


def numbers(name: str, values: Any) -> np.ndarray:
    """A new float64 array. TypeError: what holds no numbers."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a sequence of numbers, got {values!r}") from None


def _laplace(u: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        log_snr = -0.5 * np.sign(0.5 - u) * np.log(1.0 - 2.0 * np.abs(0.5 - u))
    return 1.0 / (1.0 + np.exp(-log_snr))
