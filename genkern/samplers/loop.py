"""The one loop of every sampler: for each stage of a table, call the network, then apply one fused row.

    m      = network(c_in x, t)                        under guidance of a doubled batch, unconditional first
    x'     = c_y y + c_x x + c_m m + c_h h + c_z z      the stage's row
    input  = c_in' x'                                   the next call's input, in the network's dtype: the same pass

What later stages read as h, such as y of a multistep method, the same pass writes into the loop's memory.
x is kept in float32 whatever the network computes in, in two buffers that the loop alternates between; nothing in it
waits for the device. z of step k is noise.at(Purpose.STEP, k), the initial state's is noise.at(Purpose.INITIAL), and
sample b keeps its id in any split of the batch, so it is given the same noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import check
from ..brownian import BrownianNoise
from ..noise import Noise, Purpose
from ..rows import Out, Row
from ..threshold import DynamicThreshold
from . import editing, energy, guidance, network
from .callback import STOP, Callback, bar, observe
from .editing import EditingOptions, Inpaint
from .energy import Guide, GuideOptions, Steered
from .guidance import GuidanceOptions, Guided, Outputs
from .layout import layouts, outputs
from .passes import Buffers, Drawn, Update
from .table import Stage

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..graphs import Loop
    from .parameterization import Parameterization


class Options(GuidanceOptions, EditingOptions, GuideOptions, total=False):
    """The keyword arguments of every sample(), beside those of GuidanceOptions, EditingOptions and GuideOptions.

    seed: 0 to 2^64 - 1. Without seed, noise and generator a seed is drawn from torch's CPU generator.
    noise: a Noise (its draw is replaced by the loop's); or a tensor, the initial state itself [B, ...].
    generator: a torch.Generator that a seed is drawn from.
    step_noise: standard normal noise of the steps, [steps, B, ...], or a callable of the step k giving [B, ...]; of
        Diffusion also a BrownianNoise.
    device: default that of a given initial state, else the model's.
    dtype: of the state, float32 or float64; default float32.
    model_dtype: of the network's input; default that of the model's first parameter, else the state's.
    progress: show a bar (tqdm).
    callback: callback(step, time, x) after every step, x its own copy. It returns None; or a tensor like x, the state
        that the loop goes on with (what a multistep sampler remembers of earlier steps stays); or genkern.STOP, to end
        the loop with the state as it is. With batch_size each part has its own steps, and its own end.
    return_trajectory: return (x, trajectory), trajectory [steps + 1, B, ...] from the initial state on.
    batch_size: most samples that the loop carries at once; default all.
    differentiable: keep the gradient.
    cuda_graph: capture the loop as CUDA graphs at the first call, and replay them at further calls of its kind. True
        keeps them beside the model, for as long as it lives; a genkern.Loop keeps them itself. A model that cannot be
        captured runs uncaptured, with a warning that says why.
    """

    seed: int | None
    noise: Noise | Tensor | None
    generator: torch.Generator | None
    step_noise: Tensor | Callable[[int], Tensor] | BrownianNoise | None
    device: torch.device | str | None
    dtype: torch.dtype
    model_dtype: torch.dtype | None
    progress: bool
    callback: Callback | None
    return_trajectory: bool
    batch_size: int | None
    differentiable: bool
    cuda_graph: bool | Loop


def known(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options that a caller of sample() gave. TypeError: one that Options does not have."""
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"sample() got an unexpected keyword argument {sorted(unknown)[0]!r}")
    return options


