"""Derivatives of map and reduce, in forward and reverse mode, in plain torch operations on the same row.

With the row of rows.py, G_j the gradient of out_j and k = 1 where lo < a x + b m < hi, at the bounds what the installed
torch's clamp has (1 up to torch 2.13, 0 in 2.15):

    g_y = k sum_j c0j G_j,   g_m = sum_j c2j G_j + b g_y,   g_x = sum_j c1j G_j + a g_y,   g_hk = sum_j c3jk G_j,
    g_mc = w g_m,   g_mu = (1 - w) g_m,   g_z = sum_j s_j G_j;

a coefficient's gradient is the sum over its samples of its term times G_j. Where out_j is blended with k_j by a mask,
(1 - mask) G_j takes the place of G_j in all of these, and with e = exp(l0 + l1 v), g_e = z sum_j s_j G_j,

    g_known = sum_j mask p_j G_j,   g_z = e sum_j s_j G_j + sum_j mask q_j G_j,   g_v = l1 e g_e;

the mask has no gradient. Without a prediction this is a row too, of
G_0, G_1, G_2 with the transposed coefficients, so a map's backward is a map, and can be differentiated again. reduce
keeps its unscaled residual r, in m's dtype: with f[b] the factor that the loss puts on sample b (2 g[b] for squares),
the gradient of a term is c f[b] r. f comes in last, in the arithmetic's type, so float16 gradients do not underflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import calls, rows
from .calls import CODES
from .reference import formula as reference
from .spec import FIRST_H, FIRST_VALUE, KNOWN, M_UNCOND, MASK, TABLE, M, Spec, V, X, Z


def _clamp_at_bound() -> float:
    """The derivative that torch.clamp has at its bounds: versions of torch differ."""
    u = torch.zeros(1, requires_grad=True)
    torch.clamp(u, 0.0, 1.0).sum().backward()
    assert u.grad is not None
    return float(u.grad)


# In a thread of its own: a torch.func transform or no_grad around the first import is this thread's affair.
with ThreadPoolExecutor(1) as _pool:
    _CLAMP_AT_BOUND = _pool.submit(_clamp_at_bound).result()


class Terms:
    """The tensors of a call in the arithmetic's type, and its cells: what both modes of derivatives are made of."""

    def __init__(self, spec: Spec, tensors: Sequence[Tensor | None]) -> None:
        x, m, z, m_uncond, *h, table, index, device_key, sample_ids, v, known, mask = tensors[:FIRST_VALUE]
        self.h: list[Any] = list(h[: spec.n_h])
        self.values: list[Any] = list(tensors[FIRST_VALUE:])
        like = x if x is not None else m if m is not None else z
        assert like is not None  # noise alone has no derivative
        shape, device = like.shape, like.device
        self.accumulator = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.spec, self.x, self.m, self.m_uncond, self.table, self.index = spec, x, m, m_uncond, table, index
        if spec.noise:
            z = calls.draw(spec, device_key, sample_ids, shape, device, self.accumulator)
        self.z = None if z is None else self.wide(z)
        self.cells = reference.Cells(
            spec.row, table, index, self.values, spec.cells, spec.scales, spec.formula, spec.use_pred, len(shape),
            self.accumulator,
        )  # fmt: skip
        self.v, self.known = (None if t is None else self.wide(t) for t in (v, known))
        self.mask = None if mask is None else self.wide(mask)
        self.scale: Tensor | None = None  # e
        if self.v is not None and self.z is not None:
            self.scale = reference.noise_scale(self.v, self.cells)
            z = self.scale * self.z
        found, self.unclamped = reference.terms(x, m, m_uncond, self.h, z, self.cells, spec.use_pred, self.accumulator)
        self.by_term = dict(found)  # that of Z is e z

    def wide(self, t: Tensor) -> Tensor:
        return t.to(self.accumulator)

    def inside(self, t: Tensor) -> Tensor:
        """t where the clamp passes the prediction, else 0."""
        assert self.unclamped is not None
        if not self.cells.clamps():
            return t
        u, lo, hi = self.unclamped, self.cells[rows.LO], self.cells[rows.HI]
        return torch.where((u > lo) & (u < hi), t, torch.where((u == lo) | (u == hi), _CLAMP_AT_BOUND * t, 0.0))

    def blends(self, output: int) -> bool:
        return self.spec.blended >> output & 1 != 0

    def guidance(self) -> Tensor:
        assert self.m is not None and self.m_uncond is not None
        return self.wide(self.m) - self.wide(self.m_uncond)


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def pulled_back(
    spec: Spec, tensors: Sequence[Tensor | None], grads: Sequence[Tensor | None], needed: Sequence[bool],
    masked: bool = False,
) -> list[Tensor | None]:  # fmt: skip
    """The vector-Jacobian product: gradients of `tensors` (those needed) from gradients of the outputs.

    masked: where a gradient is 0, its term may be NaN, and adds nothing to a coefficient's gradient.
    """
    of = Terms(spec, tensors)
    cells, terms = of.cells, of.by_term
    g_outs, g_known = [], {}
    for j, g in ((j, of.wide(g)) for j, g in enumerate(grads) if g is not None):
        if of.blends(j):
            assert of.mask is not None
            g_known[j], g = of.mask * g, (1.0 - of.mask) * g
        g_outs.append((j, g))
    masked = masked or bool(spec.blended)
    g_term: dict[int, Tensor | None] = {
        term: _sum(cells.out(j, term) * g for j, g in g_outs) for term in terms if g_outs
    }
    g_pred = g_term.get(rows.Y)
    if g_pred is not None:
        g_pred = of.inside(g_pred)
        for cell, term in ((rows.A, rows.X), (rows.B, rows.M)):
            if term in terms:
                g_term[term] = _plus(g_term[term], cells[cell] * g_pred)

    def product(g: Tensor, term: Tensor) -> Tensor:
        return torch.where(g == 0, 0.0, g * term) if masked else g * term

    def of_cell(cell: int) -> Tensor | None:
        """Elementwise gradient of a cell, to be summed over what shares it."""
        if cell in (rows.A, rows.B):
            term = terms.get(rows.X if cell == rows.A else rows.M)
            return None if g_pred is None or term is None else product(g_pred, term)
        if cell == rows.W:
            g_m = g_term.get(rows.M)
            return None if of.m_uncond is None or g_m is None else product(g_m, of.guidance())
        if cell in (rows.L0, rows.L1):
            if g_log is None or of.v is None:
                return None
            return g_log if cell == rows.L0 else product(g_log, of.v)
        if cell >= rows.FIRST_KNOWN:
            j, which = divmod(cell - rows.FIRST_KNOWN, 2)
            term = of.known if which == rows.P else of.z
            return None if term is None or j not in g_known else product(g_known[j], term)
        j, term_index = divmod(cell - rows.FIRST_OUT, rows.OUT_CELLS)
        term, g = terms.get(term_index), dict(g_outs).get(j)
        return None if cell < rows.FIRST_OUT or term is None or g is None else product(g, term)

    g_z = g_term.get(rows.Z)
    g_log = None  # of l0 + l1 v
    if of.scale is not None and g_z is not None:
        g_log, g_z = product(g_z, terms[rows.Z]), product(g_z, of.scale)
    if g_known and of.z is not None:
        of_known = _sum(cells.known(j, rows.Q) * g for j, g in g_known.items())
        g_z = of_known if g_z is None or of_known is None else g_z + of_known

    g_m = g_term.get(rows.M)
    guided = of.m_uncond is not None
    found: list[Tensor | None] = [None] * len(tensors)
    found[X] = g_term.get(rows.X)
    found[M] = g_m if not guided or g_m is None else cells[rows.W] * g_m
    found[M_UNCOND] = (1.0 - cells[rows.W]) * g_m if guided and g_m is not None else None
    found[Z] = g_z
    found[V] = None if g_log is None else cells[rows.L1] * g_log
    found[KNOWN] = _sum(cells.known(j, rows.P) * g for j, g in g_known.items())
    for k in range(spec.n_h):
        found[FIRST_H + k] = g_term.get(rows.H0 + k)
    if needed[TABLE] and of.table is not None:
        found[TABLE] = _table_gradient(of.table, of.index, of_cell)
    for k, (cell, scale) in enumerate(zip(spec.cells, spec.scales, strict=True)):
        slot = FIRST_VALUE + k
        value = tensors[slot]
        if needed[slot] and value is not None:
            g_cell = of_cell(cell)
            found[slot] = torch.zeros_like(value) if g_cell is None else scale * _over_samples(g_cell, value.shape[0])
    return [
        g.to(t.dtype) if g is not None and t is not None and need else None
        for g, t, need in zip(found, tensors, needed, strict=True)
    ]


