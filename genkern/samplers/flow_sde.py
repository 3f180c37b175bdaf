"""Euler-Maruyama for the SDEs that have a flow's marginals: noise is added, and the score takes as much away.

    dx = (v - r e) dt + sqrt(2 sigma r) dw,     r = g^2 / (2 sigma),     e = -sigma score = the noise that v predicts
    x_s = x + (s - t) v - |s - t| r e + sqrt(2 sigma r |s - t|) z

for any g(t), toward the data or away from it. One network call a step, order 1 for mean and variance. Two choices of g:

    "sigma"       g^2 = eta^2 sigma              r = eta^2 / 2, finite at both ends
    "flow_grpo"   g^2 = eta^2 sigma / alpha      r = eta^2 / (2 alpha); the step from alpha = 0 takes alpha at its end

The second one's steps near the noise add variance of order 1 each, whatever their length: its ends have the marginals'
variance only up to what later steps forget (the CPS of flow_refresh.py is meant to mend that).

Song et al., arXiv:2011.13456; Ma et al., arXiv:2401.08740 (SiT), w = sigma; Liu et al., arXiv:2505.05470 (Flow-GRPO),
with time reversed, and its code's first step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .. import check
from ..rows import Out
from .parameterization import OnPath
from .table import Stage, stage

DIFFUSIONS = ("sigma", "flow_grpo")


class Coefficients(NamedTuple):
    """x_s = x x_t + m (network output) + z (normal noise). Numbers, or tensors [B]."""

    x: Any
    m: Any
    z: Any


class Stochastic:
    """A sampler whose steps are one network call and one row of x, m and z; `coefficients` takes t and s as numbers
    or as float64 tensors [B]."""

    order = 1

    def coefficients(self, network: OnPath, t: Any, s: Any) -> Coefficients:
        """Of the step from t to s."""
        raise NotImplementedError

    def stages(self, network: OnPath, grid: np.ndarray) -> list[Stage]:
        if not callable(getattr(network, "noise", None)):
            raise ValueError("sampler: expected a solver of dx/dt = v(x, t), got an SDE's, which is a flow's alone")
        table = []
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            x, m, z = self.coefficients(network, t, s)
            table.append(stage(network, t, Out(x=x, m=m, z=z), step=k, time=s))
        return table


class EulerMaruyama(Stochastic):
    """x_s = x + (s - t) v - |s - t| r e + sqrt(2 sigma r |s - t|) z.

    Args:
        eta: of the noise, >= 0; 0 is Euler's method. Flow-GRPO takes 0.7.
        diffusion: "sigma" or "flow_grpo".

    Raises:
        ValueError, TypeError: an argument is not what it may be.
    """

    def __init__(self, eta: float = 1.0, diffusion: str = "sigma") -> None:
        self.eta = check.number("eta", eta, 0.0)
        self.diffusion = check.choice("diffusion", diffusion, DIFFUSIONS)

    def coefficients(self, network: OnPath, t: Any, s: Any) -> Coefficients:
        dt, (_, sigma) = s - t, network.scales(t)
        size = abs(dt)
        v, e = network.slope(t), network.noise(t)
        r = 0.5 * self.eta**2 * self._over(network, t, s)
        return Coefficients(1.0 + dt * v.x - size * r * e.x, dt * v.m - size * r * e.m, (2.0 * sigma * r * size) ** 0.5)

    def _over(self, network: OnPath, t: Any, s: Any) -> Any:
        """1, or 1 / alpha."""
        if self.diffusion == "sigma":
            return 1.0
        alpha, further = network.scales(t)[0], network.scales(s)[0]
        return 1.0 / (alpha + further * (alpha == 0.0))