@dataclasses.dataclass(frozen=True)
class Run:
    """What a loop needs to know, checked; no state of the loop itself."""

    model: Any
    stages: Sequence[Stage]
    shape: tuple[int, ...]
    start: Tensor | None
    start_scale: float  # of the start
    scale: float  # of the initial noise; 0 where the start is the initial state
    time_dtype: torch.dtype
    clip: tuple[float, float] | DynamicThreshold | None
    noise: Noise
    step_noise: Tensor | Callable[[int], Tensor] | None
    cond: Sequence[Mapping[str, Any]]  # under guidance the unconditional ones first
    guidance: Any  # its scales
    guided: Guided | None
    along: Parameterization | None  # what the network predicts, and on which path; of a Table, what it was made for
    inpaint: Inpaint | None
    guide: Guide | None
    device: torch.device
    dtype: torch.dtype
    model_dtype: torch.dtype
    callback: Callback | None
    return_trajectory: bool
    progress: bool
    differentiable: bool

    @property
    def steps(self) -> int:
        return self.stages[-1].step + 1

    @property
    def initial(self) -> tuple[Out, Purpose]:
        """The row of the initial state, and whose noise is its z: where the state is given, that of the first step's
        churn, if any; elsewhere churn and the state's own noise, which are independent, are drawn as one."""
        out = Out(z=self.scale) if self.start is None else Out(x=self.start_scale, z=self.scale)
        churn = self.stages[0].before
        if churn is None:
            return out, Purpose.INITIAL
        row = Out(x=churn.x * out.x, z=math.hypot(churn.x * out.z, churn.z))
        return row, Purpose.INITIAL if self.scale else Purpose.CHURN

    def following(self, i: int) -> float | None:
        """What the network's input after stage i is scaled by; None after the last."""
        return self.stages[i + 1].input_scale if i + 1 < len(self.stages) else None

    @functools.cached_property
    def separate(self) -> bool:
        """Whether the network's input is another tensor than the state."""
        scaled = any(stage.input_scale != 1.0 for stage in self.stages)
        return scaled or self.halves > 1 or self.model_dtype != self.dtype

    @property
    def halves(self) -> int:
        """How often the loop's passes write the network's input: one after another where one condition guides."""
        return 2 if self.guided is not None and self.guided.count == 1 else 1

    @property
    def calls(self) -> int:
        """How many samples the network sees for each of the batch."""
        return len(self.cond)

    @property
    def numbered(self) -> bool:
        """Whether passes beside a stage's own look its numbers up on the device."""
        return self.guided is not None and self.guided.apg is not None

    @property
    def watched(self) -> bool:
        """Whether something happens between two steps."""
        return self.callback is not None or self.return_trajectory or self.progress


@dataclasses.dataclass(frozen=True)
class Part:
    """Samples low .. high-1 of a run: their noise, conditions (under guidance of all, one after another), scales."""

    low: int
    high: int
    noise: Noise
    cond: dict[str, Any]
    guidance: Any
    inpaint: Inpaint | None
    guide: Guide | None

    @property
    def n(self) -> int:
        return self.high - self.low


def prepared(
    model: Any,
    stages: Sequence[Stage],
    shape: Sequence[int] | None,
    *,
    start: Tensor | None = None,
    init: Tensor | None = None,
    init_scale: float = 1.0,
    scale: float = 1.0,
    time_dtype: torch.dtype | None = None,
    along: Parameterization | None = None,
    clip: Any = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    seed: int | None = None,
    noise: Noise | Tensor | None = None,
    generator: torch.Generator | None = None,
    step_noise: Tensor | Callable[[int], Tensor] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    return_trajectory: bool = False,
    batch_size: int | None = None,
    differentiable: bool = False,
    cuda_graph: bool | Loop = False,
    guide: Callable[..., Tensor] | None = None,
    guide_scale: Any = None,
    guide_through: bool | None = None,
    guide_cond: Mapping[str, Any] | None = None,
    **conditions: Unpack[GuidanceOptions],
) -> tuple[Run, int, Any]:
    """A run with its arguments checked.

    Args:
        model: called as model(x, t, **cond); must not change x in place.
        stages: of a sampler.
        shape: [B, ...] of the state; may be None where a start is given.
        start: the initial state; else `noise` where it is a tensor, else init_scale init + scale noise, or the second
            term alone.
        time_dtype: of t; default float32, float64 where the network's input is float64.
        along: what the network predicts and on which path; apg, mask and guide need it.
        clip: None, or (lo, hi), or c for (-c, c): the clamp of the predicted data; or a DynamicThreshold.
        others: as Options says.

    Returns:
        (run, batch size of a part, captures or None).

    Raises:
        ValueError, TypeError: an argument is not what it may be; the model's output has another shape than its input.
    """
    if init is not None:
        if start is not None:
            raise ValueError("init: expected None where the initial state is given, got a tensor")
        if isinstance(noise, Tensor):
            raise ValueError("noise: expected a Noise beside init, got a tensor")
    if isinstance(noise, Tensor):
        if start is not None:
            raise ValueError("noise: expected a Noise where the initial state is given, got a tensor")
        start, noise = noise, None
    elif noise is not None and not isinstance(noise, Noise):
        raise TypeError(f"noise: expected a Noise or a tensor, got {type(noise).__name__}")
    size = size_of(shape, start) if init is None else size_of(shape, init, "init")
    if init is not None or start is None:
        start, start_scale = init, init_scale
    else:
        start_scale, scale = 1.0, 0.0
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64 for the state, got {dtype}")
    model_dtype = network.dtype_of(model, dtype) if model_dtype is None else network.checked_dtype(model_dtype)
    if time_dtype is None:
        time_dtype = torch.float64 if model_dtype == torch.float64 else torch.float32
    if device is not None:
        where = network.checked_device(device)
    else:
        where = start.device if start is not None else network.device_of(model)
    if start is not None:
        start = start.to(where, dtype)
    check_step_noise(step_noise, stages[-1].step + 1, size)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")
    limits = clip if isinstance(clip, DynamicThreshold) else check.clip_range(clip)
    if limits is not None and all(stage.pred is None for stage in stages):
        raise ValueError(f"clip: expected None with a sampler that predicts no data, got {clip}")
    both = any(stage.pred is not None and any(out.m != 0.0 for out in stage.outs) for stage in stages)
    if differentiable and isinstance(limits, DynamicThreshold) and both:
        raise ValueError(
            "clip: expected no DynamicThreshold with differentiable=True and a sampler whose rows read the network's "
            "output beside the predicted data"
        )
    like = torch.empty(size[:1], device=where)
    given, scales, guided = guidance.checked(conditions, stages, along, like, guide is not None)
    steering = energy.checked(guide, guide_scale, guide_through, guide_cond, stages, along, like)
    if steering is not None and differentiable:
        raise ValueError("guide: expected None with differentiable=True, as it takes gradients of its own")
    state = torch.empty((), dtype=dtype, device=where).expand(size)
    inpaint = editing.inpainting(mask, known, state, start, differentiable)
    if inpaint is not None and along is None:
        raise ValueError("mask: expected None where the sampler's path is not known, got a tensor")
    batch = size[0] if batch_size is None else check.integer("batch_size", batch_size, 1)
    captures = None
    if cuda_graph is not False:
        from .. import graphs

        if differentiable:
            raise ValueError("cuda_graph: expected False with differentiable=True, a captured loop keeps no gradient")
        captures = graphs.captures_of(cuda_graph, model)
    if noise is not None and noise.sample_ids is not None:
        noise = noise.of_samples(check.sample_ids(noise.sample_ids, size[0], False, where))
    source = resolve_noise(seed, noise, generator)  # the last check, as it may draw a seed
    task = Run(
        model, stages, size, start, start_scale, scale, time_dtype, limits, source, step_noise, given, scales, guided,
        along, inpaint, steering, where, dtype, model_dtype, callback, return_trajectory, progress, differentiable,
    )  # fmt: skip
    return task, batch, captures


