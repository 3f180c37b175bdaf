"""Rows of coefficients: what one pass of a kernel computes.

    m     = m_u + w (m_c - m_u)
    y     = clamp(a x + b m, lo, hi)
    out_j = c0j y + c1j x + c2j m + sum_k c3jk h_k + s_j z

A coefficient is a number, or a tensor (array) of shape [B] or [1]. A row is packed into *cells*, the flat layout that
the kernels know (docs/design.md, "Cells"; csrc/kernels/rows.h).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Coef = Any  # a float, a tensor or array of shape [B] or [1], or a Scaled one

A, B, LO, HI, W = range(5)
FIRST_OUT, OUT_CELLS = 5, 7
Y, X, M, H0, H1, H2, Z = range(OUT_CELLS)
MAX_OUTS, MAX_H, MAX_VALUES = 3, 3, 12
ALPHA_T, SIGMA_T, ALPHA_S, SIGMA_S, ETA = range(26, 31)
CELLS_WITH_FORMULA = 31

FORMULA_NONE, FORMULA_DDIM = 0, {"epsilon": 1, "v": 2, "sample": 3}
ROUNDING = 1e-6  # a variance this far below zero, relatively, is rounding (path values kept in float32)


def n_cells(n_out: int) -> int:
    """Cells of a row with n_out outputs."""
    return FIRST_OUT + OUT_CELLS * n_out


def out_cell(out: int, term: int) -> int:
    """The cell of a term's coefficient in output `out`."""
    return FIRST_OUT + OUT_CELLS * out + term


# Not frozen: that would make them three times as dear, and every call makes some.
@dataclasses.dataclass(slots=True)
class Out:
    """Coefficients of one output: y + x + m + h + z, each times its number."""

    y: Coef = 0.0
    x: Coef = 0.0
    m: Coef = 0.0
    h: tuple[Coef, ...] = ()
    z: Coef = 0.0


@dataclasses.dataclass(slots=True)
class Row:
    """One row: the prediction (a, b), its clamp, the guidance scale w, and one to three outputs.

    `pred` is None where no output uses y; a row that clamps has to have it. Bounds that are tensors have no gradient.
    """

    outs: tuple[Out, ...]
    pred: tuple[Coef, Coef] | None = None
    clip: tuple[Coef, Coef] | None = None
    guidance: Coef | None = None


@dataclasses.dataclass(frozen=True)
class RowTable:
    """A table of packed rows [R, K] on the tensors' device, float32 (float64 for float64 arithmetic).

    index: None (R is 1 or B: a row a sample), or int64 [B], or int64 [1] in device memory: one row for all.
    """

    table: Any
    n_out: int
    index: Any = None
    use_pred: bool = False


@dataclasses.dataclass(slots=True)
class DDIMRow:
    """The row of eq. (13.13), computed in the kernel from path values, each a number or a tensor [B] or [1].

    d  = eta (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2)
    x_s = alpha_s y + sqrt(sigma_s^2 - d^2) epsilon + d z
    """

    prediction: str
    alpha_t: Coef
    sigma_t: Coef
    alpha_s: Coef
    sigma_s: Coef
    eta: Coef = 0.0
    clip: tuple[float, float] | None = None
    guidance: Coef | None = None
    return_pred: bool = False


class Scaled(NamedTuple):
    """A coefficient that is a number times a tensor: the kernel multiplies, so no small launch precedes it."""

    value: Any
    scale: float


def times(scale: float, value: Coef) -> Coef:
    """scale * value, left to the kernel where value is a tensor."""
    return scale * value if isinstance(value, float) else Scaled(value, scale)


class Packed(NamedTuple):
    """A row as the kernels take it (docs/design.md, "Torch ops")."""

    row: list[float]
    values: list[Any]
    cells: list[int]
    scales: list[float]
    formula: int
    use_pred: bool
    n_out: int
    draws: bool | None  # whether z has a coefficient; None where only the device knows
    table: Any = None
    index: Any = None
    n_h: int = 0  # how many h it has coefficients for

    def uses(self, term: int) -> bool:
        """Whether a term has a coefficient other than 0, in an output or (x and m) in the prediction."""
        row, cells = self.row, self.cells
        if self.use_pred and term < H0 and (row[A + term - X] != 0.0 or A + term - X in cells):
            return True
        firsts = range(FIRST_OUT + term, n_cells(self.n_out), OUT_CELLS)
        for cell in firsts:  # a loop costs less than any() of a generator
            if row[cell] != 0.0 or cell in cells:
                return True
        return False


