"""A row in plain PyTorch: what the kernels compute, operation by operation, and nothing else.

    m     = m_u + w (m_c - m_u)
    y     = clamp(a x + b m, lo, hi)
    out_j = the first given term, times its coefficient; then coefficient times term added, in the order
            y, x, m, h0, h1, h2, z

float64 throughout for float64 tensors, else float32. The kernels contract each addition into a fused multiply-add;
here product and sum may be rounded apart, so the two differ by roundings of that size. It runs on every device that
torch has, under torch.func.vmap, and its derivatives are torch's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import rows
from . import noise as _noise

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # by the code that the kernels use


class Cells:
    """The cells of a row, each as a number or as a tensor that broadcasts over samples.

    Args:
        row, table, index, values, cells, scales, formula, use_pred: as of torch.ops.genkern.map.
        like: a tensor of the state's shape; accumulator: float32 or float64.
    """

    def __init__(
        self,
        row: Sequence[float],
        table: Tensor | None,
        index: Tensor | None,
        values: Sequence[Tensor],
        cells: Sequence[int],
        scales: Sequence[float],
        formula: int,
        use_pred: bool,
        ndim: int,
        accumulator: torch.dtype,
    ) -> None:
        self._row, self._ndim, self._accumulator = row, ndim, accumulator
        self._by_cell: dict[int, Tensor] = {}
        self._table = table if table is None or index is None else table.index_select(0, index)
        for value, cell, scale in zip(values, cells, scales, strict=True):
            self._by_cell[cell] = value.to(torch.float64) * scale
        if formula:
            path = [self._by_cell.pop(c, None) for c in range(rows.ALPHA_T, rows.CELLS_WITH_FORMULA)]
            numbers = [row[rows.ALPHA_T + k] if value is None else value for k, value in enumerate(path)]
            self._by_cell.update(ddim_cells(formula, numbers, use_pred))

    def __getitem__(self, cell: int) -> Tensor | float:
        """The cell in the arithmetic's type: a number, or a tensor [B or 1, 1, ...]."""
        if self._table is not None:
            found = self._table[:, cell]
        elif cell in self._by_cell:
            found = self._by_cell[cell]
        else:
            return self._row[cell]
        return found.to(self._accumulator).reshape(-1, *[1] * (self._ndim - 1))

    def out(self, output: int, term: int) -> Tensor | float:
        """The coefficient of a term in an output."""
        return self[rows.out_cell(output, term)]

    def clamps(self) -> bool:
        """Whether the prediction is clamped; a table may always."""
        return self._table is not None or self._row[rows.LO] > -math.inf or self._row[rows.HI] < math.inf


def ddim_cells(formula: int, path: Sequence[Tensor | float], use_pred: bool) -> dict[int, Tensor]:
    """Eq. (13.13) from alpha_t, sigma_t, alpha_s, sigma_s, eta, in float64, differentiably: cell -> [B] or [1].

        d = eta (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2),   e = sqrt(sigma_s^2 - d^2)

    Without use_pred, y is folded into x and m. Mirrors csrc/kernels/rows.h.
    """
    device = next(p.device for p in path if isinstance(p, Tensor))
    alpha_t, sigma_t, alpha_s, sigma_s, eta = (
        p.to(torch.float64).reshape(-1)
        if isinstance(p, Tensor)
        else torch.full((1,), p, dtype=torch.float64, device=device)
        for p in path
    )
    zero, one = torch.zeros_like(alpha_t), torch.ones_like(alpha_t)
    # Without noise sigma_t = 0 and alpha_s = 0 are allowed; no division by them, whose derivatives are NaN.
    ratio = alpha_t / torch.where((eta == 0.0) & (alpha_s == 0.0), 1.0, alpha_s)
    divisor = torch.where((eta == 0.0) & (sigma_t == 0.0), 1.0, sigma_t)
    kept = 1.0 - ratio * ratio
    d = eta * (sigma_s / divisor) * _root(kept)
    # The kernel's value, with the derivatives of the same number without a root of sigma_s^2: that has none at 0.
    smooth = sigma_s * _root(1.0 - (eta / divisor) ** 2 * kept.clamp(min=0.0))
    e = smooth + (_root(sigma_s * sigma_s - d * d) - smooth).detach()
    if formula == rows.FORMULA_DDIM["epsilon"]:
        a, b, ex, em = 1.0 / alpha_t, -sigma_t / alpha_t, zero, one
    elif formula == rows.FORMULA_DDIM["v"]:
        a, b, ex, em = alpha_t, -sigma_t, sigma_t, alpha_t
    else:
        a, b, ex, em = zero, one, 1.0 / sigma_t, -alpha_t / sigma_t
    first = rows.FIRST_OUT
    return {
        rows.A: a,
        rows.B: b,
        first + rows.Y: alpha_s if use_pred else torch.zeros_like(alpha_s),
        first + rows.X: e * ex if use_pred else e * ex + alpha_s * a,
        first + rows.M: e * em if use_pred else e * em + alpha_s * b,
        first + rows.Z: d,
    }


