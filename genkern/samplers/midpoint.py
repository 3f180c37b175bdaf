"""The midpoint method for dx/dt = v(x, t): two network calls a step, order 2.

    x~  = x + dt/2 v(x, t)
    x_s = x + dt v(x~, t + dt/2)

It never asks for the slope at the end of a step. Ascher, Petzold 1998, section 4.1.
"""

from __future__ import annotations

import numpy as np

from ..rows import Out
from .euler import euler_stage
from .parameterization import Parameterization
from .table import Stage, stage


class Midpoint:
    """x + dt v at the midpoint."""

    order = 2

    def stages(self, network: Parameterization, grid: np.ndarray) -> list[Stage]:
        table = []
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            table += midpoint_stages(network, t, s, step=k)
        return table


def midpoint_stages(network: Parameterization, t: float, s: float, *, step: int) -> list[Stage]:
    """From t to s along the slope halfway."""
    middle = t + (s - t) / 2.0
    dt, v = s - t, network.slope(middle)
    out = Out(h=(1.0,), x=dt * v.x, m=dt * v.m)
    return [
        euler_stage(network, t, middle, step=step, time=None),
        stage(network, middle, out, step=step, time=s),
    ]
