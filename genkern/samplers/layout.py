"""A stage's pass as far as it is known before the loop has tensors and a seed: its row, packed.

A table of stages is laid out once for every way in which it is run, and keeps that: to pack a row takes longer than to
apply it to a small state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import check
from ..fused import prepared
from ..noise import Noise, Purpose
from ..rows import MAX_OUTS, Elementwise, Out, Row
from ..spec import Spec, packed
from ..threshold import DynamicThreshold
from . import editing
from .table import LAID_OUT, Table, once

if TYPE_CHECKING:
    from .loop import Run
    from .table import Stage


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The pass of a stage.

    stage: whose it is.
    row: of the state, of the network's inputs where they are other tensors, and of what the stage keeps.
    copy: the row of a second pass, from the state into the network's inputs, where one would have too many outputs.
    inputs: how many of the network's inputs are written, by either.
    dtypes: of the first pass's outputs.
    n_h: how many h it reads.
    slots: of the loop's memory, those that it writes.
    draw: (purpose, step) of the noise that it draws, or None.
    blends: whether what is known is put into the state.
    rescales: whether it guides by a rescaled output.
    threshold: of the predicted data, or None.
    spec, tensors: the call, without its tensors but for coefficients; seed and stream are 0.
    numbers: the spec, packed; None under torch.compile, which asks for the spec.
    """

    stage: Stage
    row: Row
    copy: Row | None
    inputs: int
    dtypes: tuple[torch.dtype, ...]
    n_h: int
    slots: tuple[int, ...]
    draw: tuple[Purpose, int] | None
    blends: bool
    rescales: bool
    threshold: DynamicThreshold | None
    spec: Spec
    tensors: tuple[Any, ...]
    numbers: bytes | None


def layouts(task: Run, guidance: Any) -> Sequence[Layout]:
    """The passes of a run's stages, guided by `guidance` where the row guides: kept beside the table, but not with
    scales that are tensors, nor under torch.compile."""
    if task.guided is None or not task.guided.fused:
        guidance = None

    def laid_out() -> Sequence[Layout]:
        like = torch.empty((), dtype=task.dtype, device=task.device).expand(task.shape)
        return tuple(_layout(task, i, guidance, like) for i in range(len(task.stages)))

    if not isinstance(task.stages, Table) or isinstance(guidance, Tensor) or check.compiling():
        return laid_out()
    settings = repr((task.clip, guidance))  # 0.0 and -0.0 are equal, and two numbers
    drawn, blended = task.step_noise is None, task.inpaint is not None  # how much is known, the table's path says
    key = (task.differentiable, task.dtype, task.model_dtype, task.guided, drawn, blended, settings)
    found: Sequence[Layout] = once(task.stages.laid_out, key, laid_out, LAID_OUT)
    return found


def _layout(task: Run, i: int, guidance: Any, like: Tensor) -> Layout:
    stage, following, weights = task.stages[i], task.following(i), editing.weights_of(task, i)
    clip = task.clip if stage.pred is not None else None
    outs, kept = outputs(task, stage.out, following), tuple(out for _, out in stage.keeps)
    split = len(outs) + len(kept) > MAX_OUTS
    fused = outs[:1] if split else outs
    guides = task.guided is not None and task.guided.fused and task.guided.on[i]
    bounds = (-1.0, 1.0) if isinstance(clip, DynamicThreshold) else clip
    elementwise = _elementwise(stage.log_scale, weights, following, len(fused), len(kept))
    row = Row((*fused, *kept), stage.pred, bounds, guidance if guides else None, elementwise)
    own = stage.out.z != 0.0
    drawn = task.step_noise is None if own else weights is not None and weights[1] != 0.0
    draw = (Purpose.STEP if own else Purpose.KNOWN, stage.step) if drawn else None
    dtypes = (task.dtype, *[task.model_dtype] * (len(fused) - 1), *[task.dtype] * len(kept))
    spec, tensors = prepared(row, None if draw is None else Noise(0).at(*draw), like, len(stage.out.h), dtypes)
    return Layout(
        stage=stage,
        row=row,
        copy=Row((Out(x=following),) * (len(outs) - 1)) if split else None,
        inputs=len(outs) - 1,
        dtypes=dtypes,
        n_h=len(stage.out.h),
        slots=tuple(slot for slot, _ in stage.keeps),
        draw=draw,
        blends=weights is not None,
        rescales=guides and task.guided is not None and task.guided.rescale != 0.0,
        threshold=clip if isinstance(clip, DynamicThreshold) else None,
        spec=spec,
        tensors=tuple(tensors),
        numbers=None if check.compiling() else packed(spec),
    )


def outputs(task: Run, out: Out, following: float | None) -> tuple[Out, ...]:
    """The state's row, and the next input's: the same, scaled; twice under guidance where it fills a buffer."""
    if following is None or not task.separate:
        return (out,)
    c = following
    scaled = Out(y=c * out.y, x=c * out.x, m=c * out.m, h=tuple(c * k for k in out.h), z=c * out.z)
    return (out, *[scaled] * (1 if task.differentiable else task.halves))


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
