"""Editing given data: a loop that starts part of the way along the path, and one that keeps what is known.

    x_t = alpha_t init + sigma_t z      at the first t of the last max(1, floor(strength n)) of n steps
    x_s <- mask x_s + (1 - mask) (alpha_s known + sigma_s z_k)      after step k; after the last one z_k is 0, alpha_s 1

Meng et al., arXiv:2108.01073 (SDEdit); Lugmayr et al., arXiv:2201.09865, without its steps back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from .. import check
from ..noise import Noise, Purpose
from ..rows import Out, Row
from .passes import Buffers, noised

if TYPE_CHECKING:
    from .loop import Run
    from .parameterization import Parameterization


class EditingOptions(TypedDict, total=False):
    """The keyword arguments of every sample() for data that are given.

    init: data to start from, noised, [B, ...] floating; its noise is that of an initial state. Needs strength.
    strength: in (0, 1]: the part of the steps that is walked, the last max(1, floor(strength n)) of n. At 1 all are,
        and little is left of init.
    mask: where to generate, of 0 to 1, or bool; broadcast to [B, ...]: where it is 0, known is kept. Needs known. The
        multistep samplers' earlier predictions stay the network's own.
    known: data, [B, ...] floating, noised to the time of every step's end, with noise.at(Purpose.KNOWN, step); in the
        result they are as given.
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
    """Where to generate, and what is known elsewhere, both [B, ...] of the state's dtype."""

    mask: Tensor
    known: Tensor

    def of_samples(self, low: int, high: int) -> Inpaint:
        return Inpaint(self.mask[low:high], self.known[low:high])


def inpainting(mask: Any, known: Any, like: Tensor) -> Inpaint | None:
    """The options mask and known, checked, for a state like `like`.

    Raises:
        ValueError, TypeError: one of them alone, another shape, another type, a mask outside [0, 1].
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
    mask, known = mask.to(like.device, like.dtype), known.to(like.device, like.dtype)
    check.mask(mask, like)
    return Inpaint(check.inside("mask", mask, 0.0, 1.0).expand(like.shape), known)


class Blend:
    """The passes that keep what is known, after those of a step.

    Args:
        task: the run.
        buffers: of its loop.
    """

    def __init__(self, task: Run, buffers: Buffers) -> None:
        assert task.along is not None
        self._stages, self._buffers = task.stages, buffers
        lines = [(1.0, 0.0, 1.0)] * len(task.stages)
        for i, stage in enumerate(task.stages[:-1]):
            if stage.time is not None:
                lines[i] = (*task.along.scales(stage.time), task.stages[i + 1].input_scale)
        self.numbers = torch.tensor(lines, dtype=torch.float64).to(task.device)

    def __call__(
        self, i: int, stage: Tensor, x: Tensor, seen: Tensor, given: Inpaint, noise: Noise, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The state and the network's input, blended.

        Args:
            i: the stage, or under a key one that writes the same buffers.
            stage: its number, int64 [1] on the device.
            x, seen: what the stage's pass has written.
            given: of the part.
            noise: of the part.
            key: int64 [3] on the device, seed, stream and step, in place of the noise's and the stage's.
        """
        if self._stages[i].time is None:
            return x, seen
        alpha, sigma, following = self.numbers.index_select(0, stage).unbind(1)
        drawn = noise.at(Purpose.KNOWN, self._stages[i].step if key is None else 0)
        known = noised(Row((Out(x=alpha, z=sigma),)), given.known, drawn, key)
        blended = torch.lerp(known, x, given.mask, out=x if self._buffers.reused else None)
        return self._buffers.entered(i, blended, following if i + 1 < len(self._stages) else None)