def pushed_forward(
    spec: Spec, tensors: Sequence[Tensor | None], tangents: Sequence[Tensor | None], n_out: int
) -> list[Tensor]:
    """The Jacobian-vector product, in the arithmetic's type: tangents of the outputs from those of `tensors`."""
    of = Terms(spec, tensors)
    cells, terms = of.cells, of.by_term
    if tangents[MASK] is not None:
        raise RuntimeError("mask: expected a tensor without a tangent, the mask of a row has no derivative")
    d_x, d_mc, d_z, d_mu, d_table = (None if t is None else of.wide(t) for t in (*tangents[:FIRST_H], tangents[TABLE]))
    if d_table is not None and of.index is not None:
        d_table = d_table.index_select(0, of.index)
    shape = (-1, *[1] * (next(iter(terms.values())).ndim - 1))

    def d_cell(cell: int) -> Tensor | None:
        total = None if d_table is None else d_table[:, cell].reshape(shape)
        for k, (where, scale) in enumerate(zip(spec.cells, spec.scales, strict=True)):
            tangent = tangents[FIRST_VALUE + k]
            if where == cell and tangent is not None:
                total = _plus(total, scale * of.wide(tangent).reshape(shape))
        return total

    d_v, d_known = (None if t is None else of.wide(t) for t in (tangents[V], tangents[KNOWN]))
    d_ez = _scaled_noise_tangent(of, d_cell, d_z, d_v)
    d_term: dict[int, Tensor | None] = {rows.X: d_x, rows.M: d_mc, rows.Z: d_ez}
    if of.m_uncond is not None:
        w, d_w = cells[rows.W], d_cell(rows.W)
        parts = [None if d_mc is None else w * d_mc, None if d_mu is None else (1.0 - w) * d_mu]
        parts.append(None if d_w is None else d_w * of.guidance())
        d_term[rows.M] = _sum(part for part in parts if part is not None)
    for k in range(spec.n_h):
        tangent = tangents[FIRST_H + k]
        d_term[rows.H0 + k] = None if tangent is None else of.wide(tangent)
    if rows.Y in terms:
        d_pred = None
        for cell, term in ((rows.A, rows.X), (rows.B, rows.M)):
            d_pred = _product_rule(d_pred, cells[cell], d_cell(cell), terms.get(term), d_term[term])
        d_term[rows.Y] = None if d_pred is None else of.inside(d_pred)
    outs = []
    for j in range(n_out):
        total = None
        for term, t in terms.items():
            cell = rows.out_cell(j, term)
            total = _product_rule(total, cells[cell], d_cell(cell), t, d_term.get(term))
        some = next(iter(terms.values()))
        d_r = torch.zeros_like(some) if total is None else total.expand(some.shape)
        if of.blends(j):
            assert of.mask is not None
            d_k = None
            for which, of_known, d_t in ((rows.P, of.known, d_known), (rows.Q, of.z, d_z)):
                d_cell_of = d_cell(rows.known_cell(j, which))
                d_k = _product_rule(d_k, cells.known(j, which), d_cell_of, of_known, d_t)
            d_r = reference.blend(d_r, torch.zeros_like(some) if d_k is None else d_k, of.mask)
        outs.append(d_r)
    return outs