def pack(row: Row | DDIMRow | RowTable) -> Packed:
    """The cells of a row: its numbers in float64, and its tensors as values over them."""
    if isinstance(row, Row):
        return _pack_row(row)
    if isinstance(row, DDIMRow):
        return _pack_ddim(row)
    return Packed([], [], [], [], FORMULA_NONE, row.use_pred, row.n_out, None, row.table, row.index)


def host_table(rows: Sequence[Row | DDIMRow]) -> tuple[list[list[float]], bool]:
    """Rows of host numbers as the lines of a RowTable, and its use_pred; all with the same number of outputs.

    A prediction is folded into x and m in all of them or in none, so that one kernel serves the table.
    """
    packed = [pack(row) for row in rows]
    for k, p in enumerate(packed):
        if p.values or p.table is not None or p.n_out != packed[0].n_out:
            raise ValueError(f"rows[{k}]: expected host numbers and {packed[0].n_out} outputs")
    use_pred = any(p.use_pred for p in packed)
    if use_pred:
        packed = [_pack_ddim(row, True) if isinstance(row, DDIMRow) else _pack_row(row, True) for row in rows]
    return [p.row for p in packed], use_pred


def _pack_row(row: Row, use_pred: bool | None = None) -> Packed:
    outs, pred, clip, guidance = row.outs, row.pred, row.clip, row.guidance
    # Numbers are written out here: torch.compile takes those of module constants for variables.
    a, b = (0.0, 0.0) if pred is None else pred
    lo, hi = (-math.inf, math.inf) if clip is None else clip
    cells: list[Any] = [a, b, lo, hi, 1.0 if guidance is None else guidance]
    n_h = 0
    for out in outs:
        h, y = out.h, out.y
        if h:
            n_h = max(n_h, len(h))
        if pred is None and (y != 0.0 if type(y) is float else _not_zero(y)):
            raise ValueError("pred: expected (a, b) where an output uses y, got None")
        h0, h1, h2 = (*h, 0.0, 0.0, 0.0)[:MAX_H]
        cells += (out.y, out.x, out.m, h0, h1, h2, out.z)
    if n_h > MAX_H:
        raise ValueError(f"h: expected at most {MAX_H} coefficients in an output, got {n_h}")
    values: list[Any] = []
    where: list[int] = []
    scales: list[float] = []
    for cell, value in enumerate(cells):
        if type(value) is float:
            continue
        scale = 1.0
        while type(value) is Scaled:
            value, scale = value.value, scale * value.scale
        if _by_tensor(value):
            values.append(value)
            where.append(cell)
            scales.append(scale)
            cells[cell] = 0.0
        else:
            cells[cell] = scale * float(value)
    firsts = range(FIRST_OUT, len(cells), OUT_CELLS)
    if pred is None and clip is not None:
        raise ValueError("pred: expected (a, b) in a row that clamps, got None")
    if use_pred is None:
        use_pred = pred is not None and any(cells[f + Y] != 0.0 or f + Y in where for f in firsts)
        if use_pred and clip is None and _fold(cells, where, firsts):
            use_pred = False
    draws = any(cells[FIRST_OUT + Z :: OUT_CELLS]) or any(f + Z in where for f in firsts if where)
    return Packed(cells, values, where, scales, FORMULA_NONE, use_pred, len(outs), draws, None, None, n_h)


def _not_zero(value: Coef) -> bool:
    return isinstance(value, Scaled) or _by_tensor(value) or float(value) != 0.0


def _by_tensor(value: Coef) -> bool:
    return hasattr(value, "dtype") and value.ndim > 0


def _fold(cells: list[float], where: list[int], firsts: Sequence[int]) -> bool:
    """Put an unclamped prediction into x and m: c1 + c0 a, c2 + c0 b. Not where a tensor is among these, nor where
    an output is the prediction itself."""
    if A in where or B in where:
        return False
    for f in firsts:
        if any(f + term in where for term in (Y, X, M)) or (cells[f + Y] and not any(cells[f + X : f + OUT_CELLS])):
            return False
    for f in firsts:
        y = cells[f + Y]
        if y:
            cells[f + X] += y * cells[A]
            cells[f + M] += y * cells[B]
            cells[f + Y] = 0.0
    cells[A] = cells[B] = 0.0
    return True


