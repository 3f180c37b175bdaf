"""Editing given data: a loop that starts part of the way along the path, and one that keeps what is known.

    x_t = alpha_t init + sigma_t z      at the first t of the last max(1, floor(strength n)) of n steps
    x_s <- mask x_s + (1 - mask) (alpha_s known + sigma_s z_k)      of step k; of the last one sigma_s is 0, alpha_s 1

The second line is part of the step's own pass (rows.Elementwise), which has one noise: z_k is that of the step where
the step has noise, else a noise of its own. Where the mask is 0 or 1 an element has only one of the two.

Meng et al., arXiv:2108.01073 (SDEdit); Lugmayr et al., arXiv:2201.09865, without its steps back.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from .. import check

if TYPE_CHECKING:
    from .loop import Run
    from .parameterization import Parameterization


class EditingOptions(TypedDict, total=False):
    """The keyword arguments of every sample() for data that are given.

    init: data to start from, noised, [B, ...] floating; its noise is that of an initial state. Needs strength.
    strength: in (0, 1]: the part of the steps that is walked, the last max(1, floor(strength n)) of n. At 1 all are,
        and little is left of init.
    mask: where to generate, of 0 to 1, or bool; broadcast to [B, ...]: where it is 0, known is kept. Needs known. The
        multistep samplers' earlier predictions stay the network's own. It has no gradient.
    known: data, [B, ...] floating, noised to the time of every step's end; in the result they are as given. Their noise
        is the step's own, given or drawn with noise.at(Purpose.STEP, step); of a step without noise it is drawn with
        noise.at(Purpose.KNOWN, step). Where the mask lies between 0 and 1, a step of noise d z and what is known thus
        share their z, of which the sum has mask d + (1 - mask) sigma_s, and not the root of the sum of their squares.
    """

    init: Tensor | None
    strength: float | None
    mask: Tensor | None
    known: Tensor | None


def begun(grid: np.ndarray, along: Parameterization, options: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """The times that are walked, and loop.run's arguments for init and strength, which options may have.

    Raises:
        ValueError, TypeError: strength is not what it may be.
    """
    found = dict(options)
    init, strength = found.pop("init", None), found.pop("strength", None)
    if init is None:
        if strength is not None:
            raise ValueError(f"strength: expected None without init, got {strength}")
        return grid, found
    if strength is None:
        raise ValueError("strength: expected a number > 0, at most 1, beside init, got None")
    if not check.number("strength", strength, 0.0, 1.0) > 0.0:
        raise ValueError(f"strength: expected a number > 0, at most 1, got {strength}")
    steps = len(grid) - 1
    walked = max(1, math.floor(steps * strength + 1e-9))  # 0.29 * 100 is 28.999999999999996
    grid = grid[steps - walked :]
    alpha, sigma = along.scales(float(grid[0]))
    return grid, {**found, "init": init, "init_scale": alpha, "scale": sigma}


def refuse(options: Mapping[str, Any], where: str) -> None:
    """ValueError: options of editing, which have no meaning where the walk is toward the noise."""
    for name in EditingOptions.__annotations__:
        if options.get(name) is not None:
            raise ValueError(f"{name}: expected None {where}")


class Inpaint(NamedTuple):
    """What is known, of the state's dtype, and where it is kept, of 0 to 1 or bool; [B, ...], laid out as states."""

    keep: Tensor
    known: Tensor

    def of_samples(self, low: int, high: int) -> Inpaint:
        return Inpaint(self.keep[low:high], self.known[low:high])

    @property
    def kind(self) -> Hashable:
        """What of it is no number, for captures."""
        return self.keep.dtype


def inpainting(
    mask: Any, known: Any, like: Tensor, start: Tensor | None, differentiable: bool
) -> Inpaint | None:  # fmt: skip
    """The options mask and known, checked, for a state like `like`, laid out as a given start is.

    Raises:
        ValueError, TypeError: one of them alone, another shape, another type, a mask outside [0, 1], or, where a
            gradient is kept, one that requires it.
    """
    if mask is None and known is None:
        return None
    for name, value, other in (("mask", mask, "known"), ("known", known, "mask")):
        if value is None:
            raise ValueError(f"{name}: expected a tensor beside {other}, got None")
        flags = value is mask and isinstance(value, Tensor) and value.dtype == torch.bool
        if not isinstance(value, Tensor) or not (flags or check.is_float(value.dtype)):
            raise TypeError(f"{name}: expected a tensor of {check.FLOATS}, got {getattr(value, 'dtype', type(value))}")
    if known.shape != like.shape:
        raise ValueError(f"known: expected shape {tuple(like.shape)}, got {tuple(known.shape)}")
    if mask.requires_grad and differentiable:
        raise ValueError("mask: expected a tensor that requires no gradient, got one that does")
    flags, mask = mask.dtype == torch.bool, mask.detach()
    mask = mask.to(like.device) if flags else mask.to(like.device, like.dtype)
    known = known.to(like.device, like.dtype)
    keep = ~check.mask(mask, like) if flags else 1.0 - check.mask(check.inside("mask", mask, 0.0, 1.0), like)
    return Inpaint(*(_laid_out(t, start) for t in (keep, known)))


def _laid_out(t: Tensor, start: Tensor | None) -> Tensor:
    """A tensor with the strides of the loop's states, once for all passes: they then read it in the order of memory."""
    if start is None:
        return t.contiguous()
    found = torch.empty_like(start, dtype=t.dtype)
    return t if t.stride() == found.stride() else found.copy_(t)


def weights_of(task: Run, i: int) -> tuple[float, float] | None:
    """(alpha_s, sigma_s) of what is known at the end of the step that stage i ends; None: its pass does not blend."""
    time = task.stages[i].time
    if task.inpaint is None or time is None:
        return None
    assert task.along is not None
    alpha, sigma = task.along.scales(time) if i + 1 < len(task.stages) else (1.0, 0.0)
    return float(alpha), float(sigma)
