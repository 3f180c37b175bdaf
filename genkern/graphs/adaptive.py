"""A solve with steps of its own choice, captured: its beginning and its attempt as two graphs, replayed as often as the
controller, which is in them, finds it needs (samplers/adaptive.py). Inputs of a call are copied in, results copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..samplers import adaptive, embedded, loop
from ..samplers.dopri5 import Dopri5
from . import conditions
from .capture import Capture, Graph
from .plan import autocast_without_cache, fill_guidance, kind_of, static_guidance, used_on

Found = tuple[Tensor, list[Tensor], adaptive.Stats]


def walk(
    captures: Any, pair: Dopri5, task: loop.Run, part: loop.Part, x: Tensor, grid: np.ndarray, log: bool,
    uncaptured: Callable[[], Found],
) -> Found:  # fmt: skip
    """As adaptive.walk from x, captured where that can be."""
    kind: Hashable = ("adaptive", tuple(vars(pair).values()), bool(grid[0] < grid[-1]), x.stride(), kind_of(task, part))
    found: Found = captures.run(
        task, kind, (), lambda capture: Plan(pair, task, part, x, bool(grid[0] < grid[-1]), capture),
        lambda plan: plan.run(task, part, x, grid, log), uncaptured,
    )  # fmt: skip
    return found


class Plan:
    """The state, inputs and graphs of a kind of solve. It does not hold the model.

    Args:
        pair, task, part, x, forward: of the first solve of its kind.
        capture: of the device; other plans may use it too.
    """

    def __init__(
        self, pair: Dopri5, task: loop.Run, part: loop.Part, x: Tensor, forward: bool, capture: Capture
    ) -> None:
        self._capture, self._streams = capture, set[Any]()
        with torch.inference_mode(False), torch.no_grad():  # what is made under it could not be written outside it
            self._guidance = static_guidance(part.guidance, task.device)
            halves = task.calls
            self._state = embedded.Integration(pair, x, forward, task.model_dtype, halves, self._guidance)
            self._cond = conditions.static(part.cond)
        self._begin: Graph | None = None
        self._attempt: Graph | None = None

    def run(self, task: loop.Run, part: loop.Part, x: Tensor, grid: np.ndarray, log: bool) -> Found:
        """As adaptive.walk from x.

        Raises:
            Uncapturable: the network cannot be captured.
        """
        state = self._state
        with self._capture.turn() as stream:
            used_on(stream, self._streams, self._tensors)
            conditions.fill(self._cond, part.cond)
            if self._guidance is not None:
                fill_guidance(self._guidance, part.guidance)
            if self._attempt is None:
                with torch.inference_mode(False), torch.no_grad(), autocast_without_cache(task.device.type):
                    self._prepare(task, x, grid)
            assert self._begin is not None and self._attempt is not None
            state.x.copy_(x)
            found, kept, stats = adaptive.walk(
                state, self._begin.replay, self._attempt.replay, grid, keep=task.return_trajectory, log=log
            )
            return found.clone(), kept, stats

    def _prepare(self, task: loop.Run, x: Tensor, grid: np.ndarray) -> None:
        """Captures both. Raises: Uncapturable."""
        state, velocity = self._state, embedded.velocity_of(task, self._cond)
        state.x.copy_(x)
        state.s.fill_(state.sign * float(grid[0]))
        state.aim(float(grid[1]))

        def both() -> None:
            state.begin(velocity)
            state.attempt(velocity)

        self._capture.warm_up(both)
        self._begin = self._capture.record(lambda: state.begin(velocity))
        self._attempt = self._capture.record(lambda: state.attempt(velocity))

    def _tensors(self) -> list[Tensor]:
        given = [] if self._guidance is None else [self._guidance]
        return [*self._state.tensors(), *given, *conditions.tensors(self._cond)]
