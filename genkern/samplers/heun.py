"""Heun's method for dx/dt = v(x, t): the trapezoid over an Euler step. Two network calls a step, order 2.

    x~  = x + dt v(x, t)
    x_s = x + dt/2 (v(x, t) + v(x~, s)) = x/2 + x~/2 + (dt/2) v(x~, s)

The second form needs no first slope, only the state that the step started from. Where the slope at s is not finite (the
probability-flow ODE at s = 0) the step is Euler's. Ascher, Petzold 1998, section 4.1; Karras et al.,
arXiv:2206.00364, algorithm 1.
"""

from __future__ import annotations

import numpy as np

from ..rows import Out
from .euler import euler_stage
from .parameterization import Parameterization
from .table import Stage, stage


class Heun:
    """x + dt/2 (v + v_next)."""

    order = 2

    def stages(self, network: Parameterization, grid: np.ndarray) -> list[Stage]:
        table = []
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            if not network.has_slope(s):
                table.append(euler_stage(network, t, s, step=k, time=s))
                continue
            table.append(euler_stage(network, t, s, step=k, time=None))
            half, v = (s - t) / 2.0, network.slope(s)
            out = Out(h=(0.5,), x=0.5 + half * v.x, m=half * v.m)
            table.append(stage(network, s, out, step=k, time=s))
        return table
