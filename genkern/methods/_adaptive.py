"""Sampling a flow with steps of the solver's own choice: samplers.Dopri5 in sample()."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fused import apply_row
from ..rows import Out, Row
from ..samplers import adaptive, embedded, loop
from ..samplers.dopri5 import Dopri5
from ..samplers.table import Stage

# Options that follow a table of stages, which there is none of here, or that would need a gradient through the steps.
REFUSED = (
    "progress", "callback", "step_noise", "differentiable", "guidance_interval", "guidance_rescale", "apg", "init",
    "strength", "mask", "known", "guide", "guide_scale", "guide_through", "guide_cond",
)  # fmt: skip


def sample(
    model: Any, pair: Dopri5, grid: np.ndarray, shape: Sequence[int] | None, start: Tensor | None, scale: float,
    options: Mapping[str, Any], return_stats: bool,
) -> Any:  # fmt: skip
    """Flow.sample with an embedded pair.

    Raises:
        ValueError, TypeError: an option that does not go with it, or is not what it may be.
        RuntimeError: as Dopri5.solve.
    """
    for name in REFUSED:
        value = options.get(name)
        if value is not None and value is not False and not (isinstance(value, float) and value == 0.0):
            raise ValueError(f"{name}: expected none with a sampler that chooses its steps, got {type(value).__name__}")
    if isinstance(options.get("cond"), Sequence):
        raise ValueError("cond: expected one condition with a sampler that chooses its steps, got a sequence")
    whole = Stage(float(grid[0]), 1.0, Out(x=1.0), None, 0, float(grid[-1]))  # what the run's checks look at
    task, batch, captures = loop.prepared(model, [whole], shape, start=start, scale=scale, **options)
    if not np.prod(task.shape):
        nothing = torch.empty(task.shape, dtype=task.dtype, device=task.device)
        return adaptive.returned(*adaptive.nothing(nothing, grid), task.return_trajectory, return_stats)
    with torch.no_grad():
        bounds = loop.bounds_of(task.shape[0], batch)
        parts = [_part(task, captures, pair, grid, low, high, return_stats) for low, high in bounds]
    return adaptive.returned(*adaptive.joined(parts), task.return_trajectory, return_stats)


def _part(
    task: loop.Run, captures: Any, pair: Dopri5, grid: np.ndarray, low: int, high: int, log: bool
) -> tuple[Tensor, list[Tensor], adaptive.Stats]:
    part = loop.part_of(task, low, high)
    x = _initial(task, part)

    def uncaptured() -> tuple[Tensor, list[Tensor], adaptive.Stats]:
        forward = bool(grid[0] < grid[-1])
        state = embedded.Integration(pair, x, forward, task.model_dtype, task.calls, part.guidance)
        velocity = embedded.velocity_of(task, part.cond)
        return adaptive.walk(
            state, lambda: state.begin(velocity), lambda: state.attempt(velocity), grid,
            keep=task.return_trajectory, log=log,
        )  # fmt: skip

    if captures is None:
        return uncaptured()
    from ..graphs import adaptive as captured

    return captured.walk(captures, pair, task, part, x, grid, log, uncaptured)


def _initial(task: loop.Run, part: loop.Part) -> Tensor:
    """The initial state of a part: given, or the noise that every sampler starts from."""
    if task.start is not None:
        return task.start[part.low : part.high]
    out, purpose = task.initial
    size = (part.n, *task.shape[1:])
    x: Tensor = apply_row(
        Row((out,)), noise=part.noise.at(purpose), size=size, device=task.device, dtypes=(task.dtype,)
    )[0]
    return x
