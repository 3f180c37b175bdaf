"""The paths of sections 13.2 to 13.4: conditional optimal transport, and variance exploding."""

from __future__ import annotations

import math
from typing import Any

from .. import check
from .base import Path


class CondOT(Path):
    """The conditional optimal-transport path: alpha = t, sigma = 1 - (1 - sigma_min) t, t in [0, 1].

    Args:
        sigma_min: standard deviation around the data at t = 1, in [0, 1).

    Source: eqs. (13.21)-(13.22); sigma_min = 0 is the linear interpolation of (13.24).
    """

    start, stop = 0.0, 1.0

    def __init__(self, sigma_min: float = 0.0) -> None:
        self.sigma_min = check.number("sigma_min", sigma_min, 0.0, math.nextafter(1.0, 0.0))

    def alpha(self, t: Any) -> Any:
        return self.on_path(t)

    def sigma(self, t: Any) -> Any:
        return 1.0 - (1.0 - self.sigma_min) * self.on_path(t)

    def d_alpha(self, t: Any) -> Any:
        self.on_path(t)
        return 1.0

    def d_sigma(self, t: Any) -> Any:
        self.on_path(t)
        return -(1.0 - self.sigma_min)

    def time_at(self, noise_level: Any) -> Any:
        return 1.0 / (noise_level + 1.0 - self.sigma_min)


class VE(Path):
    """The variance-exploding path of section 13.4, (13.25) with sqrt(2t): alpha = 1, sigma = t, t in [0, stop]."""

    start = 0.0

    def __init__(self, stop: float = math.inf) -> None:
        self.stop = stop

    def alpha(self, t: Any) -> Any:
        self.on_path(t)
        return 1.0

    def sigma(self, t: Any) -> Any:
        return self.on_path(t)

    def d_alpha(self, t: Any) -> Any:
        self.on_path(t)
        return 0.0

    def d_sigma(self, t: Any) -> Any:
        self.on_path(t)
        return 1.0

    def time_at(self, noise_level: Any) -> Any:
        return noise_level
