"""The samplers of flows by their names, and the times that they are given."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import check, grids
from ..samplers import AB2, CPS, RK4, Dopri5, Euler, EulerMaruyama, Heun, Midpoint, Overshoot
from ..samplers.table import Sampler

SAMPLERS: dict[str, Any] = {"euler": Euler, "ab2": AB2, "midpoint": Midpoint, "heun": Heun, "rk4": RK4}
STOCHASTIC: dict[str, Any] = {
    "sde": EulerMaruyama, "flow_grpo": lambda: EulerMaruyama(0.7, "flow_grpo"), "cps": CPS, "overshoot": Overshoot,
}  # fmt: skip
NAMED = SAMPLERS | {"dopri5": Dopri5} | STOCHASTIC


@functools.lru_cache(maxsize=64)
def even(steps: int, forward: bool) -> np.ndarray:
    """Even times, kept, and so not to be written."""
    grid = grids.uniform(steps, *((0.0, 1.0) if forward else (1.0, 0.0)))
    grid.flags.writeable = False
    return grid


def grid_of(steps: int | None, times: Any, forward: bool) -> np.ndarray:
    """Even times, by default of 50 steps, or the given ones, in the direction."""
    if times is None:
        return even(check.integer("steps", 50 if steps is None else steps, 1), forward)
    if steps is not None:
        raise ValueError(f"steps: expected None beside times, got {steps}")
    grid = grids.given(times, low=0.0, high=1.0)
    if bool(grid[0] < grid[-1]) != forward:
        order, direction = ("increasing", "forward") if forward else ("decreasing", "backward")
        raise ValueError(f"times: expected {order} times with {direction=}, got {grid}")
    return grid


def ends_of(steps: Any, times: Any, forward: bool) -> np.ndarray:
    """The times between which a sampler chooses its steps: 0 and 1, or the given ones."""
    if steps is not None:
        raise ValueError(f"steps: expected None with a sampler that chooses its steps, got {steps}")
    return even(1, forward) if times is None else grid_of(None, times, forward)


def sampler_named(sampler: str | Sampler, named: Mapping[str, Any] = SAMPLERS) -> Sampler:
    """A sampler by its name, an ODE's unless others are given, or as given."""
    if isinstance(sampler, str):
        found: Sampler = named[check.choice("sampler", sampler, tuple(named))]()
        return found
    return given_sampler(sampler)


def given_sampler(sampler: Any) -> Sampler:
    """A Sampler. TypeError: anything else."""
    if not callable(getattr(sampler, "stages", None)) or isinstance(sampler, type):
        raise TypeError(f"sampler: expected a name or a Sampler, got {sampler!r}")
    return sampler
