"""Editing with a consistency function, without training for it: what is known of y is kept in coordinates A x.

    x_1 ~ N(y_0, t_1^2 I),   y_0 = A^-1 [(1 - mask) A y]
    x  <- A^-1 [(1 - mask) A y + mask A f(x_n, t_n)],   x_{n+1} ~ N(x, (t_{n+1}^2 - epsilon^2) I),   t_1 > t_2 > ...

mask is 1 where A x is generated, and A an invertible linear map: the identity (inpainting), colours turned so that the
first one is the luminance (Colours: colorization), or blocks of pixels turned so that the first coordinate is their
mean (Blocks: super-resolution). The last two turn by the reflection H = I - 2 u u^T / |u|^2, u = v - e_1, of a unit
vector v: H v = e_1, and H is its own inverse.

Song, Dhariwal, Chen, Sutskever, arXiv:2303.01469, algorithm 4 and appendix D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .. import check
from ..fused import apply_row
from ..noise import Noise, Purpose
from ..rows import Out, Row
from ..samplers import Preconditioned, network
from ..samplers.loop import check_source

if TYPE_CHECKING:
    from collections.abc import Mapping

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


class Transform(Protocol):
    """An invertible linear map of images."""

    def forward(self, x: Tensor) -> Tensor: ...

    def backward(self, x: Tensor) -> Tensor: ...


class Colours:
    """The colours of [B, C, ...] turned so that channel 0 is v^T x, v a unit vector; its own inverse.

    Args:
        weights: of the colours, v times any number > 0; default those of the luminance.

    Raises:
        ValueError: fewer than two weights, or a sum of squares that is not positive and finite.
    """

    def __init__(self, weights: Sequence[float] = LUMINANCE) -> None:
        self.matrix = _reflection(weights)

    def forward(self, x: Tensor) -> Tensor:
        """H x.  [B, C, ...]."""
        if x.ndim < 2 or x.shape[1] != len(self.matrix):
            raise ValueError(f"x: expected {len(self.matrix)} channels, [B, C, ...], got shape {tuple(x.shape)}")
        return torch.einsum("cd,bd...->bc...", self.matrix.to(x.device, x.dtype), x)

    backward = forward

    def unknown(self, x: Tensor) -> Tensor:
        """The mask that generates all but the first coordinate.  [1, C, 1, ...]."""
        return _all_but_first(len(self.matrix), x.ndim, x.device)


class Blocks:
    """Blocks of size x size pixels of [B, C, H, W], as channels [B, C size^2, H / size, W / size], turned so that the
    first coordinate of a block is size times its mean.

    Args:
        size: >= 2.

    Raises:
        ValueError: a smaller size, or images whose sides it does not divide.
    """

    def __init__(self, size: int) -> None:
        self.size = check.integer("size", size, 2)
        self._turned = Colours((1.0,) * self.size**2)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[2] % self.size or x.shape[3] % self.size:
            raise ValueError(f"x: expected [B, C, H, W] with sides divisible by {self.size}, got {tuple(x.shape)}")
        apart = functional.pixel_unshuffle(x, self.size).unflatten(1, (x.shape[1], -1)).flatten(0, 1)
        return self._turned.forward(apart).unflatten(0, (x.shape[0], -1)).flatten(1, 2)

    def backward(self, x: Tensor) -> Tensor:
        turned = self._turned.backward(x.unflatten(1, (-1, self.size**2)).flatten(0, 1))
        return functional.pixel_shuffle(turned.unflatten(0, (x.shape[0], -1)).flatten(1, 2), self.size)

    def unknown(self, x: Tensor) -> Tensor:
        """The mask that generates all but the blocks' means, for images like x.  [1, C size^2, 1, 1]."""
        return _all_but_first(self.size**2, 4, x.device).repeat(1, x.shape[1], 1, 1)


