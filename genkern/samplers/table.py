"""A sampler is a table of stages: each is one network call and one fused row after it."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from ..paths import Linear, Path
from ..rows import Out
from .parameterization import OnPath, Parameterization

KEPT = 16  # tables of a path
LAID_OUT = 2  # ways in which a table is laid out, of some 1.2 KB a stage


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
        log_scale: (l0, l1): z of the new state is times exp(l0 + l1 v), v what the network says of the variance
            (network.range_of).
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
    log_scale: tuple[float, float] | None = None

    @property
    def outs(self) -> tuple[Out, ...]:
        """All that its pass writes of the state and into the memory."""
        return (self.out, *[out for _, out in self.keeps])

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


class Table(tuple[Stage, ...]):
    """Stages that are kept, and with them how their passes are laid out (layout.py).

    Args:
        stages: of a sampler.
    """

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.laid_out: dict[Hashable, Any] = {}


def stages_of(sampler: Sampler, network: Parameterization, grid: np.ndarray) -> Sequence[Stage]:
    """sampler.stages(network, grid), which is made once and kept for as long as the path lives: to tabulate takes
    longer than a captured loop over a small network.

    Samplers and paths that are not genkern's own, and those that hold more than plain numbers, arrays and such paths,
    are asked every time: who knows what their answer depends on.
    """
    owner = network.path if isinstance(network, OnPath) else network
    parts = (_held(sampler), _held(network, owner), _held(owner))
    if any(part is None for part in parts):
        return sampler.stages(network, grid)
    key = (*(_identified(part) for part in parts), grid.tobytes())
    # With what it was made from, so that an identity is not used again.
    made: Table
    made, _ = once(_tables.setdefault(owner, {}), key, lambda: (Table(sampler.stages(network, grid)), parts), KEPT)
    return made


def once(tables: dict[Hashable, Any], key: Hashable, make: Callable[[], Any], most: int) -> Any:
    """What a key stands for, made when first asked for; those asked for last are kept, `most` of them."""
    found = tables.get(key)
    if found is not None:
        tables[key] = tables.pop(key, found)  # another thread may have dropped it
        return found
    made = make()
    for oldest in list(tables)[: max(len(tables) - most + 1, 0)]:
        tables.pop(oldest, None)
    return tables.setdefault(key, made)


_tables: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()


def _held(value: Any, but: Any = None) -> tuple[Any, ...] | None:
    """An object as its class and what it holds beside `but`; None where it is not genkern's own, or holds something
    that may change unseen. Tables that it keeps on devices tell nothing new."""
    if type(value).__module__.partition(".")[0] != __name__.partition(".")[0]:
        return None
    found: list[Any] = [type(value)]
    for name, part in vars(value).items():
        if part is but or name == "_tables":
            continue
        if part is not None and type(part) not in _NUMBERS and not isinstance(part, np.ndarray):
            part = _held(part) if isinstance(part, Path) else None
            if part is None:
                return None
        found.append((name, part))
    return tuple(found)


def _identified(part: Any) -> Hashable:
    """What is held, arrays by their identity: a path whose attributes are set anew is another path."""
    if isinstance(part, tuple):
        return tuple(_identified(inner) for inner in part)
    return ("array", id(part)) if isinstance(part, np.ndarray) else part


_NUMBERS = (int, float, bool, str)
