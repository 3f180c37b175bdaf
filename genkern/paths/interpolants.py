"""Paths from noise at t = 0 to data at t = 1: x_t = alpha(t) x1 + sigma(t) x0.

    Cosine         alpha = sin(pi t / 2), sigma = cos(pi t / 2): the great circle, alpha^2 + sigma^2 = 1, at even speed
    Polynomial     alpha = t^n, sigma = 1 - t^n: the straight line at another speed
    Custom         any pair of functions, their derivatives by autograd
    Reversed       another path with its time the other way round: variance preserving, variance exploding

Cosine is spherical interpolation: between orthogonal x0 and x1, as they nearly are in many dimensions, slerp has these
weights. Albergo, Vanden-Eijnden, arXiv:2209.15571; Lipman et al., arXiv:2412.06264.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import check
from .base import Path
from .continuous import _argument, _result
from .discrete import DiscreteVP


class Cosine(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2), t in [0, 1]; also called trigonometric, or spherical."""

    start, stop = 0.0, 1.0

    def alpha(self, t: Any) -> Any:
        return self._of(t, "sin", 1.0)

    def sigma(self, t: Any) -> Any:
        return self._of(t, "cos", 1.0)

    def d_alpha(self, t: Any) -> Any:
        return self._of(t, "cos", 0.5 * math.pi)

    def d_sigma(self, t: Any) -> Any:
        return self._of(t, "sin", -0.5 * math.pi)

    def time_at(self, noise_level: Any) -> Any:
        level, xp = _argument(noise_level)
        return _result(1.0 - xp.arctan(level) * (2.0 / math.pi))

    def _of(self, t: Any, function: str, scale: float) -> Any:
        time, xp = _argument(self.on_path(t))
        # cos as the sine of the rest, so that it is 0 at t = 1.
        angle = 0.5 * math.pi * (time if function == "sin" else 1.0 - time)
        return _result(scale * xp.sin(angle))


class Polynomial(Path):
    """alpha = t^n, sigma = 1 - t^n, t in [0, 1]; n = 1 is CondOT().

    Args:
        n: >= 1, so that the velocity is finite at t = 0. It is 0 there for n > 1, and so says nothing about the data.
    """

    start, stop = 0.0, 1.0

    def __init__(self, n: float = 2.0) -> None:
        self.n = check.number("n", n, 1.0)

    def alpha(self, t: Any) -> Any:
        return self.on_path(t) ** self.n

    def sigma(self, t: Any) -> Any:
        return 1.0 - self.alpha(t)

    def d_alpha(self, t: Any) -> Any:
        return self.n * self.on_path(t) ** (self.n - 1.0)

    def d_sigma(self, t: Any) -> Any:
        return -self.d_alpha(t)

    def time_at(self, noise_level: Any) -> Any:
        return (1.0 / (1.0 + noise_level)) ** (1.0 / self.n)


