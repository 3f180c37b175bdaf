"""The passes of the loop: each stage's layout bound to the loop's own buffers before the loop runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import check, functions
from ..fused import apply_row, prepared, source
from ..noise import Noise
from ..rows import Coef, Out, Row, RowTable, pack
from ..rows import times as scaled
from ..spec import (
    DEVICE_KEY,
    FIRST_H,
    FIRST_VALUE,
    INDEX,
    SAMPLE_IDS,
    TABLE,
    Spec,
    V,
    X,
    keyed,
    numbers,
    packed,
)
from .by_sample import BySample
from .layout import Layout, outputs

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


class Drawn(NamedTuple):
    """A loop's noise, and how its passes take it: its key, and what of it lies on the device."""

    noise: Noise
    key: tuple[int, ...]
    device_key: Tensor | None
    sample_ids: Tensor | None

    @classmethod
    def of(cls, noise: Noise, layouts: Sequence[Layout], buffers: Buffers) -> Drawn | None:
        """The noise of a loop of these passes; None where none of them draws."""
        if all(layout.draw is None for layout in layouts):
            return None
        if not buffers.reused:  # passes into new tensors take the noise as it is
            return cls(noise, (), None, None)
        return cls(noise, *source(noise, buffers.shape, False, buffers.device))


class Update:
    """The pass after one network call. Into the loop's own buffers it is laid out before the loop: a step then hands
    over its tensors and calls the kernel, and allocates nothing but what the network and the caller do.

    A pass has at most three outputs: beside the state and the memory there may be no room for the network's input,
    which a second pass then copies from the state.
    """

    _spec: Spec
    _tensors: tuple[Any, ...]  # of the call, None for what a step hands over
    _outs: tuple[Tensor, ...]  # what it writes, and what of it the loop goes on with; of a loop that reuses its buffers
    _result: tuple[Tensor, Tensor]
    _read: tuple[Tensor, ...]  # the slots of the memory that it reads
    _copy: Row | RowTable | None
    _copied: tuple[Tensor, ...]
    _drawn: Drawn | None
    _by_sample: BySample | None
    _numbers: bytes | None  # of the call, packed, where its coefficients are known

    def __init__(self, buffers: Buffers, layout: Layout, i: int, drawn: Drawn | None, live: Live | None = None) -> None:
        self._buffers, self._layout, self._copy = buffers, layout, layout.copy
        self._spec, self._tensors, self._drawn = layout.spec, layout.tensors, drawn
        self._by_sample, self._numbers = None, None
        if not buffers.reused:
            return
        if layout.draw is not None and drawn is not None:
            draw = layout.spec.key[2] if live is None else drawn.noise.at(layout.draw[0]).draw
            self._spec = layout.spec._replace(key=(*drawn.key[:2], draw))
            self._tensors = _with(layout.tensors, {DEVICE_KEY: drawn.device_key, SAMPLE_IDS: drawn.sample_ids})
        self._outs, self._result = buffers.written(i, 1 + layout.inputs)
        self._read = tuple([buffers.memory[slot] for slot in layout.stage.reads])
        if layout.copy is not None:
            self._outs, self._copied = self._outs[:1], self._outs[1:]
        if layout.slots:
            self._outs = (*self._outs, *[buffers.memory[slot] for slot in layout.slots])
        if layout.rescales or layout.threshold is not None:
            tabulated = (None, None) if live is None else (live.table, live.rows)
            self._by_sample = BySample(
                layout.row.pred,
                layout.row.guidance,
                layout.rescales,
                layout.threshold,
                self._spec.row,
                len(layout.row.outs),
                self._outs[0],
                *tabulated,
            )
        if live is not None:
            self._read_from(live)
        elif self._by_sample is not None:
            self._add_values(self._by_sample)
        if buffers.direct and self._by_sample is None:
            ready = layout.numbers if live is None else None  # but for the key
            self._numbers = packed(self._spec) if ready is None else keyed(ready, self._spec.key)

    def _read_from(self, live: Live) -> None:
        if self._spec.noise:
            self._tensors = _with(self._tensors, {DEVICE_KEY: live.key})
        if live.table is not None:
            self._spec = self._spec._replace(row=(), cells=(), scales=())
            self._tensors = _with(self._tensors[:FIRST_VALUE], {TABLE: live.table, INDEX: live.rows})
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
        spec, stage = self._spec, self._layout.stage
        return (
            spec.noise, spec.key, spec.use_pred, spec.dtypes, self._layout.n_h, stage.reads, self._layout.slots,
            stage.log_scale is not None, spec.blended, self._copy is not None,
            tuple(out.data_ptr() for out in self._outs),
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
        layout = self._layout
        keep, known = inpaint if inpaint is not None and layout.blends else (None, None)
        if not self._buffers.reused:
            read = tuple([self._buffers.memory[slot] for slot in layout.stage.reads])
            row, m, m_uncond = self._differentiable(x, m, m_uncond, rescale)
            drawn = None if layout.draw is None or self._drawn is None else self._drawn.noise.at(*layout.draw)
            terms = {"x": x, "m": m, "m_uncond": m_uncond, "h": read or (before,) * layout.n_h}
            return self._anew(row, noise=drawn if z is None else z, v=v, known=known, mask=keep, **terms)
        h = self._read or (before,) * layout.n_h
        bound = self._tensors
        tensors = [
            x, m, z, m_uncond, *h, *bound[FIRST_H + len(h) : V], v, known, keep, *bound[FIRST_VALUE:],
        ]  # fmt: skip
        if self._numbers is None or not functions.run_ready(self._numbers, self._outs, tensors):
            self._write(tensors, rescale)
        if self._copy is not None:
            apply_row(self._copy, x=self._outs[0], out=self._copied, dtypes=[out.dtype for out in self._copied])
        return self._result

    def _write(self, tensors: list[Any], rescale: Tensor | None) -> None:
        """The pass where it is not ready, or goes through torch's dispatcher."""
        x, m, z, m_uncond = tensors[:FIRST_H]
        for out in self._outs:
            check.separate((("out", out),), (("m", m), ("m_uncond", m_uncond), ("noise", z), ("v", tensors[V])))
        if self._by_sample is not None:
            if tensors[TABLE] is None:
                tensors += self._by_sample.values(x, m, m_uncond, rescale)
            else:
                tensors[TABLE], tensors[INDEX] = self._by_sample.rows(x, m, m_uncond, rescale), None
        if self._buffers.direct:
            functions.run_numbers(numbers(self._spec), self._outs, tensors)
        else:
            functions.map_rows_out(self._spec, self._outs, *tensors)

    def _differentiable(
        self, x: Tensor, m: Tensor, m_uncond: Tensor | None, rescale: Tensor | None
    ) -> tuple[Row, Tensor, Tensor | None]:
        """The row and its network outputs where a gradient is kept: thresholded data take the place of m."""
        row, threshold = self._layout.row, self._layout.threshold
        if rescale is not None:
            outs = tuple(dataclasses.replace(out, m=scaled(out.m, rescale)) for out in row.outs)
            pred = None if row.pred is None else (row.pred[0], scaled(row.pred[1], rescale))
            row = dataclasses.replace(row, outs=outs, pred=pred)
        if threshold is None:
            return row, m, m_uncond
        assert row.pred is not None
        a, b = row.pred
        of_data = Row((Out(x=a, m=b),), guidance=row.guidance)
        (y,) = apply_row(of_data, x=x, m=m, m_uncond=m_uncond, dtypes=(self._layout.dtypes[0],))
        return Row(row.outs, (0.0, 1.0), elementwise=row.elementwise), threshold.applied(y), None

    def _anew(self, row: Row, **terms: Any) -> tuple[Tensor, Tensor]:
        """The same into new tensors, where a gradient is kept."""
        outs, slots = apply_row(row, dtypes=self._layout.dtypes, **terms), self._layout.slots
        first_kept = len(outs) - len(slots)
        for slot, kept in zip(slots, outs[first_kept:], strict=True):
            self._buffers.memory[slot] = kept
        inputs = outs[1:first_kept]
        if self._copy is not None:
            inputs = apply_row(self._copy, x=outs[0], dtypes=(self._buffers.model_dtype,))
        return self._buffers.joined(outs[0], inputs)


def _with(tensors: tuple[Any, ...], others: Mapping[int, Any]) -> tuple[Any, ...]:
    """A call's tensors with others in some places."""
    found = list(tensors)
    for place, tensor in others.items():
        found[place] = tensor
    return tuple(found)


class First:
    """The pass before the first network call, from noise or a given state, laid out over the loop's buffers: the same
    bits as Buffers.apply, for loops that begin often.

    noise: its seed and stream are replaced by the key's; key: int64 [3], seed, stream and 0.
    """

    def __init__(self, task: Run, buffers: Buffers, noise: Noise, key: Tensor) -> None:
        out, purpose = task.initial
        row = Row(outputs(task, out, task.stages[0].input_scale))
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


class Buffers:
    """Where the states and the network's inputs are written: by turns into two of each, so that no pass writes what
    it, or a view that the network returned, reads. A row with h writes over h, the state before last: element by
    element, which is safe; so is a slot of the memory that a pass reads and writes. Under differentiation every pass
    writes anew."""

    def __init__(self, task: Run, n: int) -> None:
        self.shape, self.device = (n, *task.shape[1:]), task.device
        self.direct = functions.direct(task.device)
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
