"""What a network's output says about the state, at host times in float64.

A sampler asks for the data, y = a x + b m, or for the slope of the ODE, dx/dt = a x + b m. Two kinds of network answer:

    OnPath            predicts epsilon, v, ... along a Gaussian path (paths.py); sees x itself and t
    Preconditioned    y = c_skip(s) x + c_out(s) F(c_in(s) x, c_noise(s)), eq. (13.29), on x = data + s z

    c_skip = sd^2 / ((s - e)^2 + sd^2)    c_out = (s - e) sd / sqrt(s^2 + sd^2)
    c_in = 1 / sqrt(s^2 + sd^2)           c_noise = ln(s) / 4

with sd the standard deviation of the data and e = epsilon for a consistency model, so that c_skip(e) = 1 and
c_out(e) = 0: the boundary condition. e = 0 is the denoiser of a diffusion model (the teacher), and the slope of its
probability-flow ODE (13.27) is dx/ds = -s score = (x - y) / s.

Song, Dhariwal, Chen, Sutskever, arXiv:2303.01469, appendix C; Karras et al., arXiv:2206.00364, table 1.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from .. import check
from ..paths import Linear, Path


class Parameterization(Protocol):
    """How a network's output reads along a path. Every t is a host number."""

    def data(self, t: float) -> Linear:
        """y = a x + b m, the predicted data."""

    def slope(self, t: float) -> Linear:
        """dx/dt = a x + b m."""

    def has_slope(self, t: float) -> bool:
        """Whether the slope is finite at t."""

    def input_scale(self, t: float) -> float:
        """The network is given this times x."""

    def model_time(self, t: float) -> float:
        """The network is told this."""

    def scales(self, t: float) -> tuple[float, float]:
        """alpha and sigma of the path: x = alpha data + sigma noise."""


class OnPath:
    """A network that predicts `prediction` on `path`, given x and t as they are, or the nearest integer to t."""

    def __init__(self, path: Path, prediction: str, round_times: bool = False) -> None:
        self.path, self.prediction, self.round_times = path, prediction, round_times

    def data(self, t: float) -> Linear:
        return self.path.data(self.prediction, t)

    def noise(self, t: Any) -> Linear:
        """e = a x + b m, the predicted noise."""
        return self.path.noise(self.prediction, t)

    def slope(self, t: float) -> Linear:
        return self.path.read(self.prediction, "velocity", t)

    def has_slope(self, t: float) -> bool:
        try:
            self.slope(t)
        except ValueError:
            return False
        return True

    def input_scale(self, t: float) -> float:
        return 1.0

    def model_time(self, t: float) -> float:
        return float(round(t)) if self.round_times else t

    def scales(self, t: Any) -> tuple[Any, Any]:
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        return (alpha, sigma) if check.is_tensor(t) else (float(alpha), float(sigma))


class Preconditioned:
    """A network F inside eq. (13.29).

    Args:
        sigma_data: sd, standard deviation of the data, > 0.
        epsilon: the time of the boundary condition, >= 0; 0 for a denoiser.

    Its c_* take a float or a torch tensor.
    """

    def __init__(self, sigma_data: float = 0.5, epsilon: float = 0.0) -> None:
        if not check.number("sigma_data", sigma_data) > 0.0:
            raise ValueError(f"sigma_data: expected a number > 0, got {sigma_data}")
        self.sigma_data = float(sigma_data)
        self.epsilon = check.number("epsilon", epsilon, 0.0)

    def c_skip(self, s: Any) -> Any:
        sd = self.sigma_data
        return sd * sd / ((s - self.epsilon) ** 2 + sd * sd)

    def c_out(self, s: Any) -> Any:
        return (s - self.epsilon) * self.sigma_data * self.c_in(s)

    def c_in(self, s: Any) -> Any:
        return (s * s + self.sigma_data**2) ** -0.5

    def c_noise(self, s: Any) -> Any:
        return torch.special.xlogy(0.25, s) if check.is_tensor(s) else math.log(s) / 4.0

    def data(self, t: float) -> Linear:
        return Linear(self.c_skip(t), self.c_out(t))

    def slope(self, t: float) -> Linear:
        y = self.data(t)
        return Linear((1.0 - y.x) / t, -y.m / t)

    def has_slope(self, t: float) -> bool:
        return t > 0.0

    def input_scale(self, t: float) -> float:
        return float(self.c_in(t))

    def model_time(self, t: float) -> float:
        return float(self.c_noise(t))

    def scales(self, t: float) -> tuple[float, float]:
        return 1.0, t
