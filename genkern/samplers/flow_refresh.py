"""Steps of a flow that replace part of the noise, between scales that the path prescribes.

CPS, whose coefficients of data and noise are the path's at every step, as DDIM's are (its row with d = sigma_s sin):

    x_s = alpha_s y + sigma_s cos(eta pi / 2) e + sigma_s sin(eta pi / 2) z

with y and e the data and noise that the network predicts. On data of one point its marginals are exact at any number of
steps; elsewhere its variance is off by O(eta^4) a step.

Overshooting: an Euler step to a time beyond s, then back to s with new noise, by the path's own transition:

    o = t + (1 + c)(s - t), at most the path's end,     x_o = x + (o - t) v
    x_s = (alpha_s / alpha_o) x_o + sqrt(sigma_s^2 - (alpha_s sigma_o / alpha_o)^2) z

which keeps the marginals up to the error of the Euler step: order 1. Both lead toward the data, one call a step.

Wang, Yu, arXiv:2509.05952 (CPS); Hu et al., arXiv:2411.19415 (overshooting).
"""

from __future__ import annotations

import math
from typing import Any

from .. import check
from .flow_sde import Coefficients, Stochastic
from .parameterization import OnPath


class CPS(Stochastic):
    """x_s = alpha_s y + sigma_s cos(eta pi / 2) e + sigma_s sin(eta pi / 2) z.

    Args:
        eta: 0 (DDIM: Euler's method where the path is straight) to 1 (all of the noise is new).

    Raises:
        ValueError, TypeError: an argument is not what it may be; a step away from the data.
    """

    def __init__(self, eta: float = 0.7) -> None:
        self.eta = check.number("eta", eta, 0.0, 1.0)

    def coefficients(self, network: OnPath, t: Any, s: Any) -> Coefficients:
        _toward_data(t, s)
        alpha, sigma = network.scales(s)
        y, e = network.data(t), network.noise(t)
        kept, new = sigma * math.cos(self.eta * math.pi / 2), sigma * math.sin(self.eta * math.pi / 2)
        return Coefficients(alpha * y.x + kept * e.x, alpha * y.m + kept * e.m, new)


class Overshoot(Stochastic):
    """An Euler step beyond s, and new noise back to s.

    Args:
        c: how far beyond, in steps, >= 0; 0 is Euler's method.

    Raises:
        ValueError, TypeError: an argument is not what it may be; a step away from the data.
    """

    def __init__(self, c: float = 1.0) -> None:
        self.c = check.number("c", c, 0.0)

    def coefficients(self, network: OnPath, t: Any, s: Any) -> Coefficients:
        _toward_data(t, s)
        o = t + (1.0 + self.c) * (s - t)
        o = o.clamp(max=1.0) if check.is_tensor(o) else min(o, 1.0)
        (alpha_s, sigma_s), (alpha_o, sigma_o) = network.scales(s), network.scales(o)
        back, v = alpha_s / alpha_o, network.slope(t)
        variance = sigma_s**2 - (back * sigma_o) ** 2  # rounding may make it negative where o is s
        new = variance.clamp(min=0.0).sqrt() if check.is_tensor(variance) else math.sqrt(max(variance, 0.0))
        return Coefficients(back * (1.0 + (o - t) * v.x), back * (o - t) * v.m, new)


def _toward_data(t: Any, s: Any) -> None:
    """ValueError: numbers with s < t."""
    if not check.is_tensor(t) and not check.is_tensor(s) and s < t:
        raise ValueError(f"times: expected increasing times, toward the data, with this sampler, got {t:g} to {s:g}")