def run(model: Any, stages: Sequence[Stage], shape: Sequence[int] | None, **options: Any) -> Any:
    """Walk the stages from an initial state.

    Args:
        model, stages, shape, options: as of prepared().

    Returns:
        The final state [B, ...], or (state, trajectory).

    Raises:
        ValueError, TypeError: an argument is not what it may be; the model's output has another shape than its input.
    """
    task, batch, captures = prepared(model, stages, shape, **options)
    size = task.shape
    if not size[0]:
        nothing = torch.empty(size, dtype=task.dtype, device=task.device)
        return (nothing, nothing.new_empty((task.steps + 1, *size))) if task.return_trajectory else nothing
    walked = walk if captures is None else captures.walk
    bounds = bounds_of(size[0], batch)
    with (
        contextlib.nullcontext() if task.differentiable else torch.no_grad(),
        bar(task.progress, task.steps * len(bounds)) as tick,
    ):
        parts = [walked(task, part_of(task, low, high), tick) for low, high in bounds]
    x = parts[0][0] if len(parts) == 1 else torch.cat([part[0] for part in parts])
    if not task.return_trajectory:
        return x
    length = max(len(part[1]) for part in parts)  # a part that was stopped stays where it was
    states = [[*kept, *[kept[-1]] * (length - len(kept))] for _, kept in parts]
    return x, torch.cat([torch.stack(part) for part in states], dim=1)


def bounds_of(samples: int, batch: int) -> list[tuple[int, int]]:
    """The first sample, and the one after the last, of each part of a batch."""
    return [(low, min(low + batch, samples)) for low in range(0, samples, batch)]


def resolve_noise(seed: int | None, noise: Noise | None, generator: torch.Generator | None) -> Noise:
    """The Noise that at most one of seed, noise and generator names."""
    check_source(seed, noise, generator)
    if noise is not None:
        return noise
    return Noise.fresh(generator) if seed is None else Noise(seed)


def check_source(seed: int | None, noise: Noise | None, generator: torch.Generator | None) -> None:
    """At most one of them. ValueError: more. TypeError: a generator that is none."""
    given = [name for name, v in (("seed", seed), ("noise", noise), ("generator", generator)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]}: expected at most one of seed, noise and generator, got {' and '.join(given)}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")


