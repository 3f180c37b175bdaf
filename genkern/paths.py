"""Gaussian paths: x_t = alpha(t) x1 + sigma(t) x0, with x0 standard normal and x1 data.

    cond_ot    alpha = t, sigma = 1 - (1 - sigma_min) t            eqs. (13.21)-(13.22); data at t = 1
    ve         alpha = 1, sigma = t                                section 13.4; data at t = 0
    discrete   alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t)      eq. (13.4); t = 0 .. T-1, data below 0

What a network predicts is a combination of data y and noise e, m = c_y y + c_e e:

    epsilon (0, 1)     sample (1, 0)     v (-sigma, alpha)     velocity (alpha', sigma')     score (0, -1/sigma)

so that with x = alpha y + sigma e every prediction gives every other: with D = alpha c_e - sigma c_y,

    y = (c_e x - sigma m) / D,       e = (alpha m - c_y x) / D.

Velocity is dx/dt along the path at fixed (x1, x0), eq. (13.22): u = (sigma'/sigma)(x - alpha x1) + alpha' x1.
The seed's alpha of section 13.1 is the cumulative product, here alphas_cumprod.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import check

PREDICTIONS = ("epsilon", "sample", "v", "velocity", "score")
SCHEDULES = ("linear", "scaled_linear", "squared_cosine")


class Linear(NamedTuple):
    """a x + b m: what is read off a state x and a network output m."""

    x: Any
    m: Any


class Path:
    """A Gaussian path. t is a float, a NumPy array or a torch tensor, and the results are of its kind.

    Attributes:
        start, stop: the ends of the path in t; t outside them is a ValueError where it is on the host.
    """

    start: float
    stop: float

    def alpha(self, t: Any) -> Any:
        """Scale of the data."""
        raise NotImplementedError

    def sigma(self, t: Any) -> Any:
        """Scale of the noise."""
        raise NotImplementedError

    def d_alpha(self, t: Any) -> Any:
        """Derivative of alpha by t."""
        raise NotImplementedError

    def d_sigma(self, t: Any) -> Any:
        """Derivative of sigma by t."""
        raise NotImplementedError

    def snr(self, t: Any) -> Any:
        """alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def check_time(self, name: str, t: float) -> float:
        """A finite t on the path."""
        return check.number(name, t, self.start, self.stop)

    def composition(self, prediction: str, t: Any) -> tuple[Any, Any]:
        """(c_y, c_e) of m = c_y y + c_e e, the module's table."""
        check.choice("prediction", prediction, PREDICTIONS)
        if prediction == "epsilon":
            return 0.0, 1.0
        if prediction == "sample":
            return 1.0, 0.0
        if prediction == "v":
            return -self.sigma(t), self.alpha(t)
        if prediction == "velocity":
            return self.d_alpha(t), self.d_sigma(t)
        return 0.0, -1.0 / self.sigma(t)

    def data(self, prediction: str, t: Any) -> Linear:
        """y = a x + b m. Eq. (13.9) is that of epsilon.

        Raises:
            ValueError: at this t (a number) the prediction does not determine the data.
        """
        c_y, c_e = self.composition(prediction, t)
        if prediction == "sample":
            return Linear(0.0, 1.0)
        if prediction == "epsilon":
            alpha = self.alpha(t)
            return self._finite(prediction, "the data", t, lambda: Linear(1.0 / alpha, -self.sigma(t) / alpha))
        sigma = self.sigma(t)
        if prediction == "score":
            alpha = self.alpha(t)
            return self._finite(prediction, "the data", t, lambda: Linear(1.0 / alpha, sigma * sigma / alpha))
        d = self.alpha(t) * c_e - sigma * c_y
        return self._finite(prediction, "the data", t, lambda: Linear(c_e / d, -sigma / d))

    def noise(self, prediction: str, t: Any) -> Linear:
        """e = a x + b m.

        Raises:
            ValueError: at this t (a number) the prediction does not determine the noise.
        """
        if prediction == "epsilon":
            return Linear(0.0, 1.0)
        if prediction == "score":
            return Linear(0.0, -self.sigma(t))
        c_y, c_e = self.composition(prediction, t)
        d = self.alpha(t) * c_e - self.sigma(t) * c_y
        return self._finite(prediction, "the noise", t, lambda: Linear(-c_y / d, self.alpha(t) / d))

    def read(self, source: str, target: str, t: Any) -> Linear:
        """The prediction `target` from the prediction `source`: target = a x + b m.

        Raises:
            ValueError: an unknown prediction, or at this t (a number) the one does not determine the other.
        """
        check.choice("source", source, PREDICTIONS)
        check.choice("target", target, PREDICTIONS)
        if source == target:
            return Linear(0.0, 1.0)
        c_y, c_e = self._finite(target, "itself", t, lambda: self.composition(target, t))
        x, m = 0.0, 0.0
        for c, of in ((c_y, self.data), (c_e, self.noise)):
            if not _is_zero(c):
                found = of(source, t)
                x, m = x + c * found.x, m + c * found.m
        return Linear(x, m)

    def convert(self, m: Any, x: Any, t: Any, source: str, target: str) -> Any:
        """A network output m at (x, t), read as another prediction; one fused pass.

        Args:
            m: prediction `source`.  [B, ...].
            x: the state.  [B, ...].
            t: time; a number, or one a sample, [B].
            source, target: of "epsilon", "sample", "v", "velocity", "score".

        Returns:
            The prediction `target`.  [B, ...], x's dtype.

        Raises:
            ValueError: shapes or devices differ; an unknown prediction; t (a number) outside the path, or where
                source does not determine target.
        """
        from . import fused, rows

        if isinstance(t, (int, float)):
            self.check_time("t", t)
        a, b = self.read(source, target, t)
        (result,) = fused.apply_row(rows.Row((rows.Out(x=a, m=b),)), x=x, m=m)
        return result

    def _finite(self, prediction: str, what: str, t: Any, of: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            try:
                found = of()
            except ZeroDivisionError:
                found = (math.inf,)
        for c in found:
            if isinstance(c, (float, np.ndarray)) and not np.isfinite(c).all():
                raise ValueError(f"t: the prediction {prediction!r} does not determine {what} at t = {t}")
        return found


class CondOT(Path):
    """The conditional optimal-transport path: alpha = t, sigma = 1 - (1 - sigma_min) t, t in [0, 1].

    Args:
        sigma_min: standard deviation around the data at t = 1, in [0, 1).

    Source: eqs. (13.21)-(13.22); sigma_min = 0 is the linear interpolation of (13.24).
    """

    start, stop = 0.0, 1.0

    def __init__(self, sigma_min: float = 0.0) -> None:
        self.sigma_min = check.number("sigma_min", sigma_min, 0.0, math.nextafter(1.0, 0.0))

    def alpha(self, t: Any) -> Any:
        return t

    def sigma(self, t: Any) -> Any:
        return 1.0 - (1.0 - self.sigma_min) * t

    def d_alpha(self, t: Any) -> Any:
        return 1.0

    def d_sigma(self, t: Any) -> Any:
        return -(1.0 - self.sigma_min)


class VE(Path):
    """The variance-exploding path of section 13.4, (13.25) with sqrt(2t): alpha = 1, sigma = t, t in [0, stop]."""

    start = 0.0

    def __init__(self, stop: float = math.inf) -> None:
        self.stop = stop

    def alpha(self, t: Any) -> Any:
        return 1.0

    def sigma(self, t: Any) -> Any:
        return t

    def d_alpha(self, t: Any) -> Any:
        return 0.0

    def d_sigma(self, t: Any) -> Any:
        return 1.0


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
        table = np.array(alphas_cumprod, dtype=np.float64)
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
        self._tables: dict[Any, Any] = {}

    @property
    def timesteps(self) -> int:
        """T."""
        return int(self.alphas_cumprod.size)

    def alpha(self, t: Any) -> Any:
        return self._at(self._alpha, 0, t)

    def sigma(self, t: Any) -> Any:
        return self._at(self._sigma, 1, t)

    def d_alpha(self, t: Any) -> Any:
        raise ValueError(
            "prediction: expected one of 'epsilon', 'sample', 'v', 'score' on a discrete path, got 'velocity'"
        )

    d_sigma = d_alpha

    def posterior_variance(self, t: Any) -> Any:
        """The seed's sigma_t^2 of the DDPM, after (13.13): (1 - abar_{t-1})/(1 - abar_t) (1 - abar_t/abar_{t-1})."""
        t = np.asarray(t)
        if t.size and (t.dtype.kind not in "iu" or t.min() < 0 or t.max() > self.stop):
            raise ValueError(f"t: expected integers from 0 to {self.stop}, got {t}")
        before, here = self._alpha[t - 1] ** 2, self._alpha[t] ** 2
        return (1.0 - before) / (1.0 - here) * (1.0 - here / before)

    def on(self, device: Any, dtype: Any) -> Any:
        """alpha and sigma of every t as a tensor [2, T] on a device, kept there."""
        import torch

        key = (torch.device(device), dtype)
        if key not in self._tables:
            both = np.stack([self._alpha[:-1], self._sigma[:-1]])
            self._tables[key] = torch.as_tensor(both, dtype=dtype).to(device)
        return self._tables[key]

    def check_time(self, name: str, t: float) -> float:
        if check.number(name, t, self.start, self.stop) != round(t):
            raise ValueError(f"{name}: expected an integer from {self.start} to {self.stop}, got {t}")
        return t

    def _at(self, table: np.ndarray, row: int, t: Any) -> Any:
        if check.is_tensor(t):
            import torch

            return self.on(t.device, torch.float32)[row].index_select(0, t)
        found = table[np.asarray(t).astype(np.int64)]  # a grid holds its integers as floats
        return float(found) if np.ndim(found) == 0 else found


def betas(schedule: str, timesteps: int, beta_start: float | None = None, beta_end: float | None = None) -> np.ndarray:
    """1 - alphas_cumprod_t / alphas_cumprod_{t-1} of a named schedule, [T] float64.

        linear           beta_start .. beta_end, evenly (Ho, Jain, Abbeel 2020)
        scaled_linear    the square roots evenly (latent diffusion)
        squared_cosine   alphas_cumprod = cos^2(((t/T) + 0.008)/1.008 pi/2), beta at most 0.999 (Nichol, Dhariwal 2021)

    Args:
        schedule: one of these.
        timesteps: T, at least 1.
        beta_start, beta_end: in (0, 1). By default 1e-4 and 0.02 (scaled_linear: 0.00085 and 0.012), times 1000/T,
            so that the last step is as noisy for every T.

    Raises:
        ValueError: an unknown schedule, timesteps < 1, a beta outside (0, 1).
    """
    check.choice("schedule", schedule, SCHEDULES)
    timesteps = check.integer("timesteps", timesteps, 1)
    if schedule == "squared_cosine":
        if beta_start is not None or beta_end is not None:
            raise ValueError("beta_start, beta_end: expected None with schedule='squared_cosine'")
        abar = np.cos((np.linspace(0.0, 1.0, timesteps + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1.0 - abar[1:] / abar[:-1], 0.999)
    first, last = (1e-4, 0.02) if schedule == "linear" else (0.00085, 0.012)
    ends: list[float] = []
    for name, value, default in (("beta_start", beta_start, first), ("beta_end", beta_end, last)):
        value = default * 1000.0 / timesteps if value is None else value
        if not 0.0 < check.number(name, value) < 1.0:
            raise ValueError(f"{name}: expected a number in (0, 1), got {value:g} ({timesteps} timesteps)")
        ends.append(float(value))
    if schedule == "linear":
        return np.linspace(ends[0], ends[1], timesteps)
    return np.linspace(math.sqrt(ends[0]), math.sqrt(ends[1]), timesteps) ** 2


def alphas_cumprod_of(betas: Sequence[float] | np.ndarray) -> np.ndarray:
    """prod_{s <= t} (1 - beta_s), float64.

    Raises:
        ValueError: a beta outside (0, 1].
    """
    values = np.array(betas, dtype=np.float64)
    if values.ndim != 1 or not values.size or not ((values > 0.0) & (values <= 1.0)).all():
        raise ValueError(f"betas: expected numbers in (0, 1], one a timestep, got {values}")
    return np.cumprod(1.0 - values)


def _is_zero(c: Any) -> bool:
    return isinstance(c, float) and c == 0.0
