"""Distributions of training times: t = F^{-1}(u), u uniform in (0, 1), with F on [0, 1] and density p = F'.

    LogitNormal    logit t ~ N(mean, std^2)                                                       arXiv:2403.03206
    UShaped        p = a cosh(a (t - 1/2)) / (2 sinh(a/2)), in proportion to e^{at} + e^{a(1-t)}    arXiv:2405.20320
    Steps          1/K at each of 0, 1/K, .., (K-1)/K, the times of K steps on an even grid
    Beta           p = t^{alpha - 1} (1 - t)^{beta - 1} / B(alpha, beta)

Each is a callable of the uniforms [B] giving t [B], for loss(times=) of the flows and of Diffusion: any such callable
will do, and one that returns (t, weight) weighs the samples too. How u is drawn is genkern.methods.times: by itself,
or loss(times=Stratified(of=LogitNormal())). The uniforms are the Noise's, and t is computed in float64 by formulas
without branches or rejection, so that every device draws the same times. With weight=lambda t: 1 / times.density(t) the
loss is an unbiased estimate of the one with uniform times.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import check
from ..kept import constant, kept


class Times:
    """A distribution on [0, 1]."""

    def __call__(self, u: Tensor) -> Tensor:
        """t = F^{-1}(u), [B], of u's dtype; u in (0, 1)."""
        raise NotImplementedError

    def density(self, t: Tensor) -> Tensor:
        """p(t), [B]; t in (0, 1)."""
        raise NotImplementedError