def _pack_ddim(row: DDIMRow, use_pred: bool | None = None) -> Packed:
    n_out = 2 if row.return_pred else 1
    if use_pred is None:
        use_pred = row.return_pred or row.clip is not None
    cells = [0.0] * CELLS_WITH_FORMULA
    cells[LO], cells[HI] = (-math.inf, math.inf) if row.clip is None else row.clip
    cells[W] = 1.0
    if row.return_pred:
        cells[out_cell(1, Y)] = 1.0
    values: list[Any] = []
    where: list[int] = []
    if row.guidance is not None:
        if _by_tensor(row.guidance):
            values.append(row.guidance)
            where.append(W)
        else:
            cells[W] = float(row.guidance)
    on_host = True
    for cell, value in (
        (ALPHA_T, row.alpha_t),
        (SIGMA_T, row.sigma_t),
        (ALPHA_S, row.alpha_s),
        (SIGMA_S, row.sigma_s),
        (ETA, row.eta),
    ):
        if _by_tensor(value):
            on_host = False
            values.append(value)
            where.append(cell)
        else:
            cells[cell] = float(value)
    formula = FORMULA_DDIM[row.prediction]
    if not on_host:
        draws = ETA in where or cells[ETA] != 0.0
        return Packed(cells, values, where, [1.0] * len(values), formula, use_pred, n_out, draws)
    numbers = ddim_numbers(formula, *cells[ALPHA_T:CELLS_WITH_FORMULA], use_pred=use_pred)
    del cells[n_cells(n_out) :]
    cells[A], cells[B], cells[FIRST_OUT + Y], cells[FIRST_OUT + X], cells[FIRST_OUT + M], cells[FIRST_OUT + Z] = numbers
    draws = numbers[-1] != 0.0
    return Packed(cells, values, where, [1.0] * len(values), FORMULA_NONE, use_pred, n_out, draws)


def ddim_numbers(
    formula: int, alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float, eta: float, *, use_pred: bool
) -> tuple[float, float, float, float, float, float]:
    """a, b and output 0's y, x, m, z of eq. (13.13), operation by operation as csrc/kernels/rows.h has it.

    Raises:
        ValueError: a division by zero, or an eta for which sigma_s^2 < d^2 beyond rounding.
    """
    d = 0.0
    if eta != 0.0:
        if sigma_t == 0.0 or alpha_s == 0.0:
            raise ValueError(f"eta: expected 0 where sigma_t or alpha_s is 0, got {eta}")
        ratio = alpha_t / alpha_s
        kept = 1.0 - ratio * ratio
        if kept < -ROUNDING:
            raise ValueError(f"eta: expected 0 where alpha_t > alpha_s (a step toward the noise), got {eta}")
        d = eta * (sigma_s / sigma_t) * math.sqrt(max(kept, 0.0))
    rest = sigma_s * sigma_s - d * d
    if rest < -ROUNDING * sigma_s * sigma_s:
        raise ValueError(
            f"eta: expected at most {eta * sigma_s / d:.6g} here, so that sigma_s^2 - d^2 >= 0 with "
            f"d = eta (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2), got {eta}"
        )
    e = math.sqrt(max(rest, 0.0))
    if formula == FORMULA_DDIM["epsilon"]:
        if alpha_t == 0.0:
            raise ValueError("alpha_t: expected > 0 with prediction='epsilon', got 0.0")
        a, b, ex, em = 1.0 / alpha_t, -sigma_t / alpha_t, 0.0, 1.0
    elif formula == FORMULA_DDIM["v"]:
        a, b, ex, em = alpha_t, -sigma_t, sigma_t, alpha_t
    else:
        if sigma_t == 0.0:
            raise ValueError("sigma_t: expected > 0 with prediction='sample', got 0.0")
        a, b, ex, em = 0.0, 1.0, 1.0 / sigma_t, -alpha_t / sigma_t
    if use_pred:
        return a, b, alpha_s, e * ex, e * em, d
    return a, b, 0.0, e * ex + alpha_s * a, e * em + alpha_s * b, d
