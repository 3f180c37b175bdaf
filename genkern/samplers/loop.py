"""The one loop of every sampler: for each stage of a table, call the network, then apply one fused row.

    m      = network(c_in x, t)                        under guidance of a doubled batch, unconditional first
    x'     = c_y y + c_x x + c_m m + c_h h + c_z z      the stage's row
    input  = c_in' x'                                   the next call's input, in the network's dtype: the same pass

x is kept in float32 whatever the network computes in, in two buffers that the loop alternates between; nothing in it
waits for the device. z of step k is noise.at(Purpose.STEP, k), the initial state's is noise.at(Purpose.INITIAL), and
sample b keeps its id in any split of the batch, so it is given the same noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from .. import check, functions
from ..fused import apply_row, prepared
from ..noise import Noise, Purpose
from ..rows import Out, Row
from ..spec import FIRST_H, M_UNCOND, M, X, Z, numbers
from . import network
from .table import Stage

Callback = Callable[[int, float, Tensor], object]


class Options(TypedDict, total=False):
    """The keyword arguments of every sample(), and what they mean there.

    seed: 0 to 2^64 - 1. Without seed, noise and generator a seed is drawn from torch's CPU generator.
    noise: a Noise (its draw is replaced by the loop's); or a tensor, the initial state itself [B, ...].
    generator: a torch.Generator that a seed is drawn from.
    step_noise: standard normal noise of the steps, [steps, B, ...], or a callable of the step k giving [B, ...].
    cond: keyword arguments of the model; tensors have the batch as dimension 0. uncond: the same for guidance.
    guidance_scale: w of m_u + w (m_c - m_u), a number or a tensor [B]; needs uncond; the model sees 2B samples.
    device: default that of a given initial state, else the model's.
    dtype: of the state, float32 or float64; default float32.
    model_dtype: of the network's input; default that of the model's first parameter, else the state's.
    progress: show a bar (tqdm).
    callback: callback(step, time, x) after every step, x its own copy.
    return_trajectory: return (x, trajectory), trajectory [steps + 1, B, ...] from the initial state on.
    batch_size: most samples that the loop carries at once; default all.
    differentiable: keep the gradient.
    """

    seed: int | None
    noise: Noise | Tensor | None
    generator: torch.Generator | None
    step_noise: Tensor | Callable[[int], Tensor] | None
    cond: Mapping[str, Any] | None
    uncond: Mapping[str, Any] | None
    guidance_scale: Any
    device: torch.device | str | None
    dtype: torch.dtype
    model_dtype: torch.dtype | None
    progress: bool
    callback: Callback | None
    return_trajectory: bool
    batch_size: int | None
    differentiable: bool


@dataclasses.dataclass(frozen=True)
class Run:
    """What a loop needs to know, checked; no state of the loop itself."""

    model: Any
    stages: Sequence[Stage]
    shape: tuple[int, ...]
    start: Tensor | None
    scale: float  # of the initial noise, where no start is given
    time_dtype: torch.dtype
    clip: tuple[float, float] | None
    noise: Noise
    step_noise: Tensor | Callable[[int], Tensor] | None
    cond: Mapping[str, Any]
    uncond: Mapping[str, Any] | None
    guidance: Any
    device: torch.device
    dtype: torch.dtype
    model_dtype: torch.dtype
    callback: Callback | None
    return_trajectory: bool
    differentiable: bool

    @property
    def steps(self) -> int:
        return self.stages[-1].step + 1

    @property
    def separate(self) -> bool:
        """Whether the network's input is another tensor than the state."""
        scaled = any(stage.input_scale != 1.0 for stage in self.stages)
        return scaled or self.guidance is not None or self.model_dtype != self.dtype


def run(
    model: Any,
    stages: Sequence[Stage],
    shape: Sequence[int] | None,
    *,
    start: Tensor | None = None,
    scale: float = 1.0,
    time_dtype: torch.dtype | None = None,
    clip: Any = None,
    seed: int | None = None,
    noise: Noise | Tensor | None = None,
    generator: torch.Generator | None = None,
    step_noise: Tensor | Callable[[int], Tensor] | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    guidance_scale: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    return_trajectory: bool = False,
    batch_size: int | None = None,
    differentiable: bool = False,
) -> Any:
    """Walk the stages from an initial state.

    Args:
        model: called as model(x, t, **cond); must not change x in place.
        stages: of a sampler.
        shape: [B, ...] of the state; may be None where a start is given.
        start: the initial state; else `noise` where it is a tensor, else scale times noise.
        time_dtype: of t; default float32, float64 where the network's input is float64.
        clip: None, or (lo, hi), or c for (-c, c): the clamp of the predicted data.
        others: as Options says.

    Returns:
        The final state [B, ...], or (state, trajectory).

    Raises:
        ValueError, TypeError: an argument is not what it may be; the model's output has another shape than its input.
    """
    if isinstance(noise, Tensor):
        if start is not None:
            raise ValueError("noise: expected a Noise where the initial state is given, got a tensor")
        start, noise = noise, None
    elif noise is not None and not isinstance(noise, Noise):
        raise TypeError(f"noise: expected a Noise or a tensor, got {type(noise).__name__}")
    size = _shape(shape, start)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64 for the state, got {dtype}")
    model_dtype = network.dtype_of(model, dtype) if model_dtype is None else model_dtype
    if not isinstance(model_dtype, torch.dtype) or not check.is_float(model_dtype):
        raise TypeError(f"model_dtype: expected {check.FLOATS}, got {model_dtype}")
    if time_dtype is None:
        time_dtype = torch.float64 if model_dtype == torch.float64 else torch.float32
    where = (
        torch.device(device) if device is not None else start.device if start is not None else network.device_of(model)
    )
    if start is not None:
        start = start.to(where, dtype)
    if isinstance(step_noise, Tensor):
        wanted = (stages[-1].step + 1, *size)
        if step_noise.shape != wanted:
            raise ValueError(f"step_noise: expected shape {wanted}, [steps, ...], got {tuple(step_noise.shape)}")
    elif step_noise is not None and not callable(step_noise):
        raise TypeError(f"step_noise: expected a tensor or a callable, got {type(step_noise).__name__}")
    known = network.conditions("cond", cond, size[0])
    unknown = None
    if guidance_scale is not None:
        if uncond is None:
            raise ValueError("uncond: expected the unconditional conditions beside guidance_scale, got None")
        unknown = network.conditions("uncond", uncond, size[0])
        network.doubled(unknown, known)
        guidance_scale = check.coefficient("guidance_scale", guidance_scale, torch.empty(size[:1], device=where))
    elif uncond is not None:
        raise ValueError("guidance_scale: expected a number or a tensor beside uncond, got None")
    batch = size[0] if batch_size is None else check.integer("batch_size", batch_size, 1)
    source = resolve_noise(seed, noise, generator)
    if source.sample_ids is not None:
        ids = torch.as_tensor(source.sample_ids)
        if ids.shape != size[:1] or ids.dtype.is_floating_point or ids.dtype.is_complex:
            raise ValueError(f"noise: expected {size[0]} integer sample_ids, got {ids.dtype} of {tuple(ids.shape)}")
        source = source.of_samples(ids.to(where, torch.int64))
    task = Run(
        model, stages, size, start, scale, time_dtype, check.clip_range(clip), source, step_noise, known, unknown,
        guidance_scale, where, dtype, model_dtype, callback, return_trajectory, differentiable,
    )  # fmt: skip
    if not size[0]:
        nothing = torch.empty(size, dtype=dtype, device=where)
        return (nothing, nothing.new_empty((task.steps + 1, *size))) if return_trajectory else nothing
    bounds = [(low, min(low + batch, size[0])) for low in range(0, size[0], batch)]
    with (
        contextlib.nullcontext() if differentiable else torch.no_grad(),
        _bar(progress, task.steps * len(bounds)) as tick,
    ):
        parts = [_walk(task, low, high, tick) for low, high in bounds]
    x = parts[0][0] if len(parts) == 1 else torch.cat([part[0] for part in parts])
    if not return_trajectory:
        return x
    return x, torch.cat([torch.stack(part[1]) for part in parts], dim=1)


def resolve_noise(seed: int | None, noise: Noise | None, generator: torch.Generator | None) -> Noise:
    """The Noise that at most one of seed, noise and generator names."""
    given = [name for name, v in (("seed", seed), ("noise", noise), ("generator", generator)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]}: expected at most one of seed, noise and generator, got {' and '.join(given)}")
    if noise is not None:
        return noise
    return Noise.fresh(generator) if seed is None else Noise(seed)


def _walk(task: Run, low: int, high: int, tick: Callable[[], object]) -> tuple[Tensor, list[Tensor]]:
    """The stages over samples low .. high-1."""
    n, last = high - low, len(task.stages) - 1
    ids = task.noise.sample_ids
    if ids is not None or n < task.shape[0]:
        ids = torch.arange(low, high, device=task.device) if ids is None else ids[low:high]
    noise = task.noise.of_samples(ids)
    cond = network.of_samples(task.cond, low, high)
    guidance = task.guidance
    if task.uncond is not None:
        cond = network.doubled(network.of_samples(task.uncond, low, high), cond)
        guidance = guidance[low:high] if isinstance(guidance, Tensor) and guidance.shape[0] > 1 else guidance
    calls = n if task.uncond is None else 2 * n
    times = torch.tensor([stage.model_time for stage in task.stages], dtype=task.time_dtype, device=task.device)
    instants = times[:, None].expand(-1, calls).contiguous().unbind()
    buffers = _Buffers(task, n)
    updates = [_Update(task, buffers, i, noise, guidance) for i in range(last + 1)]

    x, seen = _begin(task, buffers, noise, low, high)
    kept = [x.clone()] if task.return_trajectory else []
    before = x
    for stage, update, t in zip(task.stages, updates, instants, strict=True):
        m = network.at_most(network.call(task.model, seen, t, cond), task.dtype)
        m_uncond, m = (m[:n], m[n:]) if task.uncond is not None else (None, m)
        z = None if task.step_noise is None or stage.out.z == 0.0 else _given_noise(task, stage.step, low, high)
        before, (x, seen) = x, update(x, m, m_uncond, before, z)
        if stage.time is None:
            continue
        if task.return_trajectory:
            kept.append(x.clone())
        if task.callback is not None:
            task.callback(stage.step, stage.time, x.clone())
        tick()
    return x, kept


def _begin(task: Run, buffers: _Buffers, noise: Noise, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The initial state and the first network input, in one pass."""
    following = task.stages[0].input_scale
    if task.start is None:
        row = Row(buffers.outputs(Out(z=task.scale), following))
        return buffers.apply(row, -1, noise=noise.at(Purpose.INITIAL), size=buffers.shape, device=task.device)
    row = Row(buffers.outputs(Out(x=1.0), following))
    return buffers.apply(row, -1, x=task.start[low:high])


def _given_noise(task: Run, step: int, low: int, high: int) -> Tensor:
    assert task.step_noise is not None
    z = task.step_noise[step] if isinstance(task.step_noise, Tensor) else task.step_noise(step)
    if not isinstance(z, Tensor) or z.shape != task.shape:
        got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"step_noise: expected shape {task.shape} of step {step}, got {got}")
    return z[low:high].to(task.device, task.dtype)


class _Update:
    """The pass after one network call. Into the loop's own buffers it is laid out before the loop: a step then fills in
    its tensors and calls the kernel, and allocates and checks nothing but what the network and the caller hand over."""

    def __init__(self, task: Run, buffers: _Buffers, i: int, noise: Noise, guidance: Any) -> None:
        stage = task.stages[i]
        following = task.stages[i + 1].input_scale if i + 1 < len(task.stages) else None
        clip = task.clip if stage.pred is not None else None
        self._row = Row(buffers.outputs(stage.out, following), pred=stage.pred, clip=clip, guidance=guidance)
        self._buffers, self._i, self._uses_h = buffers, i, bool(stage.out.h)
        drawn = task.step_noise is None and stage.out.z != 0.0
        self._noise = noise.at(Purpose.STEP, stage.step) if drawn else None
        self._text: str | None = None
        if buffers.reused:
            self._outs, self._result = buffers.written(i, len(self._row.outs))
            dtypes = [out.dtype for out in self._outs]
            self._spec, self._tensors = prepared(self._row, self._noise, self._outs[0], len(stage.out.h), dtypes)
            if functions.direct(task.device):
                self._text = numbers(self._spec)

    def __call__(
        self, x: Tensor, m: Tensor, m_uncond: Tensor | None, before: Tensor, z: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The new state and the next network input."""
        if not self._buffers.reused:
            h = (before,) if self._uses_h else ()
            noise = self._noise if z is None else z
            return self._buffers.apply(self._row, self._i, x=x, m=m, m_uncond=m_uncond, h=h, noise=noise)
        for out in self._outs:
            check.separate((("out", out),), (("m", m), ("m_uncond", m_uncond), ("noise", z)))
        tensors = self._tensors.copy()
        tensors[X], tensors[M], tensors[Z], tensors[M_UNCOND] = x, m, z, m_uncond
        if self._uses_h:
            tensors[FIRST_H] = before
        if self._text is None:
            functions.map_rows_out(self._spec, self._outs, *tensors)
        else:
            functions.run_numbers(self._text, self._outs, tensors)
        return self._result


class _Buffers:
    """Where the states and the network's inputs are written: by turns into two of each, so that no pass writes what
    it, or a view that the network returned, reads. A row with h writes over h, the state before last: element by
    element, which is safe. Under differentiation every pass writes anew."""

    def __init__(self, task: Run, n: int) -> None:
        self.shape = (n, *task.shape[1:])
        self._halves = 2 if task.uncond is not None else 1
        self._separate, self.reused = task.separate, not task.differentiable
        self._dtype, self._model_dtype = task.dtype, task.model_dtype
        if self.reused:
            like = (
                torch.empty(self.shape, dtype=task.dtype, device=task.device) if task.start is None else task.start[:n]
            )
            self._states = [torch.empty_like(like), torch.empty_like(like)]
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
        dtypes = (self._dtype, *[self._model_dtype] * (len(row.outs) - 1))
        if self.reused:
            outs, found = self.written(stage, len(row.outs))
            apply_row(row, dtypes=dtypes, out=outs, **terms)
            return found
        x, *inputs = apply_row(row, dtypes=dtypes, **terms)
        seen = inputs[0] if inputs else x
        return x, torch.cat([seen, seen]) if inputs and self._halves == 2 else seen

    def written(self, stage: int, n_out: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """The outputs of a stage's pass, and, of the same memory, the new state and the next network input."""
        x = self._states[stage % 2]
        if n_out == 1:
            return (x,), (x, x)
        return (x, *self._halved[stage % 2]), (x, self._inputs[stage % 2])


@contextlib.contextmanager
def _bar(progress: bool, total: int) -> Any:
    if not progress:
        yield lambda: None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc="sample", unit="step") as bar:
        yield bar.update


def _shape(shape: Sequence[int] | None, start: Tensor | None) -> tuple[int, ...]:
    if start is None:
        if shape is None:
            raise ValueError("shape: expected the state's shape, or an initial state, got None")
        return check.shape(shape)
    if not isinstance(start, Tensor) or not check.is_float(start.dtype):
        raise TypeError(
            f"initial state: expected a tensor of {check.FLOATS}, got {getattr(start, 'dtype', type(start))}"
        )
    if not start.ndim:
        raise ValueError("initial state: expected dimension 0 to be the batch, got a 0-d tensor")
    if shape is not None and tuple(start.shape) != tuple(shape):
        raise ValueError(f"initial state: expected shape {tuple(shape)}, got {tuple(start.shape)}")
    return tuple(start.shape)