class Custom(Path):
    """A path of any two functions, whose derivatives autograd finds.

    Args:
        alpha, sigma: from a tensor of times to one of its shape, element by element, with torch operations; called on
            the host, in float64, for the rows of a sampler, and on the times [B] of a loss where they are.
        start, stop: the ends of the path in t, start < stop.

    Raises:
        TypeError: alpha or sigma is not callable, or returns no tensor. ValueError: not start < stop, or another shape.
    """

    def __init__(
        self, alpha: Callable[[Any], Any], sigma: Callable[[Any], Any], start: float = 0.0, stop: float = 1.0
    ) -> None:
        for name, of in (("alpha", alpha), ("sigma", sigma)):
            if not callable(of):
                raise TypeError(f"{name}: expected a callable of a tensor of times, got {type(of).__name__}")
        if not check.number("start", start) < check.number("stop", stop):
            raise ValueError(f"start, stop: expected start < stop, got {start} and {stop}")
        self._functions = {"alpha": alpha, "sigma": sigma}
        self.start, self.stop = float(start), float(stop)

    def alpha(self, t: Any) -> Any:
        return self._of("alpha", t, False)

    def sigma(self, t: Any) -> Any:
        return self._of("sigma", t, False)

    def d_alpha(self, t: Any) -> Any:
        return self._of("alpha", t, True)

    def d_sigma(self, t: Any) -> Any:
        return self._of("sigma", t, True)

    def time_at(self, noise_level: Any) -> Any:
        """By bisection of atan(sigma / alpha), which has to be monotone.

        Raises:
            ValueError: a noise level that the path does not have.
        """
        wanted = np.arctan(np.asarray(noise_level, dtype=np.float64))
        low, high = (np.full(wanted.shape, end) for end in (self.start, self.stop))
        ends = self._angle(low), self._angle(high)
        least, most, rounding = np.minimum(*ends), np.maximum(*ends), 1e-12
        if np.isnan(wanted).any() or (wanted < least - rounding).any() or (wanted > most + rounding).any():
            raise ValueError(f"noise_level: expected sigma / alpha of some t on the path, got {noise_level}")
        rising = ends[1] > ends[0]
        for _ in range(60):  # a float64 has 52 bits
            middle = 0.5 * (low + high)
            before = (self._angle(middle) < wanted) == rising
            low, high = np.where(before, middle, low), np.where(before, high, middle)
        return _result(0.5 * (low + high))

    def _angle(self, t: np.ndarray) -> np.ndarray:
        return np.arctan2(self.sigma(t), self.alpha(t))

    def _of(self, name: str, t: Any, derivative: bool) -> Any:
        import torch

        t = self.on_path(t)
        time = t.detach() if check.is_tensor(t) else torch.as_tensor(np.asarray(t, dtype=np.float64))
        with torch.enable_grad() if derivative else torch.no_grad():
            time = time.clone().requires_grad_(True) if derivative else time
            found = self._functions[name](time)
            if not isinstance(found, torch.Tensor):
                raise TypeError(f"{name}: expected a tensor from the function, got {type(found).__name__}")
            if found.shape != time.shape:
                raise ValueError(f"{name}: expected shape {tuple(time.shape)} from it, got {tuple(found.shape)}")
            if derivative and not found.requires_grad:
                found = torch.zeros_like(time)
            elif derivative:
                (found,) = torch.autograd.grad(found.sum(), time)
        return found.detach() if check.is_tensor(t) else _result(found.numpy())


class Reversed(Path):
    """A path with its time reversed and mapped to [0, 1]: r from 0, the other's stop, to 1, the other's start.

    Reversed(LinearVP()) and Reversed(CosineVP()) preserve variance from noise at 0 to data at 1, Reversed(VE(80.0)) has
    x_0 = x1 + 80 x0. The velocity of LinearVP is infinite at its data.

    Args:
        path: with continuous t between finite ends.

    Raises:
        TypeError: no such path. ValueError: an end that is infinite.
    """

    start, stop = 0.0, 1.0

    def __init__(self, path: Path) -> None:
        if not isinstance(path, Path) or isinstance(path, DiscreteVP):
            raise TypeError(f"path: expected a path with continuous times, got {type(path).__name__}")
        if not (math.isfinite(path.start) and math.isfinite(path.stop)):
            raise ValueError(f"path: expected finite ends in t, got {path.start} and {path.stop}")
        self.path, self._length = path, path.stop - path.start

    def alpha(self, t: Any) -> Any:
        return self.path.alpha(self._time(t))

    def sigma(self, t: Any) -> Any:
        return self.path.sigma(self._time(t))

    def d_alpha(self, t: Any) -> Any:
        return -self._length * self.path.d_alpha(self._time(t))

    def d_sigma(self, t: Any) -> Any:
        return -self._length * self.path.d_sigma(self._time(t))

    def time_at(self, noise_level: Any) -> Any:
        return (self.path.stop - self.path.time_at(noise_level)) / self._length

    def _time(self, t: Any) -> Any:
        return self.path.start + (1.0 - self.on_path(t)) * self._length
