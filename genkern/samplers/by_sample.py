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
        dtype: of the state.
        table, rows: of a captured step, float64: its row is table[rows]; None: the row is the host's.
    """

    def __init__(
        self, pred: tuple[float, float] | None, guidance: object, rescales: bool, threshold: DynamicThreshold | None,
        cells: Sequence[float], outs: int, dtype: torch.dtype, table: Tensor | None = None, rows: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.rescales, self.threshold = rescales, threshold
        self._pred, self._guidance = pred, guidance
        self._arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
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
        if table is not None:
            self._factor_of = torch.tensor(factor_of, device=table.device)
            self._prediction = torch.tensor(_PREDICTION, device=table.device)
            self._unbounded = torch.tensor(_UNBOUNDED, device=table.device)

    def tensors(self) -> list[Tensor]:
        """What it keeps on the device."""
        return [] if self._table is None else [self._factor_of, self._prediction, self._unbounded]

    def factors(self, x: Tensor, m: Tensor, m_uncond: Tensor | None, rescale: Tensor | None) -> dict[int, Tensor]:
        """f, 1 / s and s of every sample, float64 [B], by their columns."""
        found = {} if rescale is None else {RESCALE: rescale}
        if self._table is not None:
            found[ONE] = torch.ones(x.shape[:1], dtype=torch.float64, device=x.device)
        if self.threshold is None:
            return found
        if self._table is None:
            assert self._pred is not None
            a, b = self._pred
            pred = (a, b if rescale is None else Scaled(rescale, b))
            row: Row | RowTable = Row((Out(y=1.0),), pred, guidance=self._guidance)
        else:
            one = found[ONE]
            found |= {INFINITY: torch.full_like(one, torch.inf), NOTHING: torch.zeros_like(one)}
            cells = self._line().index_select(1, self._prediction) * self._by_cell(found, self._unbounded)
            row = RowTable(cells.to(self._arithmetic), 1, use_pred=True)
        quantile = quantile_row(row, self.threshold.ratio, x=x, m=m, m_uncond=m_uncond)
        s = self.threshold.bound(quantile).to(torch.float64)
        return found | {INVERSE: s.reciprocal(), BOUND: s}

    def values(self, factors: dict[int, Tensor]) -> list[Tensor]:
        """Of the cells, in their order: what a row from the host takes."""
        return [factors[which] for which in self._columns]

    def rows(self, factors: dict[int, Tensor]) -> Tensor:
        """The row of every sample, [B, cells]: what a captured step takes."""
        return (self._line() * self._by_cell(factors, self._factor_of)).to(self._arithmetic)

    @staticmethod
    def _by_cell(factors: dict[int, Tensor], which: Tensor) -> Tensor:
        """The factor of every cell, [B, cells]."""
        columns = torch.stack([factors.get(k, factors[ONE]) for k in range(_COLUMNS)], dim=1)
        return columns.index_select(1, which)

    def _line(self) -> Tensor:
        assert self._table is not None and self._rows is not None
        return self._table.index_select(0, self._rows)
