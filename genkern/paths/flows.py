"""The paths of sections 13.2 to 13.4: conditional optimal transport, variance exploding; one known by its velocity."""

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
        return 1.0 / (noise_level + (1.0 - self.sigma_min))


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


class VelocityOnly(Path):
    """A path of which a network says the velocity alone, t in [0, 1]: x_t is no alpha(t) x1 + sigma(t) x0 with the same
    scales in every sample, so that no data can be read off x_t and v. Its source is N(0, I), sigma(0) = 1.

    alpha, sigma at other times, and their derivatives raise a ValueError: what asks for them (guide, init, mask,
    apg, along) has no meaning here.
    """

    start, stop = 0.0, 1.0

    def alpha(self, t: Any) -> Any:
        raise self._unknown("alpha")

    def sigma(self, t: Any) -> Any:
        if isinstance(t, float) and t == 0.0:
            return 1.0
        raise self._unknown("sigma")

    def d_alpha(self, t: Any) -> Any:
        raise self._unknown("alpha'")

    def d_sigma(self, t: Any) -> Any:
        raise self._unknown("sigma'")

    def time_at(self, noise_level: Any) -> Any:
        raise self._unknown("noise level")

    @staticmethod
    def _unknown(what: str) -> ValueError:
        return ValueError(f"path: this flow has a velocity, and no {what} by which data could be read off a state")