def _scaled_noise_tangent(
    of: Terms, d_cell: Callable[[int], Tensor | None], d_z: Tensor | None, d_v: Tensor | None
) -> Tensor | None:
    """The tangent of e z."""
    if of.scale is None:
        return d_z
    d_log = _product_rule(d_cell(rows.L0), of.cells[rows.L1], d_cell(rows.L1), of.v, d_v)
    return _product_rule(None, of.scale, None if d_log is None else of.scale * d_log, of.z, d_z)


def _product_rule(
    total: Tensor | None, c: Any, d_c: Tensor | None, t: Tensor | None, d_t: Tensor | None
) -> Tensor | None:
    if t is not None and d_t is not None:
        total = _plus(total, c * d_t)
    if t is not None and d_c is not None:
        total = _plus(total, d_c * t)
    return total


def _sum(parts: Any) -> Tensor | None:
    total = None
    for part in parts:
        total = _plus(total, part)
    return total


def _over_samples(g: Tensor, length: int) -> Tensor:
    """Sums of a cell's elementwise gradient: one a sample, or one in all."""
    by_sample = reference.by_sample(g)
    return by_sample if length == g.shape[0] else by_sample.sum(0, keepdim=True)


def _table_gradient(table: Tensor, index: Tensor | None, of_cell: Callable[[int], Tensor | None]) -> Tensor:
    columns, lines = [], table.shape[0] if index is None else index.shape[0]
    for cell in range(table.shape[1]):
        g = of_cell(cell)
        columns.append(table.new_zeros(lines) if g is None else _over_samples(g, lines))
    found = torch.stack(columns, dim=1)
    return found if index is None else torch.zeros_like(table).index_add(0, index, found)


