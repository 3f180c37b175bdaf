"""TrigFlow: the variance-preserving circle, its network, and sampling with a consistency function on it.

    x_t = cos(t) x + sin(t) z,      x data of standard deviation sd,  z ~ N(0, sd^2 I),      t in [0, pi/2]
    f(x, t) = cos(t) x - sin(t) sd F(x / sd, t),      dx/dt = sd F(x / sd, t)

the first being the data's estimate of a diffusion model and a consistency function alike, as f(x, 0) = x. A sampler is

    x <- f(x, t);   then for every further time s:   x <- f(cos(s) x + sin(s) z, s).

Lu, Song, arXiv:2410.11081, eqs. (4), (5) and algorithm 1's notation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import check
from ..paths import Linear
from ..rows import Out
from .parameterization import Parameterization
from .table import Stage, stage


class Trig:
    """A network F of TrigFlow.

    Args:
        sigma_data: sd, > 0.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not check.number("sigma_data", sigma_data) > 0.0:
            raise ValueError(f"sigma_data: expected a number > 0, got {sigma_data}")
        self.sigma_data = float(sigma_data)

    def data(self, t: Any) -> Linear:
        """f; t a float or a tensor."""
        cos, sin = (t.cos(), t.sin()) if check.is_tensor(t) else (math.cos(t), math.sin(t))
        return Linear(cos, -self.sigma_data * sin)

    def slope(self, t: float) -> Linear:
        return Linear(0.0, self.sigma_data)

    def has_slope(self, t: float) -> bool:
        return True

    def input_scale(self, t: float) -> float:
        return 1.0 / self.sigma_data

    def model_time(self, t: float) -> float:
        return t

    def scales(self, t: float) -> tuple[float, float]:
        return math.cos(t), self.sigma_data * math.sin(t)


class TrigMultistep:
    """f, re-noise, f, ...

    Args:
        sigma_data: sd, of the noise.
    """

    order = 1

    def __init__(self, sigma_data: float) -> None:
        self.sigma_data = float(sigma_data)

    def stages(self, network: Parameterization, grid: np.ndarray) -> list[Stage]:
        """grid: the times of f, decreasing, then 0."""
        table = []
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            out = Out(y=math.cos(s), z=self.sigma_data * math.sin(s))
            table.append(stage(network, t, out, pred=network.data(t), step=k, time=s))
        return table
