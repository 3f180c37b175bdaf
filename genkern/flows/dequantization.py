"""Uniform dequantisation: densities of continuous data as code lengths of discrete data.

    x = low + (high - low) (k + u) / L,     k = 0 .. L-1,  u ~ U(0, 1)
    -log P(k) <= -E_u log p(x) - D log((high - low) / L)

since P(k) is the integral of p over k's cell, by Jensen. Divided by D log 2 it is in bits per dimension. Theis, van
den Oord, Bethge, arXiv:1511.01844.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import check, ops
from ..noise import Noise


def dequantize(
    k: Tensor, levels: int = 256, low: float = -1.0, high: float = 1.0, *, noise: Noise | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """x = low + (high - low) (k + u) / levels, u uniform in (0, 1).

    Args:
        k: integers 0 .. levels-1, of an integer or floating dtype.  [B, ...].
        levels: L >= 2.
        low, high: the range of the data, low < high.
        noise: of u, its draw as it is given; default a seed from torch's CPU generator.
        dtype: of the result, float32 or float64.

    Returns:
        x.  [B, ...], dtype.

    Raises:
        ValueError: levels < 2, or not low < high; another dtype; k outside 0 .. levels-1, or between two of them, such
            as images scaled to [0, 1] (looked at on the host).
    """
    width = _cell(levels, low, high)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    check.whole("k", k, 0, levels - 1)
    u = ops.uniform(tuple(k.shape), noise=Noise.fresh() if noise is None else noise, device=k.device, dtype=dtype)
    return low + width * (k.to(dtype) + u)


def bits_per_dim(log_prob: Tensor, dims: int, levels: int = 256, low: float = -1.0, high: float = 1.0) -> Tensor:
    """-(log p(x) + D log((high - low) / L)) / (D log 2) of dequantised data.

    Args:
        log_prob: log p(x) of x = dequantize(k).  [B].
        dims: D, elements of a sample.
        levels, low, high: of dequantize.

    Returns:
        Bits per dimension; in the mean over u at least the discrete code length.  [B].

    Raises:
        ValueError: dims < 1, levels < 2, or not low < high.
    """
    dims = check.integer("dims", dims, 1)
    return -(log_prob / dims + math.log(_cell(levels, low, high))) / math.log(2.0)


def _cell(levels: int, low: float, high: float) -> float:
    levels = check.integer("levels", levels, 2)
    if not check.number("low", low) < check.number("high", high):
        raise ValueError(f"low, high: expected low < high, got {low} and {high}")
    return (high - low) / levels
