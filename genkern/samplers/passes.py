"""The passes of the loop: each stage's row laid out over the loop's own buffers before the loop runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import check, functions
from ..fused import apply_row, prepared
from ..noise import Noise, Purpose
from ..rows import MAX_OUTS, Coef, Elementwise, Out, Row, RowTable, pack
from ..rows import times as scaled
from ..spec import DEVICE_KEY, FIRST_H, FIRST_VALUE, INDEX, KNOWN, M_UNCOND, MASK, TABLE, M, V, X, Z, numbers
from ..threshold import DynamicThreshold
from . import editing
from .by_sample import BySample

if TYPE_CHECKING:
    from .editing import Inpaint
    from .loop import Run


class Live(NamedTuple):
    """Where in device memory a captured pass reads what changes from replay to replay.

    key: int64 [3]: seed, stream and the step, which is added to the draw.
    table, rows: the pass's row is table[rows], rows int64 [1], or [n] of a table with a row for every sample; None: the
        row is captured with the pass.
    copies, stage: the same for the pass that copies the state into the network's input, stage int64 [1].
    """

    key: Tensor
    table: Tensor | None = None
    rows: Tensor | None = None
    copies: Tensor | None = None
    stage: Tensor | None = None


class Update:
    """The pass after one network call. Into the loop's own buffers it is laid out before the loop: a step then fills in
    its tensors and calls the kernel, and allocates and checks nothing but what the network and the caller hand over.

    A pass has at most three outputs: beside the state and the memory there may be no room for the network's input,
    which a second pass then copies from the state.
    """

    def __init__(
        self, task: Run, buffers: Buffers, i: int, noise: Noise, guidance: Any, live: Live | None = None
    ) -> None:
        stage = task.stages[i]
        following = task.following(i)
        clip = task.clip if stage.pred is not None else None
        threshold = clip if isinstance(clip, DynamicThreshold) else None
        outs, kept = buffers.outputs(stage.out, following), tuple(out for _, out in stage.keeps)
        split = len(outs) + len(kept) > MAX_OUTS
        self._copy: Row | RowTable | None = Row((Out(x=following),) * (len(outs) - 1)) if split else None
        fused = outs[:1] if split else outs
        guides = task.guided is not None and task.guided.fused and task.guided.on[i]
        bounds = (-1.0, 1.0) if isinstance(clip, DynamicThreshold) else clip
        weights = editing.weights_of(task, i)
        elementwise = _elementwise(stage.log_scale, weights, following, len(fused), len(kept))
        self._row = Row((*fused, *kept), stage.pred, bounds, guidance if guides else None, elementwise)
        self._scales, self._blends = stage.log_scale is not None, weights is not None
        self._dtypes = (task.dtype, *[task.model_dtype] * (len(fused) - 1), *[task.dtype] * len(kept))
        self._buffers, self._n_h, self._reads = buffers, len(stage.out.h), stage.reads
        self._keeps = tuple(slot for slot, _ in stage.keeps)
        own = stage.out.z != 0.0
        drawn = task.step_noise is None if own else weights is not None and weights[1] != 0.0
        purpose, step = Purpose.STEP if own else Purpose.KNOWN, stage.step if live is None else 0
        self._noise = noise.at(purpose, step) if drawn else None
        self._text: str | None = None
        self._threshold, self._by_sample = threshold, None
        if buffers.reused:
            written, self._result = buffers.written(i, len(outs))
            self._copied = written[1:] if split else ()
            self._outs = (*written[: len(fused)], *(buffers.memory[slot] for slot in self._keeps))
            self._spec, self._tensors = prepared(self._row, self._noise, self._outs[0], self._n_h, self._dtypes)
            rescales = guides and task.guided is not None and task.guided.rescale != 0.0
            if rescales or threshold is not None:
                tabulated = (None, None) if live is None else (live.table, live.rows)
                self._by_sample = BySample(
                    stage.pred,
                    self._row.guidance,
                    rescales,
                    threshold,
                    self._spec.row,
                    len(self._row.outs),
                    self._outs[0],
                    *tabulated,
                )
            if live is not None:
                self._bind(live)
            elif self._by_sample is not None:
                self._add_values(self._by_sample)
            if functions.direct(task.device):
                self._text = numbers(self._spec)

    def _bind(self, live: Live) -> None:
        if self._spec.noise:
            self._tensors[DEVICE_KEY] = live.key
        if live.table is not None:
            self._spec = self._spec._replace(row=(), cells=(), scales=())
            self._tensors[FIRST_VALUE:] = []
            self._tensors[TABLE], self._tensors[INDEX] = live.table, live.rows
        elif self._by_sample is not None:
            self._add_values(self._by_sample)
        if live.copies is not None:
            self._copy = RowTable(live.copies, len(self._copied), live.stage)

    def _add_values(self, by_sample: BySample) -> None:
        self._spec = self._spec._replace(
            cells=(*self._spec.cells, *by_sample.cells), scales=(*self._spec.scales, *by_sample.scales)
        )

    @property
    def by_sample(self) -> bool:
        """Whether numbers of its row depend on the data."""
        return self._by_sample is not None

    def tensors(self) -> list[Tensor]:
        """What it keeps on the device beside the loop's buffers."""
        return [] if self._by_sample is None else self._by_sample.tensors()

    @property
    def kind(self) -> Hashable:
        """What of a pass is no number: two of one kind, over the same buffers, differ in their rows alone."""
        spec = self._spec
        return (
            spec.noise, spec.key, spec.use_pred, spec.dtypes, self._n_h, self._reads, self._keeps, self._scales,
            spec.blended, self._copy is not None, tuple(out.data_ptr() for out in self._outs),
        )  # fmt: skip

    @property
    def draws(self) -> bool:
        """Whether it draws noise."""
        return self._spec.noise != 0

    @property
    def cells(self) -> tuple[float, ...]:
        """The numbers of its row."""
        return self._spec.row

    @property
    def copy_cells(self) -> tuple[float, ...] | None:
        """The numbers of the row that copies the state into the network's input, where a second pass does."""
        return None if self._copy is None else tuple(pack(self._copy).row)

    def __call__(
        self, x: Tensor, m: Tensor, m_uncond: Tensor | None, before: Tensor, z: Tensor | None,
        rescale: Tensor | None = None, v: Tensor | None = None, inpaint: Inpaint | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The new state and the next network input. rescale: a factor of m in every sample, float64 [n], or None."""
        keep, known = inpaint if inpaint is not None and self._blends else (None, None)
        memory = self._buffers.memory
        h = tuple(memory[slot] for slot in self._reads) if self._reads else (before,) * self._n_h
        if not self._buffers.reused:
            row, m, m_uncond = self._differentiable(x, m, m_uncond, rescale)
            noise = self._noise if z is None else z
            return self._anew(row, x=x, m=m, m_uncond=m_uncond, h=h, noise=noise, v=v, known=known, mask=keep)
        for out in self._outs:
            check.separate((("out", out),), (("m", m), ("m_uncond", m_uncond), ("noise", z), ("v", v)))
        tensors = self._tensors.copy()
        tensors[X], tensors[M], tensors[Z], tensors[M_UNCOND] = x, m, z, m_uncond
        tensors[V], tensors[KNOWN], tensors[MASK] = v, known, keep
        if h:
            tensors[FIRST_H : FIRST_H + len(h)] = h
        if self._by_sample is not None:
            if tensors[TABLE] is None:
                tensors += self._by_sample.values(x, m, m_uncond, rescale)
            else:
                tensors[TABLE], tensors[INDEX] = self._by_sample.rows(x, m, m_uncond, rescale), None
        if self._text is None:
            functions.map_rows_out(self._spec, self._outs, *tensors)
        else:
            functions.run_numbers(self._text, self._outs, tensors)
        if self._copy is not None:
            apply_row(self._copy, x=self._outs[0], out=self._copied, dtypes=[out.dtype for out in self._copied])
        return self._result

    def _differentiable(
        self, x: Tensor, m: Tensor, m_uncond: Tensor | None, rescale: Tensor | None
    ) -> tuple[Row, Tensor, Tensor | None]:
        """The row and its network outputs where a gradient is kept: thresholded data take the place of m."""
        row = self._row
        if rescale is not None:
            outs = tuple(dataclasses.replace(out, m=scaled(out.m, rescale)) for out in row.outs)
            pred = None if row.pred is None else (row.pred[0], scaled(row.pred[1], rescale))
            row = dataclasses.replace(row, outs=outs, pred=pred)
        if self._threshold is None:
            return row, m, m_uncond
        assert row.pred is not None
        a, b = row.pred
        of_data = Row((Out(x=a, m=b),), guidance=row.guidance)
        (y,) = apply_row(of_data, x=x, m=m, m_uncond=m_uncond, dtypes=(self._dtypes[0],))
        return Row(row.outs, (0.0, 1.0), elementwise=row.elementwise), self._threshold.applied(y), None

    def _anew(self, row: Row, **terms: Any) -> tuple[Tensor, Tensor]:
        """The same into new tensors, where a gradient is kept."""
        outs = apply_row(row, dtypes=self._dtypes, **terms)
        first_kept = len(outs) - len(self._keeps)
        for slot, kept in zip(self._keeps, outs[first_kept:], strict=True):
            self._buffers.memory[slot] = kept
        inputs = outs[1:first_kept]
        if self._copy is not None:
            inputs = apply_row(self._copy, x=outs[0], dtypes=(self._buffers.model_dtype,))
        return self._buffers.joined(outs[0], inputs)


class First:
    """The pass before the first network call, from noise or a given state, laid out over the loop's buffers as Update
    lays out its own: the same bits as Buffers.apply, for loops that begin often.

    noise: its seed and stream are replaced by the key's; key: int64 [3], seed, stream and 0.
    """

    def __init__(self, task: Run, buffers: Buffers, noise: Noise, key: Tensor) -> None:
        out, purpose = task.initial
        row = Row(buffers.outputs(out, task.stages[0].input_scale))
        drawn = noise.at(purpose) if out.z else None
        self._outs, _ = buffers.written(-1, len(row.outs))
        dtypes = [out.dtype for out in self._outs]
        spec, self._tensors = prepared(row, drawn, self._outs[0], 0, dtypes)
        self._spec = spec._replace(size=buffers.shape, device=task.device) if task.start is None else spec
        self._tensors[DEVICE_KEY] = key if drawn else None
        self._text = numbers(self._spec) if functions.direct(task.device) else None

    def __call__(self, start: Tensor | None) -> None:
        """Writes the initial state and the first network input."""
        tensors = self._tensors.copy()
        tensors[X] = start
        if self._text is None:
            functions.map_rows_out(self._spec, self._outs, *tensors)
        else:
            functions.run_numbers(self._text, self._outs, tensors)


def _elementwise(
    log_scale: tuple[float, float] | None, weights: tuple[float, float] | None, following: float | None, n_fused: int,
    n_kept: int,
) -> Elementwise | None:  # fmt: skip
    """Of a stage's pass: the state and the network's inputs, `following` times it, are blended; what is kept is not."""
    if weights is None:
        return None if log_scale is None else Elementwise(log_scale)
    alpha, sigma = weights
    c = 1.0 if following is None else following
    inputs = ((c * alpha, c * sigma),) * (n_fused - 1)
    return Elementwise(log_scale, (weights, *inputs, *(None,) * n_kept))


class Buffers:
    """Where the states and the network's inputs are written: by turns into two of each, so that no pass writes what
    it, or a view that the network returned, reads. A row with h writes over h, the state before last: element by
    element, which is safe; so is a slot of the memory that a pass reads and writes. Under differentiation every pass
    writes anew."""

    def __init__(self, task: Run, n: int) -> None:
        self.shape = (n, *task.shape[1:])
        self._halves = task.halves
        self._separate, self.reused = task.separate, not task.differentiable
        self._dtype, self.model_dtype = task.dtype, task.model_dtype
        slots = 1 + max((slot for stage in task.stages for slot, _ in stage.keeps), default=-1)
        self.memory: list[Any] = [None] * slots
        if self.reused:
            like = (
                torch.empty(self.shape, dtype=task.dtype, device=task.device) if task.start is None else task.start[:n]
            )
            self._states = [torch.empty_like(like), torch.empty_like(like)]
            self.memory = [torch.empty_like(like) for _ in range(slots)]
            if self._separate:
                size = (self._halves * n, *self.shape[1:])
                self._inputs = [torch.empty(size, dtype=task.model_dtype, device=task.device) for _ in range(2)]
                self._halved = [seen.chunk(self._halves) for seen in self._inputs]

    def outputs(self, out: Out, following: float | None) -> tuple[Out, ...]:
        """The state's row, and the next input's: the same, scaled; twice under guidance where it fills a buffer."""
        if following is None or not self._separate:
            return (out,)
        c = following
        scaled = Out(y=c * out.y, x=c * out.x, m=c * out.m, h=tuple(c * k for k in out.h), z=c * out.z)
        return (out, *[scaled] * (self._halves if self.reused else 1))

    def apply(self, row: Row, stage: int, **terms: Any) -> tuple[Tensor, Tensor]:
        """The new state and the next network input."""
        dtypes = (self._dtype, *[self.model_dtype] * (len(row.outs) - 1))
        if self.reused:
            outs, found = self.written(stage, len(row.outs))
            apply_row(row, dtypes=dtypes, out=outs, **terms)
            return found
        x, *inputs = apply_row(row, dtypes=dtypes, **terms)
        return self.joined(x, inputs)

    def entered(self, stage: int, x: Tensor, following: Coef | None) -> tuple[Tensor, Tensor]:
        """A state in the place of what a stage's pass has written, and the next network input, `following` times it."""
        there = self.reused and x is self._states[stage % 2]
        if following is None or not self._separate:
            return (x, x) if there else self.apply(Row((Out(x=1.0),)), stage, x=x)
        copies = (Out(x=following),) * (self._halves if self.reused else 1)
        if not there:
            return self.apply(Row((Out(x=1.0), *copies)), stage, x=x)
        outs, found = self.written(stage, 1 + len(copies))
        apply_row(Row(copies), x=x, out=outs[1:], dtypes=[out.dtype for out in outs[1:]])
        return found

    def joined(self, x: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """A new state, and the next network input from the one half of it that was written, if any."""
        seen = inputs[0] if inputs else x
        return x, torch.cat([seen, seen]) if inputs and self._halves == 2 else seen

    def at(self, stage: int) -> tuple[Tensor, Tensor]:
        """The state and the network input that a stage's pass has written; -1 is what is before the first stage."""
        x = self._states[stage % 2]
        return x, self._inputs[stage % 2] if self._separate else x

    def tensors(self) -> list[Tensor]:
        """All that the loop's passes write."""
        return [*self._states, *self.memory, *(self._inputs if self._separate else ())]

    def written(self, stage: int, n_out: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """The outputs of a stage's pass, and, of the same memory, the new state and the next network input."""
        x = self._states[stage % 2]
        if n_out == 1:
            return (x,), (x, x)
        return (x, *self._halved[stage % 2]), (x, self._inputs[stage % 2])
