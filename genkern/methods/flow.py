"""Sampling a flow, dx/dt = v(x, t) on t in [0, 1], either way: what sections 13.2 and 13.3 share."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import check, grids, paths
from ..samplers import Euler, Heun, OnPath, editing, loop, network
from ..samplers.table import Sampler, stages_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

SAMPLERS: dict[str, type[Euler] | type[Heun]] = {"euler": Euler, "heun": Heun}
DIRECTIONS = ("forward", "backward")


@functools.lru_cache(maxsize=64)
def _even(steps: int, forward: bool) -> np.ndarray:
    """Even times, kept, and so not to be written."""
    grid = grids.uniform(steps, *((0.0, 1.0) if forward else (1.0, 0.0)))
    grid.flags.writeable = False
    return grid


def sampler_named(sampler: str | Sampler) -> Sampler:
    """An ODE sampler by its name, or as given."""
    if isinstance(sampler, str):
        return SAMPLERS[check.choice("sampler", sampler, tuple(SAMPLERS))]()
    return given_sampler(sampler)


def given_sampler(sampler: Any) -> Sampler:
    """A Sampler. TypeError: anything else."""
    if not callable(getattr(sampler, "stages", None)) or isinstance(sampler, type):
        raise TypeError(f"sampler: expected a name or a Sampler, got {sampler!r}")
    return sampler


class Flow:
    """A velocity network along a path: called as model(x, t, **cond), t float32 [B] in [0, 1]."""

    path: paths.Path

    def velocity(self, model: Any, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        """v(x, t), the network's output, with t a number or [B], checked. [B, ...]."""
        check.terms([("x", x)])
        found = check.coefficient("t", t, x, 0.0, 1.0)
        times = torch.full((1,), found, device=x.device) if isinstance(found, float) else found
        given = network.conditions("cond", cond, x.shape[0])
        return network.call(model, x.to(network.dtype_of(model, x.dtype)), times.expand(x.shape[0]).contiguous(), given)

    def sample(
        self,
        model: Any,
        shape: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        sampler: str | Sampler = "euler",
        times: Any = None,
        direction: str = "forward",
        x0: Tensor | None = None,
        x1: Tensor | None = None,
        **options: Unpack[loop.Options],
    ) -> Any:
        """Solve dx/dt = v(x, t), eq. (13.14): from noise or a source at t = 0 to data at t = 1, or back.

        Args:
            model: called as model(x, t, **cond).
            shape: [B, ...] of the state; not needed where it is given.
            steps: of the sampler, >= 1, on an even grid; default 50. One network call each with "euler", two with
                "heun".
            sampler: "euler", "heun" or a Sampler.
            times: instead of steps: strictly increasing times in [0, 1] (decreasing for backward).
            direction: "forward" (t from 0 to 1), or "backward" (from 1 to 0; needs x1).
            x0: the initial state of "forward"; default N(0, I).
            x1: the initial state of "backward".
            options: samplers.Options.

        Returns:
            The state at the last time [B, ...], float32; with return_trajectory (state, trajectory).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        forward = check.choice("direction", direction, DIRECTIONS) == "forward"
        if forward and x1 is not None:
            raise ValueError("x1: expected None with direction='forward', which starts from x0")
        if not forward and x0 is not None:
            raise ValueError("x0: expected None with direction='backward', which starts from x1")
        start = x0 if forward else x1
        if not forward and start is None and not isinstance(options.get("noise"), Tensor):
            raise ValueError("x1: expected the initial state of direction='backward', got None")
        if times is None:
            grid = _even(check.integer("steps", 50 if steps is None else steps, 1), forward)
        elif steps is not None:
            raise ValueError(f"steps: expected None beside times, got {steps}")
        else:
            grid = grids.given(times, low=0.0, high=1.0)
            if bool(grid[0] < grid[-1]) != forward:
                order = "increasing" if forward else "decreasing"
                raise ValueError(f"times: expected {order} times with {direction=}, got {grid}")
        if not forward:
            editing.refuse(options, "with direction='backward', which leads away from the data")
        along = OnPath(self.path, "velocity")
        grid, more = editing.begun(grid, along, loop.known(options))
        stages = stages_of(sampler_named(sampler), along, grid)
        return loop.run(model, stages, shape, start=start, along=along, **more)
