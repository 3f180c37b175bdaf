"""The numbers of a step's row that depend on the data: one a sample, found by a statistic ahead of the step's pass.

    m -> f m                           guidance rescale (guidance.py)
    y -> clamp(y, -s, s) / s           dynamic thresholding (threshold.py), s of the y that f m predicts

Each is a factor of some of the row's cells, so that the step stays one pass: f of b and of m's coefficients, 1 / s of
y's, and s of the bounds -1 and 1. A row from the host takes them as coefficients by sample. A captured step, whose row
is a line of a table in device memory, is given a table made from that line, with a row for every sample. The products
are of float64 either way, so that both have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rows import FIRST_OUT, HI, LO, OUT_CELLS, A, B, M, Out, Row, RowTable, Scaled, W, Y, n_cells
from ..stat import quantile_row
from ..threshold import DynamicThreshold

_COLUMNS = 6
ONE, RESCALE, INVERSE, BOUND, INFINITY, NOTHING = range(_COLUMNS)  # columns of the factors
_PREDICTION = [A, B, LO, HI, W, HI, *[HI] * (OUT_CELLS - 1)]  # cells of a row whose output is y, taken from a step's
_UNBOUNDED = [ONE, RESCALE, INFINITY, INFINITY, ONE, ONE, *[NOTHING] * (OUT_CELLS - 1)]


class BySample:
    """Which cells of a step's row have a factor.

    Args:
        pred: y = a x + b m of the stage, or None.
        guidance: the row's guidance, or None.
        rescales: whether m has a factor.
        threshold: of the stage's prediction, or None.
        cells: the numbers of the row, packed with clip = (-1, 1) where there is a threshold.
        outs: how many outputs it has.
        like: a state, [B, ...].
        table, rows: of a captured step, float64: its row is table[rows]; None: the row is the host's.
    """

    def __init__(
        self, pred: tuple[float, float] | None, guidance: object, rescales: bool, threshold: DynamicThreshold | None,
        cells: Sequence[float], outs: int, like: Tensor, table: Tensor | None = None, rows: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._threshold, self._pred, self._guidance = threshold, pred, guidance
        factor_of = [ONE] * len(cells)
        if rescales:
            for cell in (B, *range(FIRST_OUT + M, n_cells(outs), OUT_CELLS)):
                factor_of[cell] = RESCALE
        if threshold is not None:
            factor_of[LO] = factor_of[HI] = BOUND
            for cell in range(FIRST_OUT + Y, n_cells(outs), OUT_CELLS):
                factor_of[cell] = INVERSE
        found = [(cell, cells[cell], which) for cell, which in enumerate(factor_of) if which != ONE and cells[cell]]
        self.cells = tuple(cell for cell, _, _ in found)
        self.scales = tuple(scale for _, scale, _ in found)
        self._columns = [which for _, _, which in found]
        self._table, self._rows = table, rows
        if table is None:
            return
        n, arithmetic = like.shape[0], torch.float64 if like.dtype == torch.float64 else torch.float32
        # What a replay writes lies where it lay: the factors, [B, columns], and the rows made with them.
        self._factors = torch.ones(n, _COLUMNS, dtype=torch.float64, device=like.device)
        self._factors[:, INFINITY], self._factors[:, NOTHING] = torch.inf, 0.0
        self._row = torch.empty(n, len(cells), dtype=arithmetic, device=like.device)
        self._predicting = torch.empty(n, len(_PREDICTION), dtype=arithmetic, device=like.device)
        self._factor_of, self._prediction, self._unbounded = (
            torch.tensor(which, device=like.device) for which in (factor_of, _PREDICTION, _UNBOUNDED)
        )

    def tensors(self) -> list[Tensor]:
        """What it keeps on the device."""
        if self._table is None:
            return []
        return [self._factors, self._row, self._predicting, self._factor_of, self._prediction, self._unbounded]

    def values(self, x: Tensor, m: Tensor, m_uncond: Tensor | None, rescale: Tensor | None) -> list[Tensor]:
        """The factors of the cells, in their order, float64 [B]: what a row from the host takes."""
        found = {} if rescale is None else {RESCALE: rescale}
        if self._threshold is not None:
            assert self._pred is not None
            a, b = self._pred
            row = Row((Out(y=1.0),), (a, b if rescale is None else Scaled(rescale, b)), guidance=self._guidance)
            quantile = quantile_row(row, self._threshold.ratio, x=x, m=m, m_uncond=m_uncond)
            s = self._threshold.bound(quantile).to(torch.float64)
            found |= {INVERSE: s.reciprocal(), BOUND: s}
        return [found[which] for which in self._columns]

    def rows(self, x: Tensor, m: Tensor, m_uncond: Tensor | None, rescale: Tensor | None) -> Tensor:
        """The row of every sample, [B, cells]: what a captured step takes."""
        assert self._table is not None and self._rows is not None
        line, factors = self._table.index_select(0, self._rows), self._factors
        if rescale is not None:
            factors[:, RESCALE].copy_(rescale)
        if self._threshold is not None:
            cells = line.index_select(1, self._prediction)
            torch.mul(cells, factors.index_select(1, self._unbounded), out=self._predicting)
            row = RowTable(self._predicting, 1, use_pred=True)
            quantile = quantile_row(row, self._threshold.ratio, x=x, m=m, m_uncond=m_uncond)
            s = factors[:, BOUND].copy_(self._threshold.bound(quantile))
            torch.reciprocal(s, out=factors[:, INVERSE])
        return torch.mul(line, factors.index_select(1, self._factor_of), out=self._row)