def transposed_terms(spec: Spec, given: Sequence[bool], needed: Sequence[bool]) -> list[tuple[int, int]] | None:
    """(argument, term) of the gradients wanted, where maps of the G_j yield them: no prediction, no guidance, no table,
    and no gradient of a coefficient. Else None."""
    plain = not (spec.use_pred or spec.formula or any(given[slot] for slot in (M_UNCOND, TABLE, V, KNOWN)))
    if not plain or any(needed[FIRST_VALUE:]):
        return None
    slots = [(X, rows.X), (M, rows.M), (Z, rows.Z), *((FIRST_H + k, rows.H0 + k) for k in range(spec.n_h))]
    return [(slot, term) for slot, term in slots if needed[slot]]


def transposed_row(
    spec: Spec, wanted: Sequence[tuple[int, int]], grads: Sequence[Tensor | None], values: Sequence[Tensor],
    factor: Tensor | None = None, scale: float = 1.0,
) -> tuple[rows.Row, list[Tensor]]:  # fmt: skip
    """The row that yields the gradients of the wanted terms, out_k = scale factor sum_j c_jk G_j, in one pass, and its
    terms: the first given G_j as x, the others as h.

    factor: [B], one number a sample, or [1]; multiplied into the coefficients, as scale is.
    """
    given = [(j, g) for j, g in enumerate(grads) if g is not None]
    tensors = dict(zip(spec.cells, zip(values, spec.scales, strict=True), strict=True)) if spec.cells else {}

    def coefficient(j: int, term: int) -> Any:
        cell = rows.out_cell(j, term)
        if cell in tensors:
            value, own = tensors[cell]
            return rows.Scaled(value if factor is None else factor * value, own * scale)
        number = spec.row[cell] * scale
        return number if factor is None or number == 0.0 else rows.Scaled(factor, number)

    first, others = given[0][0], [j for j, _ in given[1:]]
    outs = [
        rows.Out(0.0, coefficient(first, term), 0.0, tuple([coefficient(j, term) for j in others]))
        for _, term in wanted
    ]
    return rows.Row(tuple(outs)), [g for _, g in given]


def laid_out(
    row: rows.Row, terms: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> tuple[Spec, list[Tensor | None]]:  # fmt: skip
    """A call of a row of x and h."""
    packed, (first, *others) = rows.pack(row), terms
    codes = tuple(CODES[dtype] for dtype in dtypes)
    cells, scales = tuple(packed.cells), tuple(packed.scales)
    back = Spec(tuple(packed.row), len(others), cells, scales, 0, 0, (), False, codes)
    tensors: list[Tensor | None] = [None] * FIRST_VALUE
    tensors[X], tensors[FIRST_H : FIRST_H + len(others)] = first, others
    return back, [*tensors, *packed.values]
