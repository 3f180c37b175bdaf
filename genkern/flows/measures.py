"""What rectified flow is judged by: straightness, curvature and transport cost, sample by sample.

    straightness     int |(Z_1 - Z_0) - dZ_t/dt|^2 dt               0 on a straight line at even speed
    curvature        int |d^2 Z_t / dt^2| dt                        the total change of the velocity
    transport cost   c(Z_1 - Z_0), c convex

The seed's S(Z) and E c(Z_1 - Z_0) are their means. For v the minimiser of (13.24) and Z its flow,

    E |X_1 - X_0|^2 - E |Z_1 - Z_0|^2 = S(Z) + int E |(X_1 - X_0) - v(X_t, t)|^2 dt,

so that S is at most what reflow saves in cost. Liu, Gong, Liu, arXiv:2209.03003, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import check, grids

Cost = Callable[[Tensor], Tensor]  # of differences [B, D], giving [B]

COSTS: dict[str, Cost] = {
    "squared": lambda d: d.square().sum(1),
    "norm": lambda d: d.norm(dim=1),
    "l1": lambda d: d.abs().sum(1),
    "max": lambda d: d.abs().amax(1),
    "cubic": lambda d: d.norm(dim=1) ** 3,
    "log_cosh": lambda d: (d.abs() + torch.nn.functional.softplus(-2.0 * d.abs()) - 0.6931471805599453).sum(1),
}


def straightness(trajectory: Tensor, times: Any = None) -> Tensor:
    """sum_k dt_k |dZ_k / dt_k - (Z_n - Z_0) / (t_n - t_0)|^2 of every sample; Euler's slopes are v itself.

    Args:
        trajectory: Z at the times, from sample(return_trajectory=True).  [n + 1, B, ...], n >= 1.
        times: the n + 1 times of the trajectory, strictly monotone; default even from 0 to 1.

    Returns:
        The integral, whose mean is S(Z).  [B], float64.

    Raises:
        ValueError: a trajectory of fewer than two states; times of another number.
    """
    slopes, dt, whole = _slopes(trajectory, times)
    return ((slopes - whole).square().sum(2) * dt.abs()[:, None]).sum(0)


def curvature(trajectory: Tensor, times: Any = None) -> Tensor:
    """sum_k |dZ_{k+1}/dt_{k+1} - dZ_k/dt_k| of every sample: the total variation of the piecewise slope. Arguments and
    result as of straightness."""
    slopes, _, _ = _slopes(trajectory, times)
    return slopes.diff(dim=0).norm(dim=2).sum(0)


def transport_cost(z0: Tensor, z1: Tensor, cost: str | Cost = "squared") -> Tensor:
    """c(z1 - z0) of every pair.

    Args:
        z0, z1: a coupling.  [B, ...], floating.
        cost: "squared" |d|^2, "norm" |d|, "l1" sum |d_i|, "max" max |d_i|, "cubic" |d|^3, "log_cosh" sum log cosh d_i,
            all convex; or a callable of d [B, D] giving [B].

    Returns:
        The costs, whose mean is the coupling's.  [B], float64.

    Raises:
        ValueError: shapes or devices differ; an unknown cost. TypeError: no floating tensors.
    """
    of = COSTS[check.choice("cost", cost, tuple(COSTS))] if isinstance(cost, str) else cost
    for name, z, other in (("z0", z0, z1), ("z1", z1, z0)):
        check.terms([(name, z)])
        if z.shape != other.shape or z.device != other.device:
            raise ValueError(f"z1: expected shape {tuple(z0.shape)} on {z0.device} like z0, got {tuple(z1.shape)}")
    found = of((z1.double() - z0.double()).reshape(z0.shape[0], -1))
    if not isinstance(found, Tensor) or found.shape != z0.shape[:1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"cost: expected shape ({z0.shape[0]},) from the callable, got {got}")
    return found


def _slopes(trajectory: Tensor, times: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The slopes [n, B, D] between the states, the steps [n], and the slope of the whole [B, D]; float64."""
    check.terms([("trajectory", trajectory)])
    if trajectory.ndim < 2 or trajectory.shape[0] < 2:
        raise ValueError(
            f"trajectory: expected [steps + 1, B, ...] of two or more states, got {tuple(trajectory.shape)}"
        )
    n = trajectory.shape[0]
    grid = np.linspace(0.0, 1.0, n) if times is None else grids.given(times)
    if grid.size != n:
        raise ValueError(f"times: expected {n}, one a state of the trajectory, got {grid.size}")
    z = trajectory.detach().double().reshape(n, trajectory.shape[1], -1)
    dt = torch.from_numpy(np.diff(grid)).to(z.device)
    return z.diff(dim=0) / dt[:, None, None], dt, (z[-1] - z[0]) / float(grid[-1] - grid[0])
