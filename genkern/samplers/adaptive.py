"""Solving with steps chosen on the device: the loop around the attempts of an embedded pair.

Whether all samples have ended is one byte, copied to pinned memory after an attempt and read while the next one is
already queued, so that the loop never lets the device run dry. On CUDA a solve therefore makes one attempt more than it
needs before each of its times, in which nothing moves (dt = 0); on the CPU it makes none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .embedded import CALLS, ENDED, F64, FIRST_CALLS, RUNNING, STUCK, Integration


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a solve did. One column for all samples, one a part with batch_size, or one a sample (control="sample").

    Attributes:
        calls: of the network, all of them.
        calls_after_end: of these, the calls made before the host had read that all samples had ended.
        t: the time that each attempt started from.  [attempts, columns], float64, on the device.
        dt: its step, negative backward; 0 where there was nothing left to do.  [attempts, columns].
        accepted: whether it was accepted.  [attempts, columns], bool.
    """

    calls: int
    calls_after_end: int
    t: Tensor
    dt: Tensor
    accepted: Tensor


class Late:
    """A flag on the device, read `lag` attempts late: what is read then lies on the host already, or will soon."""

    def __init__(self, flag: Tensor, lag: int) -> None:
        self._flag, self._lag = flag, lag
        self._slots: list[tuple[Tensor, Any]] = []
        self._made = 0
        for _ in range(lag + 1):
            cuda = flag.device.type == "cuda"
            event = torch.cuda.Event() if cuda else None
            self._slots.append((torch.zeros(1, dtype=torch.uint8, pin_memory=cuda), event))

    def read(self) -> int:
        """After an attempt: the flag of `lag` attempts before; RUNNING at first."""
        host, event = self._slots[self._made % len(self._slots)]
        host.copy_(self._flag, non_blocking=event is not None)
        if event is not None:
            event.record(torch.cuda.current_stream(self._flag.device))
        self._made += 1
        return self.of(self._made - 1 - self._lag)

    def of(self, attempt: int) -> int:
        """The flag of one of the last attempts."""
        if attempt < 0:
            return RUNNING
        host, event = self._slots[attempt % len(self._slots)]
        if event is not None:
            event.synchronize()  # of an attempt that later ones are queued behind: the device goes on meanwhile
        return int(host)


def walk(
    state: Integration, begin: Callable[[], object], attempt: Callable[[], object], grid: np.ndarray, *, keep: bool,
    log: bool, lag: int | None = None,
) -> tuple[Tensor, list[Tensor], Stats]:  # fmt: skip
    """The state at the last of the times, those at all of them where they are asked for, and what was done.

    Args:
        state: at the initial state.
        begin, attempt: its own, or replays of them.
        grid: the times.
        keep: whether the states at the times are kept.
        log: whether the attempts are.
        lag: attempts that the flag is read late by; default 1 on a device, 0 on the CPU.

    Raises:
        RuntimeError: max_steps, or a step too small to be one.
    """
    if lag is None:
        lag = 0 if state.x.device.type == "cpu" else 1
    kept, lines = [state.x.clone()] if keep else [], []
    calls, after = FIRST_CALLS, 0
    state.s.fill_(state.sign * float(grid[0]))
    for k, end in enumerate(grid[1:].tolist()):
        state.aim(end)
        if k == 0:
            begin()
        flag, found, made = Late(state.flag, lag), RUNNING, 0
        while found == RUNNING and made < state.pair.max_steps:
            start = state.s.clone() if log else None
            attempt()
            made += 1
            if start is not None:
                lines.append((state.sign * start, state.sign * state.h, state.accepted.clone()))
            found = flag.read()
        calls += CALLS * made
        late = lag
        while found == RUNNING and late > 0:  # max_steps: what is not read yet
            late -= 1
            found = flag.of(made - 1 - late)
        after += CALLS * min(late, made)
        if found != ENDED:
            raise RuntimeError(_unfinished(state, end, found, made))
        if keep:
            kept.append(state.x.clone())
    columns = [torch.stack(column) for column in zip(*lines, strict=True)] if lines else _no_lines(state.s)
    return state.x, kept, Stats(calls, after, *columns)


def _unfinished(state: Integration, end: float, found: int, made: int) -> str:
    """What kept a solve from its end; looks at the device."""
    behind = state.s < state.end
    count, least = int(behind.sum()), float(state.s.min())
    where = f"t = {state.sign * least:g}" + (f", {count} of {behind.numel()} samples" * (behind.numel() > 1))
    if found == STUCK:
        return f"dt: expected a step that moves t, got one too small at {where}: is the field finite there?"
    return f"max_steps: expected t = {end:g} within {made} steps, got to {where}; larger rtol and atol need fewer"


def _no_lines(s: Tensor) -> list[Tensor]:
    return [s.new_empty(0, s.numel()), s.new_empty(0, s.numel()), s.new_empty(0, s.numel(), dtype=torch.bool)]


def nothing(x: Tensor, grid: np.ndarray) -> tuple[Tensor, list[Tensor], Stats]:
    """What walk() finds where there are no elements."""
    x = x.clone()
    return x, [x] * len(grid), Stats(0, 0, *_no_lines(x.new_empty(0, dtype=F64)))


def joined(parts: Sequence[tuple[Tensor, list[Tensor], Stats]]) -> tuple[Tensor, list[Tensor], Stats]:
    """The parts of a batch as one: their attempts side by side, 0 and False after a part's end."""
    if len(parts) == 1:
        return parts[0]
    x = torch.cat([part[0] for part in parts])
    kept = [torch.cat(states) for states in zip(*(part[1] for part in parts), strict=True)]
    stats = [part[2] for part in parts]
    attempts = max(len(each.t) for each in stats)

    def side_by_side(columns: Sequence[Tensor]) -> Tensor:
        return torch.cat(
            [torch.cat([c, c.new_zeros(attempts - len(c), c.shape[1])]) for c in columns], dim=1
        )  # fmt: skip

    lines = (side_by_side([getattr(each, name) for each in stats]) for name in ("t", "dt", "accepted"))
    return x, kept, Stats(sum(each.calls for each in stats), sum(each.calls_after_end for each in stats), *lines)


def returned(x: Tensor, kept: list[Tensor], stats: Stats, trajectory: bool, with_stats: bool) -> Any:
    """The state, or a tuple of it and what was asked for."""
    if not trajectory and not with_stats:
        return x
    return (x, *([torch.stack(kept)] if trajectory else []), *([stats] if with_stats else []))
