"""The variance-preserving path on a table of timesteps, eqs. (13.3)-(13.4).

Between two timesteps, where a grid of noise levels may fall, log(sigma / alpha) is linear in t and alpha^2 + sigma^2
is 1 (so have it k-diffusion and diffusers). Below t = 0 there is one further time, t = -1, of clean data.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np

from .. import check
from ..kept import constant, kept
from .base import Path
from .schedules import numbers


class DiscreteVP(Path):
    """The variance-preserving path on t = 0 .. T-1, eqs. (13.3)-(13.4); code's t is the seed's t - 1.

    Args:
        alphas_cumprod: decreasing, in [0, 1), [T] float64: the seed's alpha_1 .. alpha_T.
        final: alphas_cumprod of the step below 0, written t = -1; the seed's alpha_0 = 1.

    Raises:
        ValueError: not decreasing, outside [0, 1), or final below alphas_cumprod[0] or above 1.
    """

    start = -1

    def __init__(self, alphas_cumprod: Any, final: float = 1.0) -> None:
        table = numbers("alphas_cumprod", alphas_cumprod)
        if table.ndim != 1 or not table.size:
            raise ValueError(f"alphas_cumprod: expected one dimension of at least one number, got shape {table.shape}")
        if not (np.isfinite(table).all() and table.min() >= 0.0 and table.max() < 1.0):
            raise ValueError(f"alphas_cumprod: expected numbers in [0, 1), got {table.min()} to {table.max()}")
        rising = np.nonzero(np.diff(table) >= 0.0)[0]
        if rising.size:
            t = int(rising[0])
            raise ValueError(
                f"alphas_cumprod: expected a decreasing sequence, got {table[t]} at {t} and {table[t + 1]} at {t + 1}"
            )
        self.final = check.number("final_alphas_cumprod", final, float(table[0]), 1.0)
        self.alphas_cumprod = table
        self.alphas_cumprod.flags.writeable = False
        self.stop = table.size - 1
        with_final = np.append(table, self.final)  # so that the index -1 is the step below 0
        self._alpha, self._sigma = np.sqrt(with_final), np.sqrt(1.0 - with_final)
        with np.errstate(divide="ignore"):
            self._log_level = 0.5 * (np.log1p(-table) - np.log(table))  # infinite at alphas_cumprod = 0
        self._tables: dict[Any, Any] = {}
        self._dtype: Any = None  # of the scales of a tensor of timesteps, by default float32

    @property
    def timesteps(self) -> int:
        """T."""
        return int(self.alphas_cumprod.size)

    @property
    def finite(self) -> int:
        """How many timesteps have a finite noise level sigma / alpha: T, or T-1 where the last has no signal."""
        return self.timesteps - int(self.alphas_cumprod[-1] == 0.0)

    def alpha(self, t: Any) -> Any:
        return self._at(self._alpha, 0, t)

    def sigma(self, t: Any) -> Any:
        return self._at(self._sigma, 1, t)

    def d_alpha(self, t: Any) -> Any:
        raise ValueError(
            "prediction: expected one of 'epsilon', 'sample', 'v', 'score' on a discrete path, got 'velocity'"
        )

    d_sigma = d_alpha

    def time_at(self, noise_level: Any) -> Any:
        """The t, between timesteps too, at which sigma / alpha is this.

        Raises:
            ValueError: a noise level outside those of the timesteps 0 .. T-1.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            log = np.log(np.asarray(noise_level, dtype=np.float64))
        known, rounding = self._log_level[: self.finite], 1e-12
        if np.isnan(log).any() or (log < known[0] - rounding).any() or (log > known[-1] + rounding).any():
            raise ValueError(
                f"sigmas: expected noise levels sigma / alpha from {math.exp(known[0]):g} to {math.exp(known[-1]):g}, "
                f"those of the schedule, got {noise_level}"
            )
        found = np.interp(log, known, np.arange(known.size))
        return float(found) if found.ndim == 0 else found

    def posterior_variance(self, t: Any) -> Any:
        """The seed's sigma_t^2 of the DDPM, after (13.13): (1 - abar_{t-1})/(1 - abar_t) (1 - abar_t/abar_{t-1})."""
        t = np.asarray(t)
        if t.size and (t.dtype.kind not in "iu" or t.min() < 0 or t.max() > self.stop):
            raise ValueError(f"t: expected integers from 0 to {self.stop}, got {t}")
        before, here = self._alpha[t - 1] ** 2, self._alpha[t] ** 2
        return (1.0 - before) / (1.0 - here) * (1.0 - here / before)

    @constant
    def on(self, device: Any, dtype: Any) -> Any:
        """alpha and sigma of every t as a tensor [2, T] on a device, kept there."""
        import torch

        both = np.stack([self._alpha[:-1], self._sigma[:-1]])
        key = (torch.device(device), dtype)
        return kept(self._tables, key, lambda: torch.as_tensor(both, dtype=dtype).to(device))

    def convert(self, m: Any, x: Any, t: Any, source: str, target: str) -> Any:
        if not check.is_tensor(t) or not check.is_tensor(x):
            return super().convert(m, x, t, source, target)
        import torch

        like = copy.copy(self)  # with the same tables, and scales in the arithmetic of x
        like._dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return super(DiscreteVP, like).convert(m, x, t, source, target)

    def check_time(self, name: str, t: float) -> float:
        if check.number(name, t, self.start, self.stop) != round(t):
            raise ValueError(f"{name}: expected an integer from {self.start} to {self.stop}, got {t}")
        return t

    def _at(self, table: np.ndarray, row: int, t: Any) -> Any:
        if check.is_tensor(t):
            import torch

            if t.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"t: expected a tensor of int64, got {t.dtype}")
            check.inside("t", t, 0, self.stop)
            scales = self.on(t.device, self._dtype or torch.float32)[row]
            return scales.index_select(0, t.reshape(-1)).reshape(t.shape)
        times = np.asarray(self.on_path(t), dtype=np.float64)
        below = np.floor(times).astype(np.int64)
        part, found = times - below, table[below]
        if part.any():
            found = np.where(part > 0.0, self._between(row, below, part), found)
        return float(found) if found.ndim == 0 else found

    def _between(self, row: int, below: np.ndarray, part: np.ndarray) -> np.ndarray:
        """alpha (row 0) or sigma (row 1) at t = below + part, part > 0 where it is looked at."""
        if ((part > 0.0) & ((below < 0) | (below >= self.finite - 1))).any():
            raise ValueError(f"t: expected an integer, or a number from 0 to {self.finite - 1}, got {below + part}")
        first = np.clip(below, 0, max(self.finite - 2, 0))
        log_level = (1.0 - part) * self._log_level[first] + part * self._log_level[first + 1]
        return (1.0 + np.exp(2.0 * log_level if row == 0 else -2.0 * log_level)) ** -0.5
