"""What every Gaussian path x_t = alpha(t) x1 + sigma(t) x0 has: conversions between predictions, noise levels.

What a network predicts is a combination of data y and noise e, m = c_y y + c_e e:

    epsilon (0, 1)     sample (1, 0)     v (-sigma, alpha)     velocity (alpha', sigma')     score (0, -1/sigma)

so that with x = alpha y + sigma e every prediction gives every other: with D = alpha c_e - sigma c_y,

    y = (c_e x - sigma m) / D,       e = (alpha m - c_y x) / D.

Velocity is dx/dt along the path at fixed (x1, x0), eq. (13.22): u = (sigma'/sigma)(x - alpha x1) + alpha' x1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .. import check

PREDICTIONS = ("epsilon", "sample", "v", "velocity", "score")


class Linear(NamedTuple):
    """a x + b m: what is read off a state x and a network output m."""

    x: Any
    m: Any


class Path:
    """A Gaussian path. t is a float, a NumPy array or a torch tensor, and the results are of its kind.

    Attributes:
        start, stop: the ends of the path in t; t outside them is a ValueError where it is on the host.
    """

    start: float
    stop: float

    def alpha(self, t: Any) -> Any:
        """Scale of the data."""
        raise NotImplementedError

    def sigma(self, t: Any) -> Any:
        """Scale of the noise."""
        raise NotImplementedError

    def d_alpha(self, t: Any) -> Any:
        """Derivative of alpha by t."""
        raise NotImplementedError

    def d_sigma(self, t: Any) -> Any:
        """Derivative of sigma by t."""
        raise NotImplementedError

    def snr(self, t: Any) -> Any:
        """alpha^2 / sigma^2."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def noise_level(self, t: Any) -> Any:
        """sigma / alpha: the standard deviation of the noise on x / alpha."""
        return self.sigma(t) / self.alpha(t)

    def time_at(self, noise_level: Any) -> Any:
        """The t of a noise level (a number or an array): the inverse of noise_level."""
        raise NotImplementedError

    def on_path(self, t: Any) -> Any:
        """t as it is, inside the path: what the scales begin with. ValueError: outside, where it is on the host."""
        return check.inside("t", t, self.start, self.stop)

    def check_time(self, name: str, t: float) -> float:
        """A finite t on the path."""
        return check.number(name, t, self.start, self.stop)

    def composition(self, prediction: str, t: Any) -> tuple[Any, Any]:
        """(c_y, c_e) of m = c_y y + c_e e, the module's table."""
        check.choice("prediction", prediction, PREDICTIONS)
        if prediction == "epsilon":
            return 0.0, 1.0
        if prediction == "sample":
            return 1.0, 0.0
        if prediction == "v":
            return -self.sigma(t), self.alpha(t)
        if prediction == "velocity":
            return self.d_alpha(t), self.d_sigma(t)
        return 0.0, -1.0 / self.sigma(t)

    def data(self, prediction: str, t: Any) -> Linear:
        """y = a x + b m. Eq. (13.9) is that of epsilon.

        Raises:
            ValueError: at this t (a number) the prediction does not determine the data.
        """
        if prediction == "sample":
            return Linear(0.0, 1.0)
        if prediction == "epsilon":
            alpha = self.alpha(t)
            return self._finite(prediction, "the data", t, lambda: Linear(1.0 / alpha, -self.sigma(t) / alpha))
        sigma = self.sigma(t)
        if prediction == "score":
            alpha = self.alpha(t)
            return self._finite(prediction, "the data", t, lambda: Linear(1.0 / alpha, sigma * sigma / alpha))
        c_y, c_e = self.composition(prediction, t)
        d = self.alpha(t) * c_e - sigma * c_y
        return self._finite(prediction, "the data", t, lambda: Linear(c_e / d, -sigma / d))

    def noise(self, prediction: str, t: Any) -> Linear:
        """e = a x + b m.

        Raises:
            ValueError: at this t (a number) the prediction does not determine the noise.
        """
        if prediction == "epsilon":
            return Linear(0.0, 1.0)
        if prediction == "score":
            return Linear(0.0, -self.sigma(t))
        c_y, c_e = self.composition(prediction, t)
        d = self.alpha(t) * c_e - self.sigma(t) * c_y
        return self._finite(prediction, "the noise", t, lambda: Linear(-c_y / d, self.alpha(t) / d))

    def read(self, source: str, target: str, t: Any) -> Linear:
        """The prediction `target` from the prediction `source`: target = a x + b m.

        Raises:
            ValueError: an unknown prediction, or at this t (a number) the one does not determine the other.
        """
        check.choice("source", source, PREDICTIONS)
        check.choice("target", target, PREDICTIONS)
        if source == target:
            return Linear(0.0, 1.0)
        c_y, c_e = self._finite(target, "itself", t, lambda: self.composition(target, t))
        x, m = 0.0, 0.0
        for c, of in ((c_y, self.data), (c_e, self.noise)):
            if not _is_zero(c):
                found = of(source, t)
                x, m = x + c * found.x, m + c * found.m
        return Linear(x, m)

    def convert(self, m: Any, x: Any, t: Any, source: str, target: str) -> Any:
        """A network output m at (x, t), read as another prediction; one fused pass.

        Args:
            m: prediction `source`.  [B, ...].
            x: the state.  [B, ...].
            t: time; a number, or one a sample, [B].
            source, target: of "epsilon", "sample", "v", "velocity", "score".

        Returns:
            The prediction `target`.  [B, ...], x's dtype.

        Raises:
            ValueError: shapes or devices differ; an unknown prediction; t (a number) outside the path, or where
                source does not determine target.
        """
        from .. import fused, rows

        if isinstance(t, (int, float)):
            self.check_time("t", t)
        a, b = self.read(source, target, t)
        (result,) = fused.apply_row(rows.Row((rows.Out(x=a, m=b),)), x=x, m=m)
        return result

    def _finite(self, prediction: str, what: str, t: Any, of: Any) -> Any:
        with np.errstate(divide="ignore", invalid="ignore"):
            try:
                found = of()
            except ZeroDivisionError:
                found = (math.inf,)
        for c in found:
            if isinstance(c, (float, np.ndarray)) and not np.isfinite(c).all():
                raise ValueError(f"t: the prediction {prediction!r} does not determine {what} at t = {t}")
        return found


def _is_zero(c: Any) -> bool:
    return isinstance(c, float) and c == 0.0
