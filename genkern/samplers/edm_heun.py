"""Heun's method on noise levels with churn: the stochastic sampler of EDM. Two network calls a step, order 2.

In u = x / alpha, with s = sigma / alpha the noise level and y the predicted data, a step from t_i to t_{i+1} of N is

    s^  = (1 + gamma) s_i,    gamma = min(S_churn / N, sqrt(2) - 1) where S_min <= s_i <= S_max, else 0
    u^  = u_i + S_noise sqrt(s^^2 - s_i^2) z                                                     churn
    u~  = u^ + (s_{i+1} - s^) (u^ - y^) / s^                                                     Euler
    u_{i+1} = u^ + (s_{i+1} - s^) ((u^ - y^) / s^ + (u~ - y~) / s_{i+1}) / 2
            = (u^ + u~) / 2 + c (u~ - y~),    c = (s_{i+1} - s^) / (2 s_{i+1})                   corrected

and ends with Euler's step where s_{i+1} = 0, or where s^ is infinite. The churn of step i + 1 is in the row that ends
step i: what follows a step is u^ at the noise level s^, and so are the states of a trajectory or a callback. The first
step's churn is in the row that makes the initial state. s^ is at most the path's highest noise level. S_churn = 0 is
the ODE's Heun method. The slope is integrated over s itself: a first step from s = 10^4 to 10, as even timesteps of the
squared cosine have it, is far too long, and a grid of noise levels (spacing="karras") is what it is for. Karras,
Aittala, Aila, Laine, arXiv:2206.00364, algorithm 2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from .. import check
from ..paths import VE, DiscreteVP, Path
from ..rows import Out
from .parameterization import OnPath, Preconditioned
from .table import Stage, stage

MOST = math.sqrt(2.0) - 1.0  # gamma, which at most doubles the noise's variance


@dataclasses.dataclass(frozen=True)
class Level:
    """A time of the path: its scales and noise level."""

    t: float
    alpha: float
    sigma: float

    @property
    def s(self) -> float:
        """sigma / alpha."""
        return self.sigma / self.alpha if self.alpha > 0.0 else math.inf


class EDMHeun:
    """Heun's method on noise levels, with churn.

    Args:
        s_churn: S_churn >= 0, of all steps together; 0 adds no noise.
        s_min, s_max: the noise levels sigma / alpha between which it is added, 0 <= s_min <= s_max.
        s_noise: S_noise >= 0, the standard deviation of z; slightly above 1 counters the loss of detail.

    Raises:
        ValueError: an argument outside its range.
    """

    order = 2

    def __init__(self, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = math.inf, s_noise: float = 1.0) -> None:
        self.s_churn = check.number("s_churn", s_churn, 0.0)
        self.s_min = check.number("s_min", s_min, 0.0)
        self.s_max = math.inf if s_max == math.inf else check.number("s_max", s_max, self.s_min)
        self.s_noise = check.number("s_noise", s_noise, 0.0)

    def stages(self, network: OnPath | Preconditioned, grid: np.ndarray) -> list[Stage]:
        path: Path = network.path if isinstance(network, OnPath) else VE()
        levels = [Level(t, path.alpha(t), path.sigma(t)) for t in grid.tolist()]
        n = len(levels) - 1
        table: list[Stage] = []
        start, before = self._churned(path, levels[0], n)
        for k in range(n):
            last = k + 1 == n
            end, churn = (levels[n], Out(x=1.0)) if last else self._churned(path, levels[k + 1], n)
            table += _step(network, start, levels[k + 1], k, churn, end.t)
            start = end
        if before != Out(x=1.0):
            table[0] = dataclasses.replace(table[0], before=before)
        return table

    def _churned(self, path: Path, level: Level, n: int) -> tuple[Level, Out]:
        """s^ and u^ by x and z, from a noise level."""
        gamma = min(self.s_churn / n, MOST) if self.s_min <= level.s <= self.s_max else 0.0
        if gamma == 0.0 or math.isinf(level.s):
            return level, Out(x=1.0)
        s = min((1.0 + gamma) * level.s, _highest(path))
        if s <= level.s:
            return level, Out(x=1.0)
        t = float(path.time_at(s))
        found = Level(t, path.alpha(t), path.sigma(t))
        return found, Out(x=found.alpha / level.alpha, z=found.alpha * self.s_noise * math.sqrt(s * s - level.s**2))


def _step(network: Any, start: Level, end: Level, k: int, churn: Out, time: float) -> list[Stage]:
    """The stages from a churned level to the next, which the last of them churns."""
    decay = end.sigma / start.sigma
    euler = Out(y=end.alpha - decay * start.alpha, x=decay)
    if end.sigma == 0.0 or math.isinf(start.s):
        return [stage(network, start.t, _then(euler, churn), pred=network.data(start.t), step=k, time=time)]
    c = (end.s - start.s) / (2.0 * end.s)
    corrected = Out(h=(0.5 * end.alpha / start.alpha,), x=0.5 + c, y=-end.alpha * c)
    return [
        stage(network, start.t, euler, pred=network.data(start.t), step=k, time=None),
        stage(network, end.t, _then(corrected, churn), pred=network.data(end.t), step=k, time=time),
    ]


def _then(out: Out, churn: Out) -> Out:
    """A row, and then the churn of what it gives."""
    c = churn.x
    return Out(y=c * out.y, x=c * out.x, h=tuple(c * h for h in out.h), z=churn.z)


def _highest(path: Path) -> float:
    """The highest noise level of a path, of a table the highest that is finite."""
    if isinstance(path, DiscreteVP):
        return float(path.noise_level(path.finite - 1))
    ends = [Level(t, path.alpha(t), path.sigma(t)).s for t in (path.start, path.stop) if math.isfinite(t)]
    return max(ends) if math.isfinite(path.stop) else math.inf
