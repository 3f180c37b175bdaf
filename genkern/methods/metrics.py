"""Distances d(f, f^-) of a consistency model beside the kinds of ops.path_loss: callables of two tensors, giving [B].

Any such callable is a metric, LPIPS among them: it is given the student's f, which the gradient flows through, and f^-,
which has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import check, ops


class AdaptiveL2:
    """The squared distance over a power of itself that has no gradient, S / sg(S + c^2)^p,  S = |f - f^-|^2.

    p = 0 is S; p = 1/2 has twice the gradient of the pseudo-Huber distance sqrt(S + c^2) - c.

    Args:
        p: the power, >= 0.
        c: > 0; default 0.00054 sqrt(elements of a sample).

    Raises:
        ValueError: an argument outside its range.

    Source: Geng, Pokle, Luo, Lin, Kolter, arXiv:2406.14548, section 3.2; Geng, Deng, Bai, Kolter, He, arXiv:2505.13447,
    eq. (22), of whose c this is the root.
    """

    def __init__(self, p: float = 0.5, c: float | None = None) -> None:
        self.p = check.number("p", p, 0.0)
        if c is not None and not check.number("c", c) > 0.0:
            raise ValueError(f"c: expected a number > 0, got {c}")
        self.c = c

    def __call__(self, f: Tensor, target: Tensor) -> Tensor:
        """[B], float32 (float64 for float64)."""
        elements = max(math.prod(f.shape[1:]), 1)
        squares = elements * torch.as_tensor(ops.path_loss(f, h=(target,), reduction="none"))
        c = 0.00054 * elements**0.5 if self.c is None else self.c
        return squares / (squares.detach() + c * c) ** self.p
