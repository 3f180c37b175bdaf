"""Tensor coefficients as the kernels read them, with their gradients kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import rows
from .calls import transformed
from .reference import formula as reference


def ready(value: Tensor) -> Tensor:
    """A tensor of coefficients, contiguous, float32 or float64."""
    if value.dtype.itemsize < 4:
        value = value.to(torch.float32)
    return value.contiguous()


def differentiable_formula(packed: rows.Packed) -> tuple[list[float], list[Any], list[int], list[float], int]:
    """(row, values, cells, scales, formula) of a DDIM row given by path values.

    The kernel evaluates the formula, and has no derivative of it. Where one may be asked for, torch computes the cells
    first, and autograd goes through them to the path values.
    """
    compiling = torch.compiler.is_compiling()
    asked = torch.is_grad_enabled() and any(v.requires_grad for v in packed.values)
    if not asked and (compiling or not transformed()):
        return packed.row, packed.values, packed.cells, packed.scales, packed.formula
    path: list[Any] = packed.row[rows.ALPHA_T : rows.CELLS_WITH_FORMULA]
    cells: dict[int, Tensor] = {}
    for value, cell in zip(packed.values, packed.cells, strict=True):
        if cell >= rows.ALPHA_T:
            path[cell - rows.ALPHA_T] = value
        else:
            cells[cell] = value
    cells.update(reference.ddim_cells(packed.formula, path, packed.use_pred))
    row = packed.row[: rows.n_cells(packed.n_out)]
    return row, list(cells.values()), list(cells), [1.0] * len(cells), rows.FORMULA_NONE
