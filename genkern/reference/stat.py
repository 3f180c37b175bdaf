"""Statistics of every sample of a row's outputs, in plain PyTorch: what the stat kernels compute.

    moments    sum out_j, then sum out_i out_j for i <= j
    error      sum (out_0 / (atol + rtol max(|out_1|, |out_2|)))^2
    quantile   of |out_0|: v[k] + (q (n - 1) - k) (v[k + 1] - v[k]), v sorted, k = floor(q (n - 1))

Sums are float64. Every function is differentiable: what runs where a gradient is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import formula as _formula


def stat(
    x: Tensor | None, m: Tensor | None, m_uncond: Tensor | None, h: Sequence[Tensor], z: Tensor | None,
    row: Sequence[float], table: Tensor | None, index: Tensor | None, values: Sequence[Tensor], cells: Sequence[int],
    scales: Sequence[float], formula: int, noise: int, key: Sequence[int], device_key: Tensor | None,
    sample_ids: Tensor | None, use_pred: bool, outs: int, kind: int, atol: float, rtol: float,
) -> Tensor:  # fmt: skip
    """torch.ops.genkern.stat in plain PyTorch; same arguments."""
    found = _formula.outputs(
        x, m, m_uncond, h, z, row, table, index, values, cells, scales, formula, noise, key, device_key, sample_ids,
        use_pred, outs, None, None, torch.float32,
    )  # fmt: skip
    return error(found, atol, rtol) if kind else moments(found)


def stat_quantile(
    x: Tensor | None, m: Tensor | None, m_uncond: Tensor | None, h: Sequence[Tensor], z: Tensor | None,
    row: Sequence[float], table: Tensor | None, index: Tensor | None, values: Sequence[Tensor], cells: Sequence[int],
    scales: Sequence[float], formula: int, noise: int, key: Sequence[int], device_key: Tensor | None,
    sample_ids: Tensor | None, use_pred: bool, q: float,
) -> Tensor:  # fmt: skip
    """torch.ops.genkern.stat_quantile in plain PyTorch; same arguments."""
    (found,) = _formula.outputs(
        x, m, m_uncond, h, z, row, table, index, values, cells, scales, formula, noise, key, device_key, sample_ids,
        use_pred, 1, None, None, torch.float32,
    )  # fmt: skip
    return quantile(found, q)


def moments(outs: Sequence[Tensor]) -> Tensor:
    """Sums of outs[j], then of outs[i] outs[j] for i <= j, over every sample: float64 [B, ...]."""
    wide = [out.to(torch.float64) for out in outs]
    products = [first * second for i, first in enumerate(wide) for second in wide[i:]]
    return torch.stack([_formula.by_sample(t) for t in (*wide, *products)], dim=1)


def error(outs: Sequence[Tensor], atol: float, rtol: float) -> Tensor:
    """Sums of squares of outs[0], relative to atol + rtol times the larger of the others: float64 [B, 1]."""
    off, *others = outs
    larger = torch.zeros_like(off)
    for other in others:
        larger = torch.maximum(larger, other.abs())
    ratio = (off / (atol + rtol * larger)).to(torch.float64)
    return _formula.by_sample(ratio * ratio)[:, None]


def quantile(out: Tensor, q: float) -> Tensor:
    """Of |out| in every sample, [B] of its dtype; NaN of a sample that has a NaN, or no element."""
    values = out.abs()[:, None].flatten(1)
    n = values.shape[1]
    if n == 0:
        return out.new_full((out.shape[0],), math.nan)
    at = q * (n - 1)
    k, rest = math.floor(at), at - math.floor(at)
    ordered = values.sort(dim=1).values
    low, high = ordered[:, k], ordered[:, min(k + 1, n - 1)]
    found = low
    if rest:
        between = (low.to(torch.float64) + rest * (high.to(torch.float64) - low)).to(low.dtype)
        found = torch.where(low == high, low, between)  # infinite ones too
    return torch.where(values.isnan().any(dim=1), math.nan, found)
