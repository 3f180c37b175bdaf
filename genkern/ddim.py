"""The coefficients of eq. (13.13), of numbers or of tensors:

    y   = a x_t + b m                                              predicted data
    x_s = alpha_s y + sqrt(sigma_s^2 - d^2) epsilon + d z = c_y y + c_x x_t + c_m m + d z

with epsilon the network's own. Of a network that predicts the score, epsilon is -sigma_t times it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import check, rows

PREDICTIONS = ("epsilon", "v", "sample", "score")


class Coefficients(NamedTuple):
    """Each a float64 number or tensor [B] or [1]. Without use_pred, y is folded into x and m."""

    a: Any
    b: Any
    y: Any
    x: Any
    m: Any
    d: Any


def coefficients(prediction: str, path: Sequence[Any], use_pred: bool) -> Coefficients:
    """Of a path's alpha_t, sigma_t, alpha_s, sigma_s and eta.

    Raises:
        ValueError: as check.ddim_path and rows.ddim_numbers.
    """
    alpha_t, sigma_t, alpha_s, sigma_s, eta = path
    of_score = prediction == "score"
    name = "epsilon" if of_score else prediction
    formula = rows.FORMULA_DDIM[name]
    if any(check.is_tensor(value) for value in path):
        from .reference.formula import ddim_cells

        check.ddim_path(name, alpha_t, sigma_t, alpha_s, sigma_s, eta, rows.ROUNDING)
        cells = ddim_cells(formula, path, use_pred)
        first = rows.FIRST_OUT
        found = Coefficients(
            *(cells[cell] for cell in (rows.A, rows.B)),
            *(cells[first + term] for term in (rows.Y, rows.X, rows.M, rows.Z)),
        )
        sigma_t = sigma_t.double() if check.is_tensor(sigma_t) else sigma_t
    else:
        found = Coefficients(*rows.ddim_numbers(formula, alpha_t, sigma_t, alpha_s, sigma_s, eta, use_pred=use_pred))
    if not check.is_tensor(eta) and eta == 0.0:
        found = found._replace(d=0.0)  # a number, so that a row of it draws nothing
    return found._replace(b=-sigma_t * found.b, m=-sigma_t * found.m) if of_score else found
