"""Sampling with a consistency function f(x, t), the map to the start epsilon of the trajectory through (x, t).

    x <- f(x_T, T);   then for every further time t:   x <- f(x + sqrt(t^2 - epsilon^2) z, t)

One time is one-step generation. One network call a step, with the re-noising for the next in the same pass.
Song, Dhariwal, Chen, Sutskever, arXiv:2303.01469, algorithm 1.
"""

from __future__ import annotations

import math

import numpy as np

from .. import check
from ..rows import Out
from .parameterization import Parameterization
from .table import Stage, stage


class Multistep:
    """f, re-noise, f, ...

    Args:
        epsilon: the time that f leads to.
    """

    order = 1

    def __init__(self, epsilon: float) -> None:
        self.epsilon = check.number("epsilon", epsilon, 0.0)

    def stages(self, network: Parameterization, grid: np.ndarray) -> list[Stage]:
        """grid: the times of f, decreasing from T, then epsilon."""
        table = []
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            renoise = math.sqrt(max(s**2 - self.epsilon**2, 0.0))
            table.append(stage(network, t, Out(y=1.0, z=renoise), pred=network.data(t), step=k, time=s))
        return table
