"""Operations on one number a sample, [B]. On a GPU each is a launch, whatever its size: so few of them."""

from __future__ import annotations

import torch
from torch import Tensor


def affine(x: Tensor, scale: float, shift: float) -> Tensor:
    """scale x + shift, in one operation."""
    return torch.rsub(x, shift, alpha=-scale)  # shift - (-scale) x
