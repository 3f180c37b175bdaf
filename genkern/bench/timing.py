"""Times of several contenders, taken in turns: A B C, A B C, ... so that a drift of the machine's speed meets all.

On CUDA a time is that of the device, between two events around one call, with the cache emptied before it: a tensor of
FLUSH bytes is written, and again until the device is busy for longer than the host needs to enqueue the call, so that
no gap between its kernels is the host's; if the device began before the host was done, the call is timed again, up to
RETRIES times, after twice as many writes each time, and the last time counts. (Contenders of a loop that the host
enqueues for more than SHORT, those without a graph, are timed with what the host adds.) The host's time is taken apart:
calls in a row, not waited for. On the CPU a time is the wall's; calls shorter than SHORT are repeated.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .world import Run

FLUSH = 256 << 20  # bytes, more than any cache
SHORT = 1e-3  # seconds
SLOW = 0.2  # seconds: on the CPU, such calls are warmed up once, others twice
WARM_UP = 2  # calls on CUDA
HOST_CALLS = 20
RETRIES = 3
LEAST_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call: the median, its quartiles and extremes, of `samples` measurements.

    host: median seconds until an asynchronous call returned.   peak: bytes that a call allocated at its most. Both
    None on the CPU.
    """

    median: float
    low: float
    high: float
    least: float
    most: float
    samples: int
    host: float | None = None
    peak: int | None = None

    @classmethod
    def of(cls, seconds: Sequence[float], host: float | None = None, peak: int | None = None) -> Times:
        """The statistics of measurements."""
        if len(seconds) > 1:
            low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        else:
            low = high = seconds[0]
        return cls(statistics.median(seconds), low, high, min(seconds), max(seconds), len(seconds), host, peak)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def measure(
    runs: Mapping[str, Run], device: torch.device, repeats: int, budget: float, loop: bool = False
) -> dict[str, Times]:
    """Times of every run, interleaved.

    Args:
        runs: callables without arguments, each called once or twice before.
        repeats: rounds at most.
        budget: seconds after which no further round begins, once there were LEAST_ROUNDS of them.
        loop: whether the host's part counts on CUDA too, where it is more than SHORT.
    """
    return _on_cuda(runs, device, repeats, budget, loop) if device.type == "cuda" else _on_cpu(runs, repeats, budget)


def _on_cpu(runs: Mapping[str, Run], repeats: int, budget: float) -> dict[str, Times]:
    calls = {}
    for name, run in runs.items():
        seconds = _wall(run, 1)
        if seconds < SLOW:
            seconds = _wall(run, 1)
        calls[name] = max(1, math.ceil(SHORT / max(seconds, 1e-7))) if seconds < SHORT else 1
    found: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for number in range(repeats):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > budget:
            break
        for name, run in runs.items():
            found[name].append(_wall(run, calls[name]))
    return {name: Times.of(seconds) for name, seconds in found.items()}


def _wall(run: Run, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def _on_cuda(
    runs: Mapping[str, Run], device: torch.device, repeats: int, budget: float, loop: bool
) -> dict[str, Times]:
    with torch.cuda.device(device):
        flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
        for run in runs.values():
            for _ in range(WARM_UP):
                run()
        torch.cuda.synchronize()
        peaks = {name: _peak(run) for name, run in runs.items()}
        fills = _fills(runs, flush, loop)
        found: dict[str, list[float]] = {name: [] for name in runs}
        hosts: dict[str, list[float]] = {name: [] for name in runs}
        begin = time.perf_counter()
        for number in range(repeats):
            if number >= LEAST_ROUNDS and time.perf_counter() - begin > budget:
                break
            for name, run in runs.items():
                found[name].append(_device(run, flush, fills[name]))
            for name, run in runs.items():
                hosts[name].append(_host(run))
        return {name: Times.of(found[name], statistics.median(hosts[name]), peaks[name]) for name in runs}


def _fills(runs: Mapping[str, Run], flush: torch.Tensor, loop: bool) -> dict[str, int]:
    """How often flush is written before a run: for twice the time that the host takes, or once where that counts."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    flush.zero_()
    end.record()
    end.synchronize()
    one = float(start.elapsed_time(end)) * 1e-3
    seconds = {}
    for name, run in runs.items():
        torch.cuda.synchronize()
        seconds[name] = _wall(run, 1)
    torch.cuda.synchronize()
    counts = SHORT if loop else math.inf
    return {name: 1 if taken > counts else 1 + math.ceil(2.0 * taken / one) for name, taken in seconds.items()}


def _device(run: Run, flush: torch.Tensor, fills: int) -> float:
    seconds = 0.0
    for retry in range(1 + RETRIES if fills > 1 else 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(fills << retry):
            flush.zero_()
        start.record()
        run()
        end.record()
        late = start.query()
        end.synchronize()
        seconds = float(start.elapsed_time(end)) * 1e-3
        if not late:
            break
    return seconds


def _host(run: Run) -> float:
    """Few enough calls that the queue of launches does not fill; a loop that synchronises is as long as it is."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    first = time.perf_counter() - begin
    if first > SHORT:
        torch.cuda.synchronize()
        return first
    seconds = _wall(run, HOST_CALLS)
    torch.cuda.synchronize()
    return seconds


def _peak(run: Run) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
