"""Steps in lambda = log(alpha / sigma), half the log signal-to-noise ratio, and functions of exponential integrators.

Along the probability-flow ODE of a Gaussian path, with y the predicted data,

    x_s = (sigma_s / sigma_t) x_t + alpha_s (integral over [lambda_t, lambda_s] of e^{lambda - lambda_s} y d lambda),

so that for y a polynomial in (lambda - lambda_t) / h, h = lambda_s - lambda_t, the integral is a sum of

    phi_1(z) = (e^z - 1) / z,    phi_{k+1}(z) = (phi_k(z) - 1/k!) / z    at z = -h.

Lu et al., arXiv:2211.01095, proposition 4.1; Hochbruck, Ostermann 2010, "Exponential integrators".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..paths import Path


class Step(NamedTuple):
    """A step from t to s on a path: its scales; h = lambda_s - lambda_t, inf where an end has no noise or signal."""

    t: float
    s: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    h: float

    @property
    def decay(self) -> float:
        """sigma_s / sigma_t."""
        return self.sigma_s / self.sigma_t

    @property
    def gain(self) -> float:
        """alpha_s (1 - e^{-h}) = alpha_s h phi_1(-h): the weight of a constant y."""
        return -self.alpha_s * math.expm1(-self.h)


def steps(path: Path, grid: np.ndarray) -> list[Step]:
    """The steps of a grid toward the data."""
    found = []
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        scales = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
        found.append(Step(t, s, *scales, half_log_snr(*scales[2:]) - half_log_snr(*scales[:2])))
    return found


def half_log_snr(alpha: float, sigma: float) -> float:
    """lambda; -inf without signal, inf without noise."""
    if alpha == 0.0:
        return -math.inf
    return math.inf if sigma == 0.0 else math.log(alpha) - math.log(sigma)


def phi(k: int, z: float) -> float:
    """phi_k(z), k >= 1, finite z; the series where |z| is small."""
    if abs(z) < 0.5:
        term, total, n = 1.0 / math.factorial(k), 0.0, k
        while abs(term) > 1e-18 * abs(total):
            total, n = total + term, n + 1
            term *= z / n
        return total
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1.0 / math.factorial(j)) / z
    return value


def ratio(h: float, before: float) -> float:
    """h / before, 0 where the step before was infinite: its slope is unknown and taken as 0."""
    return 0.0 if math.isinf(before) else h / before
