"""A loop of one kind, captured: its own buffers, inputs and tables, and the graphs that are replayed over them.

There are two ways to replay the same passes, with the same bits:

    whole    all stages as one graph, each with its row's numbers captured in its pass; where a step is short
    steps    one graph a kind of step, replayed stage by stage: the row is read from a table by the stage's number, both
             in device memory. Steps are of one kind that differ in numbers alone and write the same buffers: so the two
             states that the loop alternates between make two kinds of most samplers, and no pass copies a state.

Inputs of a call are copied in: conditions, guidance, sample ids, given noise of a step, the initial state where it is
given (else it is drawn: in the graph of the whole loop, or before the first step's). Its results are copied out.
Between two replays of `steps` there is room for callbacks, trajectories and given noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise import Noise
from ..rows import W
from ..samplers import loop, network
from ..samplers.callback import STOP, observe
from ..samplers.editing import Inpaint, weights_of
from ..samplers.guidance import Outputs
from ..samplers.layout import layouts
from ..samplers.passes import Buffers, Drawn, First, Live, Update
from . import conditions
from .capture import Capture, Graph
from .moments import Moment, Moments

SHORT = 100e-6  # seconds of a step, below which the gaps between graphs would be felt


def kind_of(task: loop.Run, part: loop.Part) -> Hashable:
    """What must be equal, beside the stages and the model, for two calls to be served by one plan."""
    kind = task.device.type
    start = None if task.start is None else task.start.stride()
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return (
        part.n, task.shape[1:], task.dtype, task.model_dtype, task.time_dtype, task.clip, task.device, start,
        task.start_scale, task.scale, part.noise.sample_ids is None, task.step_noise is None,
        conditions.signature(part.cond), _guidance_kind(part.guidance), task.guided,
        None if task.inpaint is None else task.inpaint.kind, _of_path(task), autocast,
        isinstance(task.model, network.Wrapped),
    )  # fmt: skip


def _of_path(task: loop.Run) -> Hashable:
    """What a plan has from the path beside its stages, whose rows may be the same on another: the weights of what is
    known, and how APG reads the data."""
    blended = None if task.inpaint is None else tuple(weights_of(task, i) for i in range(len(task.stages)))
    if task.guided is None or task.guided.apg is None or task.along is None:
        return blended
    return blended, tuple(tuple(map(float, task.along.data(stage.called_at))) for stage in task.stages)


def _guidance_kind(guidance: Any) -> Hashable:
    return (guidance.shape, guidance.dtype) if isinstance(guidance, Tensor) else guidance is not None


@dataclasses.dataclass
class _Step:
    """A kind of step: its pass, its tables of rows, and its graph once it is captured."""

    first: int
    update: Update
    tables: list[Tensor]
    graph: Graph | None = None


class Plan:
    """Buffers, tables and graphs of a kind of run. It does not hold the model.

    Args:
        task, part: the first run of its kind.
        capture: of the device; other plans may use it too.
    """

    def __init__(self, task: loop.Run, part: loop.Part, capture: Capture) -> None:
        self._capture = capture
        self._streams: set[Any] = set()
        with torch.inference_mode(False):  # what is made under it could not be written outside it
            self._make(task, part)

    def _make(self, task: loop.Run, part: loop.Part) -> None:
        self._stages, self._n, self._dtype = list(task.stages), part.n, task.dtype
        self._guided = task.guided
        self._buffers = Buffers(task, part.n)
        self._cond = conditions.static(part.cond)
        self._ids = None
        if part.noise.sample_ids is not None:
            self._ids = torch.empty(part.n, dtype=torch.int64, device=task.device)
        self._guidance = static_guidance(part.guidance, task.device)
        fused = self._guided is not None and self._guided.fused
        by_sample = fused and self._guidance is not None and self._guidance.numel() > 1
        n_rows = part.n if by_sample else 1
        self._moments = Moments(self._stages, n_rows, task.calls * part.n, task.time_dtype, task.device)
        self._outputs = Outputs(task, part.n, self._buffers.at(0)[0])
        like, given = self._buffers.at(0)[0], task.inpaint
        self._inpaint = None if given is None else Inpaint(*(torch.empty_like(like, dtype=t.dtype) for t in given))
        self._z = torch.zeros_like(self._buffers.at(0)[0]) if task.step_noise is not None else None
        self._takes_z = [self._z is not None and stage.out.z != 0.0 for stage in self._stages]
        self._noise = Noise(0, sample_ids=self._ids)  # its seed is the moment's
        self._first = First(task, self._buffers, self._noise, self._moments.of(0).key)
        self._from_noise = task.start is None
        laid_out = layouts(task, self._guidance)
        self._drawn = Drawn.of(self._noise, laid_out, self._buffers)
        self._passes = [
            Update(self._buffers, layout, i, self._drawn, Live(self._moments.of(i).key))
            for i, layout in enumerate(laid_out)
        ]
        self._draws = task.scale != 0.0 or any(update.draws for update in self._passes)
        self._steps: dict[Hashable, _Step] = {}
        self._step_of: list[_Step] = []
        self._tabulate(task)
        self._whole: Graph | None = None
        self._short: bool | None = None

    def _tabulate(self, task: loop.Run) -> None:
        """The kinds of steps, and for each a table with a line for every stage."""
        kinds = [
            (
                self._passes[i].kind, self._takes_z[i], i == 0 and bool(stage.out.h) and not stage.reads,
                self._guides(i), stage.time is None,
            )
            for i, stage in enumerate(self._stages)
        ]  # fmt: skip
        arithmetic = torch.float64 if self._dtype == torch.float64 else torch.float32
        now, n_rows = self._moments.now, self._moments.now.rows.numel()
        laid_out = layouts(task, None if self._guidance is None else 1.0)  # a placeholder: the table has the scale
        for i, kind in enumerate(kinds):
            if kind not in self._steps:
                alike = [update if other == kind else None for update, other in zip(self._passes, kinds, strict=True)]
                # What is multiplied by numbers of the data is rounded after it, as coefficients by sample are.
                dtype = torch.float64 if self._passes[i].by_sample else arithmetic
                cells = _table([None if u is None else u.cells for u in alike], dtype, task.device)
                table = cells.repeat_interleave(n_rows, dim=0)
                copied = [None if u is None else u.copy_cells for u in alike]
                copies = None
                if self._passes[i].copy_cells is not None:
                    copies = _table(copied, arithmetic, task.device)
                live = Live(now.key, table, now.rows, copies, now.stage)
                update = Update(self._buffers, laid_out[i], i, self._drawn, live)
                self._steps[kind] = _Step(i, update, [table] if copies is None else [table, copies])
            self._step_of.append(self._steps[kind])

    def run(self, task: loop.Run, part: loop.Part, tick: Callable[[], object]) -> tuple[Tensor, list[Tensor]]:
        """As samplers.loop.walk.

        Raises:
            Uncapturable: the network cannot be captured.
        """
        with self._capture.turn() as stream:
            used_on(stream, self._streams, self._tensors)
            by_steps = task.watched or self._z is not None
            self._copy_in(part, by_steps)
            if self._missing(by_steps):
                with torch.inference_mode(False), torch.no_grad(), autocast_without_cache(task.device.type):
                    self._prepare(task, part, by_steps)
            kept: list[Tensor] = []
            if not by_steps and self._short:
                assert self._whole is not None
                if not self._from_noise:
                    self._begin(task, part)
                self._whole.replay()
            else:
                self._begin(task, part)
                if task.return_trajectory:
                    kept.append(self._buffers.at(-1)[0].clone())
                for i, (stage, step) in enumerate(zip(self._stages, self._step_of, strict=True)):
                    z = loop.given_noise(task, part, stage)
                    if z is not None and self._z is not None:
                        self._z.copy_(z)
                    self._moments.tell(i)
                    assert step.graph is not None
                    step.graph.replay()
                    changed = observe(task, stage, self._buffers.at(i)[0], kept, tick) if task.watched else None
                    if changed is STOP:
                        return self._buffers.at(i)[0].clone(), kept
                    if changed is not None:
                        self._buffers.entered(i, changed, task.following(i))
            return self._buffers.at(len(self._stages) - 1)[0].clone(), kept

    def _missing(self, by_steps: bool) -> bool:
        """Whether what a run replays is not captured yet."""
        if by_steps or not self._short:
            return self._short is None or any(step.graph is None for step in self._steps.values())
        return self._whole is None

    def _prepare(self, task: loop.Run, part: loop.Part, by_steps: bool) -> None:
        """Captures what the run replays and is not captured yet.

        Raises:
            Uncapturable: the network cannot be captured.
        """
        if self._short is None:
            self._begin(task, part)
            self._capture.warm_up(lambda: self._each_kind(task.model))
            first = self._step_of[0]
            self._record_step(first, task.model)
            assert first.graph is not None
            self._moments.tell(0)
            self._short = self._capture.seconds(first.graph) < SHORT
        if by_steps or not self._short:
            for step in self._steps.values():
                if step.graph is None:
                    self._record_step(step, task.model)
        elif self._whole is None:
            self._begin(task, part)
            self._all_stages(task.model)  # loads the kernels that take their row from the call
            self._whole = self._capture.record(lambda: self._all_stages(task.model))

    def _record_step(self, step: _Step, model: Any) -> None:
        now = self._moments.now
        step.graph = self._capture.record(lambda: self._stage(model, step.first, step.update, now))

    def _each_kind(self, model: Any) -> None:
        for step in self._steps.values():
            self._moments.tell(step.first)
            self._stage(model, step.first, step.update, self._moments.now)

    def _guides(self, i: int) -> bool:
        return self._guided is not None and self._guided.on[i]

    def _begin(self, task: loop.Run, part: loop.Part) -> None:
        self._outputs.begin()
        self._first(None if task.start is None else task.start[part.low : part.high])

    def _all_stages(self, model: Any) -> None:
        self._outputs.begin()
        if self._from_noise:
            self._first(None)
        for i, update in enumerate(self._passes):
            self._stage(model, i, update, self._moments.of(i))

    def _stage(self, model: Any, i: int, update: Update, moment: Moment) -> None:
        x, seen = self._buffers.at(i - 1)
        before = x if i == 0 else self._buffers.at(i)[0]  # the state before last, where the new one is written
        m, m_uncond, rescale = self._outputs(model, i, moment.stage, x, seen, moment.times, self._cond, self._guidance)
        ranged = self._stages[i].log_scale is not None
        v = network.range_of(model, self._n, self._dtype) if ranged else None
        z = self._z if self._takes_z[i] else None
        update(x, m, m_uncond, before, z, rescale, v, self._inpaint)

    def _copy_in(self, part: loop.Part, by_steps: bool) -> None:
        if self._draws:
            self._moments.set_noise(part.noise)
        if self._cond:
            conditions.fill(self._cond, part.cond)
        if self._ids is not None:
            self._ids.copy_(part.noise.sample_ids)
        if self._inpaint is not None:
            for own, given in zip(self._inpaint, part.inpaint or (), strict=True):
                own.copy_(given)
        if self._guidance is None:
            return
        fill_guidance(self._guidance, part.guidance)
        if (self._short and not by_steps) or self._guided is None or not self._guided.fused:
            return
        for step in self._steps.values():
            if not self._guides(step.first):
                continue
            lines = step.tables[0].reshape(len(self._stages), -1, step.tables[0].shape[1])
            lines[:, :, W] = self._guidance

    def _tensors(self) -> list[Tensor]:
        given = [t for t in (self._ids, self._guidance, self._z) if t is not None]
        given += [*self._outputs.tensors(), *(self._inpaint or ())]
        tables = [table for step in self._steps.values() for table in (*step.tables, *step.update.tensors())]
        return [*self._buffers.tensors(), *self._moments.tensors(), *tables, *given, *conditions.tensors(self._cond)]


def used_on(stream: Any, known: set[Any], tensors: Callable[[], Sequence[Tensor]]) -> None:
    """Tells the allocator of a stream that is not the one on which the tensors were made."""
    if stream in known:
        return
    if known:
        for tensor in tensors():
            tensor.record_stream(stream)
    known.add(stream)


def autocast_without_cache(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast as it is, but for its cache of parameters, which would be freed while a graph reads from it."""
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


def static_guidance(guidance: Any, device: torch.device) -> Tensor | None:
    """A tensor for the scale, which holds a number in float64, as the host does."""
    if guidance is None:
        return None
    if isinstance(guidance, Tensor):
        wide = guidance.dtype if guidance.dtype.itemsize >= 4 else torch.float32
        return torch.empty(guidance.shape, dtype=wide, device=device)
    return torch.empty(1, dtype=torch.float64, device=device)


def fill_guidance(own: Tensor, given: Any) -> None:
    """A call's scale in its place."""
    if isinstance(given, Tensor):
        own.copy_(given)
    else:
        own.fill_(given)


def _table(lines: Sequence[Sequence[float] | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows on the device; NaN in the lines of stages of other kinds."""
    width = next(len(line) for line in lines if line is not None)
    full = [[float("nan")] * width if line is None else list(line) for line in lines]
    return torch.tensor(full, dtype=dtype).to(device)
