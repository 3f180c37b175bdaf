"""The classical Runge-Kutta method for dx/dt = v(x, t): four network calls a step, order 4.

    k_1 = v(x, t),   k_2 = v(x + dt/2 k_1, t + dt/2),   k_3 = v(x + dt/2 k_2, t + dt/2),   k_4 = v(x + dt k_3, s)
    x_s = x + dt/6 (k_1 + 2 k_2 + 2 k_3 + k_4)

The loop's memory holds x (slot 0) and the sum as far as it is known (slot 1), so no slope is kept. Where the slope at
s is not finite (the probability-flow ODE at s = 0) the step is the midpoint method's. Kutta 1901; Ascher, Petzold
1998, section 4.1.
"""

from __future__ import annotations

import numpy as np

from ..rows import Out
from .midpoint import midpoint_stages
from .parameterization import Parameterization
from .table import Stage, stage


class RK4:
    """x + dt/6 (k_1 + 2 k_2 + 2 k_3 + k_4)."""

    order = 4

    def stages(self, network: Parameterization, grid: np.ndarray) -> list[Stage]:
        table = []
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            step = _rk4_stages if network.has_slope(s) else midpoint_stages
            table += step(network, t, s, step=k)
        return table


def _rk4_stages(network: Parameterization, t: float, s: float, *, step: int) -> list[Stage]:
    dt, middle = s - t, t + (s - t) / 2.0
    first, half, last = network.slope(t), network.slope(middle), network.slope(s)
    a, b, c = dt / 2.0, dt / 3.0, dt / 6.0
    return [
        stage(
            network, t, Out(x=1.0 + a * first.x, m=a * first.m), step=step, time=None,
            keeps=((0, Out(x=1.0)), (1, Out(x=1.0 + c * first.x, m=c * first.m))),
        ),
        stage(
            network, middle, Out(x=a * half.x, m=a * half.m, h=(1.0, 0.0)), step=step, time=None, reads=(0, 1),
            keeps=((1, Out(x=b * half.x, m=b * half.m, h=(0.0, 1.0))),),
        ),
        stage(
            network, middle, Out(x=dt * half.x, m=dt * half.m, h=(1.0, 0.0)), step=step, time=None, reads=(0, 1),
            keeps=((1, Out(x=b * half.x, m=b * half.m, h=(0.0, 1.0))),),
        ),
        stage(network, s, Out(x=c * last.x, m=c * last.m, h=(1.0,)), step=step, time=s, reads=(1,)),
    ]  # fmt: skip
