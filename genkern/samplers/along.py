"""A network trained on one path, asked along another: change of path after training.

Two Gaussian paths differ by a change of time and of scale alone. At the time s(t) of the trained path (a, b) that has
the noise level of the other path (alpha, sigma) at t,

    b(s) / a(s) = sigma(t) / alpha(t),     x = c(t) x_s,     c = sqrt((alpha^2 + sigma^2) / (a^2 + b^2)),

so that the network, given x / c and s, tells the data y and the noise e of x, and dx/dt = alpha' y + sigma' e. The two
ODEs have the same solutions; a solver on a grid finds different ones. Where the path's ends have other noise levels
than the trained path's, there is no such s.

Shaul et al., arXiv:2310.19075 (scale-time transformations); Karras et al., arXiv:2206.00364.
"""

from __future__ import annotations

import math

from ..paths import Linear, Path
from .parameterization import OnPath

ROUNDING = 1e-9  # of the time, outside the trained path


class Along:
    """The Parameterization of a network trained on `trained` along `path`. Times are those of `path`.

    Args:
        trained: the network's path and prediction.
        path: with noise levels that the trained path has.

    Raises:
        ValueError: at a t whose noise level the trained path does not have, or where the network's prediction does not
            determine the data.
    """

    def __init__(self, trained: OnPath, path: Path) -> None:
        self.trained, self.path = trained, path
        self._matches: dict[float, tuple[float, float]] = {}  # a stage asks four times, and s may be found by bisection

    def _match(self, t: float) -> tuple[float, float]:
        """s and c."""
        if t not in self._matches:
            self._matches[t] = self._found(t)
        return self._matches[t]

    def _found(self, t: float) -> tuple[float, float]:
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        level, own = sigma / alpha if alpha else math.inf, self.trained.path
        s = float(own.time_at(level))
        if not own.start - ROUNDING <= s <= own.stop + ROUNDING:
            raise ValueError(
                f"along: expected noise levels sigma / alpha that the network's path has, got {level:g} at t = {t:g}"
            )
        s = min(max(s, own.start), own.stop)
        return s, math.hypot(alpha, sigma) / math.hypot(own.alpha(s), own.sigma(s))

    def data(self, t: float) -> Linear:
        s, c = self._match(t)
        y = self.trained.data(s)
        return Linear(y.x / c, y.m)

    def noise(self, t: float) -> Linear:
        """e = a x + b m, the predicted noise."""
        s, c = self._match(t)
        e = self.trained.noise(s)
        return Linear(e.x / c, e.m)

    def slope(self, t: float) -> Linear:
        s, c = self._match(t)
        y, e = self.trained.data(s), self.trained.path.noise(self.trained.prediction, s)
        d_alpha, d_sigma = self.path.d_alpha(t), self.path.d_sigma(t)
        if not (math.isfinite(d_alpha) and math.isfinite(d_sigma)):
            raise ValueError(f"t: the path has no finite slope at t = {t:g}")
        return Linear((d_alpha * y.x + d_sigma * e.x) / c, d_alpha * y.m + d_sigma * e.m)

    def has_slope(self, t: float) -> bool:
        try:
            self.slope(t)
        except ValueError:
            return False
        return True

    def input_scale(self, t: float) -> float:
        return 1.0 / self._match(t)[1]

    def model_time(self, t: float) -> float:
        return self.trained.model_time(self._match(t)[0])

    def scales(self, t: float) -> tuple[float, float]:
        return float(self.path.alpha(t)), float(self.path.sigma(t))
