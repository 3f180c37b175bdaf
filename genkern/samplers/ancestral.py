"""Euler's method on noise levels, and its ancestral form.

In the variance-exploding view u = x / alpha, s = sigma / alpha, the probability-flow ODE is du/ds = (u - y) / s with y
the predicted data, and the step from s_t to s_s is

    u <- y + (s_down / s_t) (u - y) + s_up z,     s_down^2 + s_up^2 = s_s^2,
    s_up = min(s_s, eta sqrt(s_s^2 (s_t^2 - s_s^2) / s_t^2)).

eta = 0 is Euler's method, eta = 1 the ancestral sampler: the variance of the noise is that of the posterior of u_s
given u_t and y. On a variance-preserving path these are DDIM's steps with the same eta (13.13), on others, such as
alpha = 1 (13.25), they are not. One network call a step, order 1. Karras et al., arXiv:2206.00364, algorithm 1 without
correction; the ancestral step is that of k-diffusion.
"""

from __future__ import annotations

import math

import numpy as np

from .. import check
from ..rows import Out
from .parameterization import OnPath
from .table import Stage, stage


class EulerAncestral:
    """Euler's step on sigma / alpha, then noise.

    Args:
        eta: >= 0: 0 no noise, 1 the posterior's.
    """

    order = 1

    def __init__(self, eta: float = 1.0) -> None:
        self.eta = check.number("eta", eta, 0.0)

    def stages(self, network: OnPath, grid: np.ndarray) -> list[Stage]:
        table = []
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            table.append(stage(network, t, self._out(network, t, s), pred=network.data(t), step=k, time=s))
        return table

    def _out(self, network: OnPath, t: float, s: float) -> Out:
        path = network.path
        alpha_t, sigma_t, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
        # sigma_up / alpha_s and sigma_down / alpha_s times alpha_s; s_s / s_t = fall may be 0 at both ends of the path.
        fall = sigma_s * alpha_t / (sigma_t * alpha_s)
        up = min(sigma_s, self.eta * sigma_s * math.sqrt(max(1.0 - fall**2, 0.0)))
        down = math.sqrt(max(sigma_s**2 - up**2, 0.0))
        return Out(y=alpha_s - down * alpha_t / sigma_t, x=down / sigma_t, z=up)
