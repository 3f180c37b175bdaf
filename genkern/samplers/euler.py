"""Euler's method for dx/dt = v(x, t), either way in time: x_s = x + (s - t) v(x, t). One network call a step, order 1.

Eq. (13.31) with the Euler rule for the probability-flow ODE (13.27), and the flows of sections 13.2 and 13.3.
"""

from __future__ import annotations

import numpy as np

from ..rows import Out
from .parameterization import Parameterization
from .table import Stage, stage


class Euler:
    """x + dt v."""

    order = 1

    def stages(self, network: Parameterization, grid: np.ndarray) -> list[Stage]:
        table = []
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            table.append(euler_stage(network, t, s, step=k, time=s))
        return table


def euler_stage(network: Parameterization, t: float, s: float, *, step: int, time: float | None) -> Stage:
    """From t to s along the slope at t."""
    dt, v = s - t, network.slope(t)
    return stage(network, t, Out(x=1.0 + dt * v.x, m=dt * v.m), step=step, time=time)
