"""Variance-preserving paths in continuous time, t in [0, 1] with data at 0, by their log noise level l(t).

    l = log(sigma / alpha) = -(log SNR) / 2,     alpha = (1 + e^{2l})^{-1/2},     sigma = (1 + e^{-2l})^{-1/2},
    alpha' = -alpha sigma^2 l',     sigma' = sigma alpha^2 l',     alpha^2 + sigma^2 = 1.

    LinearVP    beta(t) = beta_min + t (beta_max - beta_min),   b(t) = the integral of beta over [0, t],
                alpha^2 = e^{-b}, so that l = log(e^b - 1) / 2
    CosineVP    l = log tan(a t + c), from -log_snr_max / 2 at t = 0 to -log_snr_min / 2 at t = 1

A shift s multiplies the noise level, l + log s, as a larger image needs: the mean of (d / d_0)^2 pixels has d / d_0
times less noise, so with s = d / d_0 an image of side d, shrunk to side d_0, is as noisy as one of that side.

Song et al., arXiv:2011.13456; Salimans, Ho, arXiv:2202.00512; Hoogeboom, Heek, Salimans, arXiv:2301.11093.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import check
from .base import Path


class ContinuousVP(Path):
    """A path given by its log noise level; t is a float, a NumPy array or a torch tensor.

    Args:
        shift: s > 0, of the noise level.
    """

    start, stop = 0.0, 1.0

    def __init__(self, shift: float = 1.0) -> None:
        if not check.number("shift", shift) > 0.0:
            raise ValueError(f"shift: expected a number > 0, got {shift}")
        self.shift = float(shift)

    def _log_level(self, t: Any, xp: Any) -> Any:
        """l(t) without shift."""
        raise NotImplementedError

    def _d_log_level(self, t: Any, xp: Any) -> Any:
        """l'(t)."""
        raise NotImplementedError

    def _time(self, level: Any, xp: Any) -> Any:
        """t at a noise level without shift."""
        raise NotImplementedError

    def alpha(self, t: Any) -> Any:
        return self._scale(t, 1.0)

    def sigma(self, t: Any) -> Any:
        return self._scale(t, -1.0)

    def d_alpha(self, t: Any) -> Any:
        return -self.alpha(t) * self.sigma(t) ** 2 * self._slope(t)

    def d_sigma(self, t: Any) -> Any:
        return self.sigma(t) * self.alpha(t) ** 2 * self._slope(t)

    def time_at(self, noise_level: Any) -> Any:
        time, xp = _argument(noise_level)
        return _result(self._time(time / self.shift, xp))

    def _scale(self, t: Any, sign: float) -> Any:
        time, xp = _argument(self.on_path(t))
        if xp is not np:
            return self._scale_of(time, xp, sign)
        with np.errstate(divide="ignore"):  # l(0) may be -inf, where alpha = 1 and sigma = 0
            return _result(self._scale_of(time, xp, sign))

    def _scale_of(self, t: Any, xp: Any, sign: float) -> Any:
        return (1.0 + xp.exp(sign * 2.0 * (self._log_level(t, xp) + math.log(self.shift)))) ** -0.5

    def _slope(self, t: Any) -> Any:
        time, xp = _argument(self.on_path(t))
        return _result(self._d_log_level(time, xp))


class LinearVP(ContinuousVP):
    """The variance-preserving diffusion with a linear beta, the limit of (13.3) for many timesteps.

    Args:
        beta_min, beta_max: beta at t = 0 and 1, 0 < beta_min <= beta_max.
        shift: s > 0, of the noise level.

    Raises:
        ValueError: not 0 < beta_min <= beta_max, or shift <= 0.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, shift: float = 1.0) -> None:
        super().__init__(shift)
        if not 0.0 < check.number("beta_min", beta_min) <= check.number("beta_max", beta_max):
            raise ValueError(f"beta_min, beta_max: expected 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def _integral(self, t: Any) -> Any:
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _log_level(self, t: Any, xp: Any) -> Any:
        return 0.5 * xp.log(xp.expm1(self._integral(t)))

    def _d_log_level(self, t: Any, xp: Any) -> Any:
        beta = self.beta_min + t * (self.beta_max - self.beta_min)
        return -0.5 * beta / xp.expm1(-self._integral(t))

    def _time(self, level: Any, xp: Any) -> Any:
        b = xp.log1p(level * level)
        return 2.0 * b / (self.beta_min + xp.sqrt(self.beta_min**2 + 2.0 * b * (self.beta_max - self.beta_min)))


class CosineVP(ContinuousVP):
    """The cosine path between two log signal-to-noise ratios: the angle atan(sigma / alpha) is linear in t.

    Args:
        log_snr_min, log_snr_max: log(alpha^2 / sigma^2) at t = 1 and 0 (before the shift), the first the smaller.
        shift: s > 0, of the noise level.

    Raises:
        ValueError: not log_snr_min < log_snr_max, or shift <= 0.
    """

    def __init__(self, log_snr_min: float = -20.0, log_snr_max: float = 20.0, shift: float = 1.0) -> None:
        super().__init__(shift)
        if not check.number("log_snr_min", log_snr_min) < check.number("log_snr_max", log_snr_max):
            raise ValueError(
                f"log_snr_min, log_snr_max: expected log_snr_min < log_snr_max, got {log_snr_min} and {log_snr_max}"
            )
        self._first = math.atan(math.exp(-0.5 * log_snr_max))
        self._rate = math.atan(math.exp(-0.5 * log_snr_min)) - self._first

    def _log_level(self, t: Any, xp: Any) -> Any:
        return xp.log(xp.tan(self._first + self._rate * t))

    def _d_log_level(self, t: Any, xp: Any) -> Any:
        return 2.0 * self._rate / xp.sin(2.0 * (self._first + self._rate * t))

    def _time(self, level: Any, xp: Any) -> Any:
        return (xp.arctan(level) - self._first) / self._rate


def _argument(t: Any) -> tuple[Any, Any]:
    """t, and the module whose functions take it."""
    if check.is_tensor(t):
        import torch

        return t, torch
    return np.asarray(t, dtype=np.float64), np


def _result(found: Any) -> Any:
    return found if check.is_tensor(found) or np.ndim(found) else float(found)
