"""A sampler is a table of stages: each is one network call and one fused row after it."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from ..paths import Linear
from ..rows import Out
from .parameterization import OnPath, Parameterization

KEPT = 16  # tables of a path


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
        at: the time of the network call, as the path counts it; None: model_time.
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
    at: float | None = None
    before: Out | None = None

    @property
    def called_at(self) -> float:
        """The time of the network call."""
        return self.model_time if self.at is None else self.at


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
    return Stage(network.model_time(t), network.input_scale(t), out, pred, step, time, reads, keeps, t)


def stages_of(sampler: Sampler, network: Parameterization, grid: np.ndarray) -> Sequence[Stage]:
    """sampler.stages(network, grid), which is made once and kept for as long as the path lives: to tabulate takes
    longer than a captured loop over a small network.

    Samplers that are not genkern's own, and those that hold more than plain numbers, are asked every time.
    """
    owner = network.path if isinstance(network, OnPath) else network
    key = (*_plain(sampler), *_plain(network, owner), *_attributes(owner), grid.tobytes())
    if None in key:
        return sampler.stages(network, grid)
    tables = _tables.setdefault(owner, {})
    if key not in tables:
        made = tuple(sampler.stages(network, grid))
        for oldest in list(tables)[: max(len(tables) - KEPT + 1, 0)]:
            tables.pop(oldest, None)
        return tables.setdefault(key, made)
    return tables[key]


_tables: weakref.WeakKeyDictionary[Any, dict[Hashable, Sequence[Stage]]] = weakref.WeakKeyDictionary()


def _plain(value: Any, but: Any = None) -> tuple[Any, ...]:
    """An object as its class and the numbers and words that it holds, beside `but`; (None,) where it holds others."""
    if type(value).__module__.partition(".")[0] != __name__.partition(".")[0]:
        return (None,)
    held = [(name, kept) for name, kept in vars(value).items() if kept is not but]
    return (type(value), *held) if all(type(kept) in _NUMBERS for _, kept in held) else (None,)


def _attributes(owner: Any) -> list[Hashable]:
    """What an object holds, arrays by their identity: a path whose attributes are set anew is another path."""
    return [(name, kept if type(kept) in _NUMBERS else id(kept)) for name, kept in vars(owner).items()]


_NUMBERS = (int, float, bool, str)