def _root(value: Tensor) -> Tensor:
    """sqrt(max(value, 0)), with slope 0 where it is 0: there the root's own is infinite."""
    positive = value > 0.0
    return torch.where(positive, value, 1.0).sqrt() * positive


def draw(
    noise: int,
    key: Sequence[int],
    device_key: Tensor | None,
    sample_ids: Tensor | None,
    shape: Sequence[int],
    device: torch.device,
    accumulator: torch.dtype,
) -> Tensor:
    """The term z: normals (noise 1) or uniforms (noise 2), float32 numbers in the arithmetic's type."""
    return _noise.draw(noise, key, device_key, sample_ids, shape, device).to(torch.float32).to(accumulator)


def terms(
    x: Tensor | None, m: Tensor | None, m_uncond: Tensor | None, h: Sequence[Tensor], z: Tensor | None,
    cells: Cells, use_pred: bool, accumulator: torch.dtype,
) -> tuple[list[tuple[int, Tensor]], Tensor | None]:  # fmt: skip
    """(term, tensor) of every given term in the order of addition, and the prediction before its clamp."""
    x, m, m_uncond, z = (t if t is None else t.to(accumulator) for t in (x, m, m_uncond, z))
    if m is not None and m_uncond is not None:
        m = _add(m_uncond, cells[rows.W], m - m_uncond)
    found: list[tuple[int, Tensor]] = []
    unclamped = None
    if use_pred:
        if x is not None:
            unclamped = cells[rows.A] * x
        if m is not None:
            unclamped = cells[rows.B] * m if unclamped is None else _add(unclamped, cells[rows.B], m)
        assert unclamped is not None
        y = clamp(unclamped, cells[rows.LO], cells[rows.HI]) if cells.clamps() else unclamped
        found.append((rows.Y, y))
    found += [(term, t) for term, t in ((rows.X, x), (rows.M, m)) if t is not None]
    found += [(rows.H0 + k, t.to(accumulator)) for k, t in enumerate(h)]
    if z is not None:
        found.append((rows.Z, z))
    return found, unclamped


def clamp(value: Tensor, lo: Tensor | float, hi: Tensor | float) -> Tensor:
    """torch.clamp, for bounds that may be tensors; NaN stays NaN."""
    if isinstance(lo, Tensor) or isinstance(hi, Tensor):
        return torch.clamp(value, torch.as_tensor(lo).to(value), torch.as_tensor(hi).to(value))
    return torch.clamp(value, lo, hi)


def combine(found: Sequence[tuple[int, Tensor]], cells: Cells, output: int) -> Tensor:
    """One output: the first term's product, then the others added in their order."""
    (term, first), *others = found
    total = cells.out(output, term) * first
    for term, t in others:
        total = _add(total, cells.out(output, term), t)
    return total