class ZeroShot:
    """edit(), of Consistency."""

    sigma_min: float
    function: Preconditioned

    def _decreasing(self, steps: int | None, times: Any) -> np.ndarray:
        """The times of f, decreasing from T, then epsilon."""
        raise NotImplementedError

    @torch.no_grad()
    def edit(
        self, model: Any, y: Tensor, mask: Tensor, *, transform: Transform | None = None, steps: int | None = None,
        times: Any = None, clip: Any = None, seed: int | None = None, noise: Noise | None = None,
        generator: torch.Generator | None = None, cond: Mapping[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """What is known of y kept, the rest generated; one network call a time.

        sample(mask=, known=) inpaints too, in every family, with its options; there the known part is noised as the
        state is, here it is put in after f, before the noise, and any transform may stand between.

        Args:
            model: F.
            y: reference.  [B, ...], float32 or float64. A y is not read where mask is 1.
            mask: 1 where A x is generated, 0 where A y is kept, or between; of 0 to 1, or bool, broadcast to A y.
            transform: A; default the identity. Colours and Blocks have their masks: `unknown(y)`.
            steps: network calls, >= 1; default 1. The times are (13.30)'s upper ones of steps + 1.
            times: instead of steps: strictly decreasing times in (epsilon, T], at least one.
            clip: None, (lo, hi), or c for (-c, c): the clamp of f.
            seed, noise, generator: as of sample(); z of time n is noise.at(Purpose.STEP, n).
            cond: keyword arguments of the model; tensors have the batch as dimension 0.

        Returns:
            [B, ...], y's dtype.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than y.

        Source: arXiv:2303.01469, algorithm 4.
        """
        check.terms([("y", y)])
        if y.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"y: expected float32 or float64, got {y.dtype}")
        grid, limits = self._decreasing(steps, times), check.clip_range(clip)
        given = network.conditions("cond", cond, y.shape[0])
        known = y if transform is None else transform.forward(y)
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
        free = check.inside("mask", mask.to(known.device, known.dtype), 0.0, 1.0)
        check.mask(free, known)
        known = torch.where(free == 1.0, 0.0, known * (1.0 - free))
        check_source(seed, noise, generator)
        source = noise if noise is not None else Noise(seed) if seed is not None else Noise.fresh(generator)

        def back(a: Tensor) -> Tensor:
            return a if transform is None else transform.backward(a)

        f, dtype, x, scale = self.function, network.dtype_of(model, y.dtype), back(known), float(grid[0])
        for n, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            c_in = float(f.c_in(t))
            noising = Row((Out(x=1.0, z=scale), Out(x=c_in, z=c_in * scale)))
            x_t, seen = apply_row(noising, x=x, noise=source.at(Purpose.STEP, n), dtypes=(y.dtype, dtype))
            told = torch.full(y.shape[:1], float(f.c_noise(t)), device=y.device)
            m = network.at_most(network.call(model, seen, told, given), y.dtype)
            row = Row((Out(y=1.0),), pred=(float(f.c_skip(t)), float(f.c_out(t))), clip=limits)
            (found,) = apply_row(row, x=x_t, m=m)
            x = back(torch.addcmul(known, found if transform is None else transform.forward(found), free))
            scale = max(s * s - self.sigma_min**2, 0.0) ** 0.5
        return x


def _reflection(weights: Sequence[float]) -> Tensor:
    v = torch.tensor([check.number("weights", w) for w in weights], dtype=torch.float64)
    norm = float(v.square().sum().sqrt())
    if len(v) < 2 or not norm > 0.0:
        raise ValueError(f"weights: expected at least two numbers, not all 0, got {list(weights)}")
    u = v / norm
    u[0] -= 1.0
    square = float(u.square().sum())
    one = torch.eye(len(v), dtype=torch.float64)
    return one if square == 0.0 else one - 2.0 / square * torch.outer(u, u)


def _all_but_first(count: int, ndim: int, device: torch.device) -> Tensor:
    mask = torch.ones(count, device=device)
    mask[:1] = 0.0
    return mask.reshape(1, count, *[1] * (ndim - 2))
