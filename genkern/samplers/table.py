"""A sampler is a table of stages: each is one network call and one fused row after it."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from ..paths import Linear
from ..rows import Out
from .parameterization import Parameterization


@dataclasses.dataclass(frozen=True)
class Stage:
    """m = network(input_scale x, model_time), then x <- the row `out` of (y, x, m, h, z). All numbers are the host's.

    Attributes:
        model_time: what the network is told.
        input_scale: what its input is scaled by (c_in).
        out: the new state. h are the tensors that `reads` names; without any, h[0] is the state that the stage before
            started from.
        pred: y = a x + b m, where `out` uses y.
        step: the step that this stage is of; z is that step's noise.
        time: the new state's time where the stage ends its step, else None.
        reads: the slots of the loop's memory that the row's h are read from.
        keeps: (slot, row): what the same pass writes into the loop's memory, for later stages to read; a slot may be
            read and written at once.
        before: of the first stage: the initial state as a row of x, what is given or drawn, and of noise z of its own.
    """

    model_time: float
    input_scale: float
    out: Out
    pred: Linear | None
    step: int
    time: float | None
    reads: tuple[int, ...] = ()
    keeps: tuple[tuple[int, Out], ...] = ()
    before: Out | None = None


class Sampler(Protocol):
    """Turns a grid of times into stages. It holds no state of a run."""

    order: int

    def stages(self, network: Parameterization, grid: np.ndarray) -> list[Stage]:
        """The stages that lead from grid[0] to grid[-1]."""


def stage(
    network: Parameterization, t: float, out: Out, *, pred: Linear | None = None, step: int, time: float | None,
    reads: tuple[int, ...] = (), keeps: tuple[tuple[int, Out], ...] = (),
) -> Stage:  # fmt: skip
    """The stage whose network call is at t."""
    return Stage(network.model_time(t), network.input_scale(t), out, pred, step, time, reads, keeps)