def _add(total: Tensor, coefficient: Tensor | float, term: Tensor) -> Tensor:
    """total + coefficient * term, rounded twice: torch's own addcmul rounds once or twice, depending on strides."""
    return total + coefficient * term


def map(  # noqa: A001
    x: Tensor | None, m: Tensor | None, m_uncond: Tensor | None, h: Sequence[Tensor], z: Tensor | None,
    row: Sequence[float], table: Tensor | None, index: Tensor | None, values: Sequence[Tensor], cells: Sequence[int],
    scales: Sequence[float], formula: int, noise: int, key: Sequence[int], device_key: Tensor | None,
    sample_ids: Tensor | None, use_pred: bool, out_dtypes: Sequence[int], size: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> list[Tensor]:  # fmt: skip
    """torch.ops.genkern.map in plain PyTorch; same arguments."""
    outs = outputs(
        x, m, m_uncond, h, z, row, table, index, values, cells, scales, formula, noise, key, device_key, sample_ids,
        use_pred, len(out_dtypes), size, device, DTYPES[out_dtypes[0]],
    )  # fmt: skip
    return [_fresh(out.to(DTYPES[code]), outs[:j]) for j, (out, code) in enumerate(zip(outs, out_dtypes, strict=True))]


def reduce(
    x: Tensor | None, m: Tensor | None, m_uncond: Tensor | None, h: Sequence[Tensor], z: Tensor | None,
    row: Sequence[float], table: Tensor | None, index: Tensor | None, values: Sequence[Tensor], cells: Sequence[int],
    scales: Sequence[float], formula: int, noise: int, key: Sequence[int], device_key: Tensor | None,
    sample_ids: Tensor | None, use_pred: bool, mask: Tensor | None, kind: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch.ops.genkern.reduce in plain PyTorch; same arguments."""
    if mask is not None:  # what lies under the mask may be NaN, and is to leave no derivative either
        x, m, m_uncond, z = (t if t is None else torch.where(mask != 0, t, 0.0) for t in (x, m, m_uncond, z))
        h = [torch.where(mask != 0, t, 0.0) for t in h]
    (r,) = outputs(
        x, m, m_uncond, h, z, row, table, index, values, cells, scales, formula, noise, key, device_key, sample_ids,
        use_pred, 1, None, None, torch.float32,
    )  # fmt: skip
    count = r.new_full((r.shape[0], 1), math.prod(r.shape[1:]))
    if mask is None:
        rho, residual = (r.abs(), r.sign()) if kind else (r * r, r)
    else:
        mask = mask.to(r.dtype)
        r = torch.where(mask != 0, r, 0.0)
        rho, residual = (mask * r.abs(), mask * r.sign()) if kind else (mask * r * r, mask * r)
        count = by_sample(mask)[:, None]
    like = next(t for t in (m, x, z) if t is not None)
    return residual.to(like.dtype), torch.cat([by_sample(rho)[:, None], count], dim=1)


def outputs(
    x: Any, m: Any, m_uncond: Any, h: Any, z: Any, row: Any, table: Any, index: Any, values: Any, cells: Any,
    scales: Any, formula: int, noise: int, key: Any, device_key: Any, sample_ids: Any, use_pred: bool, n_out: int,
    size: Any, device: Any, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    like = x if x is not None else m if m is not None else z
    if like is not None:
        size, device, dtype = like.shape, like.device, like.dtype
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    if noise:
        z = draw(noise, key, device_key, sample_ids, size, device, accumulator)
    of = Cells(row, table, index, values, cells, scales, formula, use_pred, len(size), accumulator)
    found, _ = terms(x, m, m_uncond, h, z, of, use_pred, accumulator)
    return [combine(found, of, j) for j in range(n_out)]


def by_sample(t: Tensor) -> Tensor:
    """Sums over every sample: [B]."""
    return t.sum(tuple(range(1, t.ndim))) if t.ndim > 1 else t


def _fresh(out: Tensor, before: Sequence[Tensor]) -> Tensor:
    return out.clone() if any(out is other for other in before) else out