def check_step_noise(step_noise: Any, steps: int, size: tuple[int, ...]) -> None:
    """ValueError: a tensor of another shape than [steps, *size]. TypeError: neither None, a tensor nor a callable."""
    if isinstance(step_noise, Tensor):
        wanted = (steps, *size)
        if step_noise.shape != wanted:
            raise ValueError(f"step_noise: expected shape {wanted}, [steps, ...], got {tuple(step_noise.shape)}")
    elif step_noise is not None and not callable(step_noise):
        raise TypeError(f"step_noise: expected a tensor or a callable, got {type(step_noise).__name__}")


def part_of(task: Run, low: int, high: int) -> Part:
    """Samples low .. high-1 of a run."""
    ids = task.noise.sample_ids
    if ids is not None or high - low < task.shape[0]:
        ids = torch.arange(low, high, device=task.device) if ids is None else ids[low:high]
    cond = network.stacked([network.of_samples(each, low, high) for each in task.cond])
    scales = guidance.of_samples(task.guidance, low, high)
    inpaint = None if task.inpaint is None else task.inpaint.of_samples(low, high)
    guide = None if task.guide is None else task.guide.of_samples(low, high)
    return Part(low, high, task.noise if ids is None else task.noise.of_samples(ids), cond, scales, inpaint, guide)


def walk(task: Run, part: Part, tick: Callable[[], object]) -> tuple[Tensor, list[Tensor]]:
    """The stages over a part: its last state, and its states from the initial one on where they are asked for."""
    times = torch.tensor([stage.model_time for stage in task.stages], dtype=task.time_dtype, device=task.device)
    instants = times[:, None].expand(-1, task.calls * part.n).contiguous().unbind()
    numbers: Sequence[Any] = (None,) * len(task.stages)
    if task.numbered:
        numbers = torch.arange(len(task.stages), device=task.device).split(1)
    buffers = Buffers(task, part.n)
    laid_out = layouts(task, part.guidance)
    drawn = Drawn.of(part.noise, laid_out, buffers)
    updates = [Update(buffers, layout, i, drawn) for i, layout in enumerate(laid_out)]

    x, seen = begin(task, part, buffers)
    asked = Outputs(task, part.n, x) if part.guide is None else Steered(task, part.n, x, part.guide)
    kept = [x.clone()] if task.return_trajectory else []
    before, watched = x, task.watched
    for i, (stage, update, t) in enumerate(zip(task.stages, updates, instants, strict=True)):
        m, m_uncond, rescale = asked(task.model, i, numbers[i], x, seen, t, part.cond, part.guidance)
        v = None if stage.log_scale is None else network.range_of(task.model, part.n, task.dtype)
        z = None if task.step_noise is None else given_noise(task, part, stage)
        before, (x, seen) = x, update(x, m, m_uncond, before, z, rescale, v, part.inpaint)
        if not watched:
            continue
        changed = observe(task, stage, x, kept, tick)
        if changed is STOP:
            break
        if changed is not None:
            x, seen = buffers.entered(i, changed, task.following(i))
    return x, kept


def begin(task: Run, part: Part, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """The initial state and the first network input, in one pass."""
    out, purpose = task.initial
    row, noise = Row(outputs(task, out, task.stages[0].input_scale)), part.noise.at(purpose)
    if task.start is None:
        return buffers.apply(row, -1, noise=noise, size=buffers.shape, device=task.device)
    return buffers.apply(row, -1, x=task.start[part.low : part.high], noise=noise if out.z else None)


def given_noise(task: Run, part: Part, stage: Stage) -> Tensor | None:
    """The noise that the caller gives a stage, if any."""
    if task.step_noise is None or stage.out.z == 0.0:
        return None
    z = task.step_noise[stage.step] if isinstance(task.step_noise, Tensor) else task.step_noise(stage.step)
    if not isinstance(z, Tensor) or z.shape != task.shape:
        got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"step_noise: expected shape {task.shape} of step {stage.step}, got {got}")
    return z[part.low : part.high].to(task.device, task.dtype)


def size_of(shape: Sequence[int] | None, start: Tensor | None, name: str = "initial state") -> tuple[int, ...]:
    """The state's shape, of a given start where there is one. ValueError, TypeError: they are not what they may be."""
    if start is None:
        if shape is None:
            raise ValueError("shape: expected the state's shape, or an initial state, got None")
        return check.shape(shape)
    if not isinstance(start, Tensor) or not check.is_float(start.dtype):
        raise TypeError(f"{name}: expected a tensor of {check.FLOATS}, got {getattr(start, 'dtype', type(start))}")
    if not start.ndim:
        raise ValueError(f"{name}: expected dimension 0 to be the batch, got a 0-d tensor")
    if shape is not None and tuple(start.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(start.shape)}")
    return tuple(start.shape)
