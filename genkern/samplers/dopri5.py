"""The embedded pair of Dormand and Prince for dx/dt = v(x, t): order 5, with an error of order 4 to choose steps by.

    k_i = v(x + dt sum_{j<i} a_ij k_j, t + c_i dt),  i = 1 .. 7,      x_s = x + dt sum_j b_j k_j,   b = a_7
    e   = dt sum_j (b_j - b*_j) k_j,    r^2 = mean (e / (atol + rtol max(|x|, |x_s|)))^2

A step with r <= 1 is accepted, and k_7 is the next step's k_1: six network calls a step, and two to choose the first.
The next step is dt min(10, max(0.9 r^(-1/5), f)), f = 1 after a step with r < 1 and 0.2 after another. A step is cut
where it would pass the next of the times asked for, so that no network is called outside them.

    control="batch"     the mean is over all elements: one step for all, as torchdiffeq's "dopri5" with its step_t at
                        the times
    control="sample"    the mean is over a sample: each has its own time and step, and a result that does not depend on
                        its batch; those at the end wait there (dt = 0) for the others

Dormand, Prince 1980, "A family of embedded Runge-Kutta formulae", table 2; b* is that of Shampine 1986, "Some practical
Runge-Kutta formulas", with which b - b* is 2/3 of theirs, as torchdiffeq has it; the first step and the controller:
Hairer, Norsett, Wanner 1993, "Solving Ordinary Differential Equations I", II.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import check, grids
from . import adaptive, embedded, network

CONTROLS = ("batch", "sample")

NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
B_STAR = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
E = tuple(b - b_star for b, b_star in zip(B, B_STAR, strict=True))


class Dopri5:
    """Dormand-Prince 5(4) with steps of its own choice.

    Args:
        rtol, atol: of the error of a step: >= 0 and > 0. 1e-5 is what Lipman et al. sample with.
        control: "batch" or "sample", see above.
        max_steps: attempts, accepted or not, between two of the times; more are a RuntimeError.

    Raises:
        ValueError, TypeError: an argument is not what it may be.
    """

    order = 5

    def __init__(self, rtol: float = 1e-5, atol: float = 1e-5, control: str = "batch", max_steps: int = 1000) -> None:
        self.rtol = check.number("rtol", rtol, 0.0)
        self.atol = check.number("atol", atol, 0.0)
        if not self.atol > 0.0:
            raise ValueError(f"atol: expected a number > 0, got {atol}")
        self.control = check.choice("control", control, CONTROLS)
        self.max_steps = check.integer("max_steps", max_steps, 1)

    @torch.no_grad()
    def solve(
        self, field: Callable[[Tensor, Tensor], Any], x: Tensor, times: Any, *, return_trajectory: bool = False,
        return_stats: bool = False,
    ) -> Any:  # fmt: skip
        """x at the last of the times, of any field; without a gradient.

        Args:
            field: called as field(x, t), t [B] of x's dtype; gives dx/dt [B, ...].
            x: the state at times[0].  [B, ...], float32 or float64.
            times: two or more, strictly increasing or decreasing. Steps end on each of them.
            return_trajectory: return the states at the times too.
            return_stats: return adaptive.Stats too.

        Returns:
            x [B, ...]; or a tuple of it and what is asked for: trajectory [len(times), B, ...], stats.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the field's output has another shape than x.
            RuntimeError: max_steps, or a step too small to be one: a field that is stiff or not finite there.
        """
        check.terms([("x", x)])
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"x: expected torch.float32 or torch.float64, got {x.dtype}")
        if not callable(field):
            raise TypeError(f"field: expected a callable, got {type(field).__name__}")
        grid = grids.given(times, low=-np.inf, high=np.inf)
        if not x.numel():
            return adaptive.returned(*adaptive.nothing(x, grid), return_trajectory, return_stats)
        state = embedded.Integration(self, x, bool(grid[0] < grid[-1]))

        def velocity(seen: Tensor, t: Tensor) -> tuple[Tensor, None]:
            return network.at_most(network.call(field, seen, t, {}, "field"), x.dtype), None

        found = adaptive.walk(
            state, lambda: state.begin(velocity), lambda: state.attempt(velocity), grid,
            keep=return_trajectory, log=return_stats,
        )  # fmt: skip
        return adaptive.returned(*found, return_trajectory, return_stats)