class LogitNormal(Times):
    """t = 1 / (1 + e^{-(mean + std q)}), q the normal quantile of u; kept within 2^-126 and 1 - 2^-24, which float32
    holds, so that the density is not 0 at a time that is drawn.

    Args:
        mean: of logit t; above 0 the times lean toward the data.
        std: > 0.

    Source: Esser et al., arXiv:2403.03206.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.mean, self.std = check.number("mean", mean), _positive("std", std)

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)).clamp(2.0**-126, 1.0 - 2.0**-24)

    def density(self, t: Tensor) -> Tensor:
        """p(t), [B]; t in [0, 1], at whose ends it is 0."""
        inside = (t > 0.0) & (t < 1.0)
        s = torch.where(inside, t, 0.5)
        z = (torch.logit(s) - self.mean) / self.std
        found = torch.exp(-0.5 * z * z) / (self.std * math.sqrt(2.0 * math.pi) * s * (1.0 - s))
        return torch.where(inside, found, 0.0)


class UShaped(Times):
    """t = 1/2 + asinh((2u - 1) sinh(a/2)) / a: most often near both ends, where a 2-rectified flow is hard to fit.

    Near 0 that difference has no digits left, so it is taken as asinh of a quotient: for u <= 1/2, with
    q = (1 - 2u) sinh(a/2),

        t = asinh(4 u (1 - u) sinh(a/2) / (sqrt(1 + q^2) + q coth(a/2))) / a;    beyond, 1 less that of 1 - u.

    Args:
        a: in (0, 700]; the density at the ends is cosh(a/2) times that in the middle. Beyond, the square of sinh(a/2)
            is none of float64.

    Source: Lee, Lin, Fanti, arXiv:2405.20320 (a = 4): draws of e^{at}, half of them mirrored.
    """

    def __init__(self, a: float = 4.0) -> None:
        self.a = check.number("a", _positive("a", a), 0.0, 700.0)

    def __call__(self, u: Tensor) -> Tensor:
        half, upper = 0.5 * self.a, u > 0.5
        v = torch.where(upper, 1.0 - u.double(), u.double())
        q = (1.0 - 2.0 * v) * math.sinh(half)
        quotient = 4.0 * v * (1.0 - v) * math.sinh(half) / (torch.sqrt(1.0 + q * q) + q / math.tanh(half))
        t = torch.asinh(quotient) / self.a
        return torch.where(upper, 1.0 - t, t).to(u.dtype)

    def density(self, t: Tensor) -> Tensor:
        half = 0.5 * self.a
        x = (self.a * (t - 0.5)).abs()  # cosh and sinh over e^half, which float32 may not hold
        return self.a * ((x - half).exp() + (-x - half).exp()) / (-2.0 * math.expm1(-self.a))


class Steps(Times):
    """t = floor(K u) / K: the times at which a sampler of K even steps asks the network. It has no density.

    Args:
        count: K >= 1.

    Source: arXiv:2209.03003, section 2: distillation into K steps.
    """

    def __init__(self, count: int) -> None:
        self.count = check.integer("count", count, 1)

    def __call__(self, u: Tensor) -> Tensor:
        return (u * self.count).floor().clamp(max=self.count - 1) / self.count  # the product may be rounded to K


class Beta(Times):
    """Quantiles of the beta distribution, to 1e-9 in u.

    logit t as a function of logit u is smooth and straight at both ends, where the density may be infinite or 0: cubic
    pieces on an even grid of logit u, with the function's own slopes, tabulated once.

    Args:
        alpha, beta: > 0; alpha > beta leans toward the data.

    Raises:
        ValueError: alpha or beta <= 0. ImportError: scipy is not installed.
    """

    _ENDS, _PIECES = 48.0, 4096  # of logit u: |logit u| <= 37 for every float64 u but those below e^{-48}

    def __init__(self, alpha: float, beta: float) -> None:
        self.alpha, self.beta = _positive("alpha", alpha), _positive("beta", beta)
        try:
            from scipy import special
        except ImportError:
            raise ImportError("beta times need scipy: pip install scipy") from None
        self._log_norm = float(special.betaln(self.alpha, self.beta))
        z = np.linspace(-self._ENDS, self._ENDS, self._PIECES + 1)
        log_t, log_rest = np.empty_like(z), np.empty_like(z)
        low = z <= 0.0  # from the end that is near, so that no digit of t or of 1 - t is lost
        log_t[low], log_rest[low] = _logs(special, self.alpha, self.beta, special.expit(z[low]))
        log_rest[~low], log_t[~low] = _logs(special, self.beta, self.alpha, special.expit(-z[~low]))
        log_density = self.alpha * log_t + self.beta * log_rest - self._log_norm  # of logit t
        slope = np.exp(special.log_expit(z) + special.log_expit(-z) - log_density)
        self._table = np.stack([log_t - log_rest, slope * (z[1] - z[0])])
        self._tables: dict[Any, Tensor] = {}

    @constant
    def _on(self, device: torch.device) -> Tensor:
        return kept(self._tables, device, lambda: torch.from_numpy(self._table).to(device))

    def __call__(self, u: Tensor) -> Tensor:
        value, slope = self._on(u.device)
        place = (torch.logit(u.double()) + self._ENDS) * (self._PIECES / (2.0 * self._ENDS))
        place = place.clamp(0.0, float(self._PIECES))
        k = place.floor().clamp(max=self._PIECES - 1.0)
        s, i = place - k, k.long()
        rest = 1.0 - s
        found = (
            rest * rest * ((1.0 + 2.0 * s) * value[i] + s * slope[i])
            + s * s * ((1.0 + 2.0 * rest) * value[i + 1] - rest * slope[i + 1])
        )  # fmt: skip
        return torch.sigmoid(found).to(u.dtype)

    def density(self, t: Tensor) -> Tensor:
        return torch.exp((self.alpha - 1.0) * t.log() + (self.beta - 1.0) * torch.log1p(-t) - self._log_norm)


def _logs(special: Any, a: float, b: float, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log t and log(1 - t) at the quantile u of Beta(a, b); where t is too small for float64, by u = t^a / (a B)."""
    t = special.betaincinv(a, b, u)
    with np.errstate(divide="ignore"):
        log_t = np.log(t)
    tiny = t < 1e-290
    log_t[tiny] = (np.log(u[tiny]) + math.log(a) + special.betaln(a, b)) / a
    return log_t, np.log1p(-t)


def _positive(name: str, value: float) -> float:
    if not check.number(name, value) > 0.0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return float(value)
