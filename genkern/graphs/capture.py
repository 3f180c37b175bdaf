"""Capturing on a CUDA device: what a call launches, recorded once and replayed.

A network that cannot be captured is found out here: Uncapturable says why in words for the user. Before the capture it
is run as it is, which sets libraries and compilers up, and shows whether it draws random numbers or replays graphs of
its own. One that waits for the device fails in the capture; what that leaves behind in torch is put right.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

Run = Callable[[], object]
WARM_UPS = 3  # a compiled network compiles, may record graphs of its own, and replays them
TIMED = 3  # replays


class Uncapturable(Exception):
    """Why a network cannot be captured."""


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None: ...


class Capture(Protocol):
    """Captures several graphs that are replayed one after another, never at once."""

    def warm_up(self, run: Run) -> None:
        """Runs it, until nothing is left to be set up. Raises: Uncapturable."""

    def record(self, run: Run) -> Graph:
        """Captures it. Nothing is computed. Raises: Uncapturable."""

    def seconds(self, graph: Graph) -> float:
        """Of one replay; waits for the device."""

    def turn(self) -> contextlib.AbstractContextManager[Any]:
        """In it graphs are recorded and replayed, on the current stream, which it gives, after those before."""


def capture_on(device: torch.device) -> Capture:
    """For one device. Raises: Uncapturable."""
    if device.type != "cuda":
        raise Uncapturable(f"a CUDA graph needs a CUDA device, and its samples are on {device}")
    return CudaCapture(device)


class CudaCapture:
    """Captures on a CUDA device, all into one private pool of memory: nothing in it outlives a replay, and the replays
    wait for each other."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._last: Any = torch.cuda.current_stream(self._device)

    def warm_up(self, run: Run) -> None:
        check_warm_up(run, self._device)

    def record(self, run: Run) -> Graph:
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(self._device)
        if not self._graphs:  # torch refuses a pool whose last graph is gone
            self._pool = torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[self._device.index]
        intact = generator.clone_state()
        with torch.cuda.device(self._device), _recording:
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                except BaseException as error:
                    self._abandon(graph, generator, intact)
                    if isinstance(error, Exception):
                        raise Uncapturable(_failed(error)) from error
                    raise
                try:
                    graph.capture_end()
                except Exception as error:
                    self._mend(graph, generator, intact)
                    raise Uncapturable(_failed(error)) from error
        self._graphs.add(graph)
        return graph

    def seconds(self, graph: Graph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(TIMED):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / TIMED

    @contextlib.contextmanager
    def turn(self) -> Iterator[Any]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if stream != self._last:  # the replays before this one are on another
                stream.wait_stream(self._last)
                self._last = stream
            yield stream

    def _abandon(self, graph: Any, generator: Any, intact: Any) -> None:
        """Ends a capture in which something was raised."""
        try:
            with warnings.catch_warnings():  # that the graph is empty, which is thrown away
                warnings.simplefilter("ignore")
                graph.capture_end()
        except Exception:  # the capture was invalid: torch stops half way through ending it
            self._mend(graph, generator, intact)

    def _mend(self, graph: Any, generator: Any, intact: Any) -> None:
        """What torch leaves undone where a capture cannot be ended: its allocator goes on expecting it, and its
        generator goes on counting for it, and would refuse to draw."""
        with contextlib.suppress(Exception):
            graph.reset()
        with contextlib.suppress(Exception):  # of torch's private interface; raises where there is nothing to end
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)
        generator.graphsafe_set_state(intact)
        torch.cuda.synchronize(self._device)


def check_warm_up(run: Run, device: torch.device) -> None:
    """Runs it WARM_UPS times. The last one must draw no random numbers of torch's or Python's generators and replay no
    graph; the generators' states are put back.

    Raises:
        Uncapturable: it does.
    """
    first = _random_states(device)
    for _ in range(WARM_UPS - 1):
        run()
    before, mark = _random_states(device), _graphed_mark(device)
    run()
    after, graphed = _random_states(device), _graphed_mark(device) != mark
    if not _equal(first, after):
        torch.set_rng_state(first[0])
        random.setstate(first[1])
        if device.type == "cuda":
            torch.cuda.set_rng_state(first[2], device)
    if not _equal(before, after):
        raise Uncapturable(
            "it draws random numbers (dropout in train mode?), and a replay would not draw them as a call"
        )
    if graphed:
        raise Uncapturable("it is captured already (torch.compile with mode='reduce-overhead' or 'max-autotune'?)")


def _random_states(device: torch.device) -> list[Any]:
    states = [torch.get_rng_state(), random.getstate()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _equal(before: list[Any], after: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))


def _graphed_mark(device: torch.device) -> Any:
    """A value that is another one after torch.compile's own CUDA graphs have run: they note which call was the last."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None or device.type != "cuda":
        return None
    try:  # of torch's private interface: where it is another one, the capture itself fails
        manager = trees.get_manager(device.index, create_if_none_exists=False)
        return None if manager is None else (id(manager), manager.current_gen)
    except Exception:
        return None


def _failed(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"the capture failed, as where a network waits for the device ({type(error).__name__}: {(lines or [''])[0]})"


_recording = threading.Lock()  # torch lets one capture of a process be under way at a time
_streams = threading.local()


def _capture_stream(device: torch.device) -> Any:
    """One a thread and device: cuBLAS keeps a workspace for every stream that it has been used on."""
    known = vars(_streams)
    if device not in known.setdefault("by_device", {}):
        known["by_device"][device] = torch.cuda.Stream(device)
    return known["by_device"][device]
