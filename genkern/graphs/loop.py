"""gk.Loop: the owner of captured loops, and those that cuda_graph=True keeps beside a model.

A capture serves calls of one kind: the same shape, dtypes, stages (sampler and grid), guidance or none, shapes of the
conditions, autocast; and the model as it was: parameters and buffers at their addresses, its modules, train or eval
mode. Another kind is another capture, and a model that has changed is captured anew. Of each Loop the CAPTURES used
last are kept.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..samplers import loop, network
from ..samplers.table import Stage
from .beside import beside
from .capture import Capture, Uncapturable, capture_on
from .plan import Plan, kind_of
from .watch import Watch

CAPTURES = 8
T = TypeVar("T")


class Loop:
    """Sampling with captured CUDA graphs, which the object owns and replays.

        flow = gk.FlowMatching()
        loop = gk.Loop(flow, model)
        for seed in range(100):
            images = loop.sample((64, 3, 32, 32), steps=50, seed=seed)

    The first call of a kind captures the loop, further ones replay it: with their own seed, conditions, guidance scale
    and initial state, and the same results as without a Loop, which no later call overwrites. `flow.sample(model, ...,
    cuda_graph=True)` does the same with captures that live as long as the model; other methods of a family take a Loop
    as `cuda_graph=loop`.

    What the model reads beside x, t, its conditions, parameters and buffers is captured as it is: numbers among its
    attributes, tensors that it makes only once. So are conditions that are neither tensors, numbers, words, nor lists
    and mappings of these, and torch's own switches (the precision of matrix products, which attention). Parameters
    changed in place are seen, moved or replaced ones captured anew. The first call of a kind runs the model more often
    than its steps: statistics that a module keeps in train mode move on.

    A model that cannot be captured runs uncaptured: on a CPU; one that draws random numbers, waits for the device or is
    captured already (torch.compile with mode="reduce-overhead"). So does a loop with a guide. One warning says so, and
    `refusal` why.

    A Loop is not shared between threads.

    Args:
        method: a Diffusion, FlowMatching, RectifiedFlow or Consistency.
        model: as its sample() takes it.

    Raises:
        TypeError: the method has no sample(), or the model cannot be called.
    """

    def __init__(self, method: Any, model: Any) -> None:
        if not callable(getattr(method, "sample", None)):
            raise TypeError(f"method: expected an object with sample(), got {type(method).__name__}")
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        self.method, self.model = method, model
        self._captures = Captures()

    def sample(self, shape: Sequence[int] | None = None, **options: Any) -> Any:
        """method.sample(model, shape, **options), captured.

        Raises:
            RuntimeError: the Loop is running already, in another thread or in a callback of its own.
            ValueError, TypeError: as the method's sample().
        """
        if "cuda_graph" in options:
            raise TypeError("cuda_graph: expected none in Loop.sample(), which captures")
        return self.method.sample(self.model, shape, cuda_graph=self, **options)

    def clear(self) -> None:
        """Gives up the captures and their memory."""
        self._captures.clear()

    @property
    def captured(self) -> int:
        """How many kinds of calls are captured."""
        return self._captures.captured

    @property
    def refusal(self) -> str | None:
        """Why the last call ran uncaptured; None where it was captured."""
        return self._captures.refusal


class _Entry:
    """A capture of one kind, or why there is none. Its model is watched from the end of the first run on, in which a
    network may still set itself up."""

    def __init__(self, kind: Hashable, stages: Sequence[Stage]) -> None:
        self.kind, self.stages = kind, stages
        self.watch: Watch | None = None
        self.plan: Any = None
        self.refusal: str | None = None
        self.calls = 0

    def serves(self, kind: Hashable, stages: Sequence[Stage]) -> bool:
        return self.kind == kind and (self.stages is stages or self.stages == stages)


class Captures:
    """The captures of one model, those used last at the end; it does not keep the model alive."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._devices: dict[torch.device, Capture] = {}
        self._running = threading.Lock()
        self._warned: set[str] = set()
        self._wasted = 0  # captures in a row that have served one call
        self.refusal: str | None = None

    @property
    def captured(self) -> int:
        return sum(entry.plan is not None for entry in self._entries)

    def clear(self) -> None:
        self._entries.clear()
        self._devices.clear()

    def walk(self, task: loop.Run, part: loop.Part, tick: Callable[[], object]) -> tuple[Tensor, list[Tensor]]:
        """As samplers.loop.walk, captured where that can be."""
        return self.run(
            task, kind_of(task, part), task.stages, lambda capture: Plan(task, part, capture),
            lambda plan: plan.run(task, part, tick), lambda: loop.walk(task, part, tick),
        )  # fmt: skip

    def run(
        self, task: loop.Run, kind: Hashable, stages: Sequence[Stage], make: Callable[[Capture], Any],
        use: Callable[[Any], T], uncaptured: Callable[[], T],
    ) -> T:  # fmt: skip
        """What the plan of a kind finds, made where there is none; else what is found uncaptured.

        Args:
            task: its model and device are those of the plan.
            kind, stages: what must be equal for two calls to be served by one plan.
            make: the plan, with captures of the device.
            use, uncaptured: with it, and without. Raises: Uncapturable (use).
        """
        if task.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("cuda_graph: expected False while the current stream is being captured")
        apart = _uncaptured(task)
        if apart is not None:
            self._report(apart, task.model)
            return uncaptured()
        if not self._running.acquire(blocking=False):
            raise RuntimeError(
                "cuda_graph: expected a Loop that is not running, got one that another thread or the callback's own "
                "call runs; a Loop is not shared"
            )
        try:
            entry = self._entry(task.model, kind, stages)
            found: list[T] = []
            if entry.refusal is None:
                try:
                    if entry.plan is None:
                        if task.device not in self._devices:
                            self._devices[task.device] = capture_on(task.device)
                        entry.plan = make(self._devices[task.device])
                    found.append(use(entry.plan))
                except Uncapturable as reason:
                    entry.plan, entry.refusal = None, str(reason)
            if entry.watch is None:
                entry.watch = Watch(network.inner(task.model))
            self._report(entry.refusal, task.model)
        finally:
            self._running.release()
        return found[0] if found else uncaptured()

    def _entry(self, model: Any, kind: Hashable, stages: Sequence[Stage]) -> _Entry:
        """The entry that serves a call, made where there is none or the model has changed; it moves to the end."""
        entry = next((entry for entry in self._entries if entry.serves(kind, stages)), None)
        if entry is not None:
            self._entries.remove(entry)
        if entry is None or entry.watch is None or not entry.watch.holds(network.inner(model)):
            self._dropped(entry)
            entry = _Entry(kind, stages)
        self._entries.append(entry)
        if len(self._entries) > CAPTURES:
            self._dropped(self._entries.pop(0))
        entry.calls += 1
        return entry

    def _dropped(self, entry: _Entry | None) -> None:
        """Warns where captures cost more than they save."""
        if entry is None or entry.plan is None:
            return
        self._wasted = self._wasted + 1 if entry.calls == 1 else 0
        if self._wasted == CAPTURES:
            self._warn(
                f"cuda_graph: {CAPTURES} captures in a row have served one call each; another shape, sampler, grid or "
                "object among the conditions is another capture, and so is a model whose parameters were replaced"
            )

    def _report(self, reason: str | None, model: Any) -> None:
        self.refusal = reason
        if reason is None:
            return
        cause = reason.partition("(")[0]  # without what an error says of this one call
        if cause not in self._warned:
            self._warned.add(cause)
            model = network.inner(model)
            self._warn(f"cuda_graph: {getattr(model, '__name__', type(model).__name__)} runs uncaptured: {reason}")

    @staticmethod
    def _warn(text: str) -> None:
        """A warning at the line that has called genkern."""
        frame, depth = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "genkern":
            frame, depth = frame.f_back, depth + 1
        warnings.warn(text, stacklevel=depth)


def _uncaptured(task: loop.Run) -> str | None:
    """Why a loop is not captured, whatever its network is."""
    if task.guide is not None:
        return "a guide takes a gradient after every network call, which is not captured"
    return None


def captures_of(cuda_graph: Any, model: Any) -> Captures:
    """The captures that the option names: those of a Loop, or those beside the model.

    Raises:
        TypeError: neither True nor a Loop; a model that nothing can be kept beside.
        ValueError: another model's Loop.
    """
    model = network.inner(model)
    if isinstance(cuda_graph, Loop):
        if cuda_graph.model is not model and cuda_graph.model != model:
            raise ValueError("cuda_graph: expected a Loop of this model, got another model's")
        return cuda_graph._captures
    if cuda_graph is not True:
        raise TypeError(f"cuda_graph: expected a bool or a Loop, got {type(cuda_graph).__name__}")
    return beside(model, Captures)
