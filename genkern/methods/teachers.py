"""Teachers of a consistency model beside its own F: networks of Diffusion, FlowMatching and RectifiedFlow.

On a Gaussian path, x_t / alpha = data + (sigma / alpha) z: at the t of the noise level s = sigma / alpha the network is
given alpha x and its output m says, with (a, b) of the path's prediction,

    D(x, s) = a alpha x + b m,

in place of c_in, c_skip, c_out and c_noise of (13.29). Distillation then reads it in the same passes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import check, paths


class PathTeacher:
    """A network along another path, as the teacher of Consistency.loss.

    Args:
        network: called as network(x_t, t, **cond), as `method` trains it.
        method: a Diffusion, a FlowMatching or a RectifiedFlow: its path, and what the network predicts.
        round_times: on a discrete path, tell the network the nearest timestep, int64; else the number between two.

    Raises:
        TypeError: a network that is not callable, or a method without a path.
    """

    def __init__(self, network: Any, method: Any, round_times: bool = True) -> None:
        if not callable(network):
            raise TypeError(f"network: expected a callable, got {type(network).__name__}")
        path = getattr(method, "path", None)
        if not isinstance(path, paths.Path):
            raise TypeError(f"method: expected one with a path, as gk.Diffusion has, got {type(method).__name__}")
        self.network, self.path = network, path
        self.prediction = getattr(method, "prediction", "velocity")
        self.rounds = isinstance(path, paths.DiscreteVP) and bool(round_times)

    def scalings(self, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(alpha, a alpha, b, t) at noise levels, in float64 and in the places of c_in, c_skip, c_out, c_noise; t as
        the network is told it.

        Raises:
            ValueError: the path does not have these noise levels, or the prediction says nothing there.
        """
        try:
            t = np.asarray(self.path.time_at(levels), dtype=np.float64)
            check.inside("t", t, self.path.start, self.path.stop)
            y, alpha = self.path.data(self.prediction, t), self.path.alpha(t)
        except ValueError as error:
            raise ValueError(
                f"teacher: expected a path with the noise levels sigma / alpha from {levels.min():g} to "
                f"{levels.max():g}, epsilon to T, got {type(self.path).__name__} with {self.prediction!r}: {error}"
            ) from error
        one = np.ones_like(levels)
        return alpha * one, y.x * alpha * one, y.m * one, t.round() if self.rounds else t


def checked(teacher: Any) -> Any:
    """A teacher. TypeError: neither a network nor a PathTeacher."""
    if not isinstance(teacher, PathTeacher) and not callable(teacher):
        raise TypeError(f"teacher: expected a network F or a methods.PathTeacher, got {type(teacher).__name__}")
    return teacher
