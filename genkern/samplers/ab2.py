"""The two-step Adams-Bashforth method for dx/dt = v(x, t): one network call a step, order 2.

    x_s = x + h ((1 + r/2) v - (r/2) v_before),     h = s - t,   r = h / h_before

v_before is the slope of the step before, kept in the loop's memory (slot 0); r = 1 on even grids. The first step, which
has none, is Euler's: made once, its error is of order 2 too. Bashforth, Adams 1883; Ascher, Petzold 1998, section 5.1.
"""

from __future__ import annotations

import numpy as np

from ..rows import Out
from .parameterization import Parameterization
from .table import Stage, stage


class AB2:
    """x + h ((1 + r/2) v - (r/2) v_before)."""

    order = 2

    def stages(self, network: Parameterization, grid: np.ndarray) -> list[Stage]:
        table, before = [], None
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            h, v = s - t, network.slope(t)
            half = 0.0 if before is None else 0.5 * h / before
            now = h * (1.0 + half)
            older = () if before is None else (-h * half,)
            out = Out(x=1.0 + now * v.x, m=now * v.m, h=older)
            kept = ((0, Out(x=v.x, m=v.m)),)
            table.append(stage(network, t, out, step=k, time=s, reads=(0,) if older else (), keeps=kept))
            before = h
        return table
