"""The terms of a row whose coefficients differ by element, checked beside the row that has those coefficients.

r_j   = ... + s_j e z,    e = exp(l0 + l1 v)                 v: [B, ...], log_scale = (l0, l1)
out_j = r_j + mask (p_j known + q_j z - r_j)                 known: [B, ...], known = ((p_0, q_0), ...)
"""

from __future__ import annotations

from typing import Any

from . import check, rows


def checked(
    packed: rows.Packed, like: tuple[str, Any] | None, noise: Any, v: Any, known: Any, mask: Any
) -> tuple[Any, Any, Any]:
    """v, known and the mask of a map, the mask expanded to the outputs' shape.

    Args:
        packed: the row.
        like: name and array of the first term that is given; None where none is.
        noise: as fused.apply_row has it.

    Raises:
        ValueError: a term without its coefficients, or the other way round; known without a mask, or the other way
            round; v without noise; a mask outside [0, 1], or one that requires a gradient.
        TypeError: as check.terms and check.mask.
    """
    if like is None:
        raise ValueError("x: expected x, m or a noise tensor beside v or known, got None")
    check.terms((like, ("v", v), ("known", known)))
    if packed.table is None:
        _beside("v", v, packed.scales_noise, "log_scale")
    _beside("known", known, packed.blended != 0, "p and q")
    for name, value, other in (("mask", mask, "known"), ("known", known, "mask")):
        if value is None and (known is not None or mask is not None):
            raise ValueError(f"{name}: expected a tensor beside {other}, got None")
    if v is not None and (packed.draws is False or (packed.draws is None and noise is None)):
        raise ValueError("v: expected noise that it scales, got none")
    if mask is None:
        return v, known, None
    if check.is_tensor(mask) and mask.requires_grad:
        raise ValueError("mask: expected a tensor that requires no gradient, got one that does")
    if "bool" not in str(getattr(mask, "dtype", "")):
        check.inside("mask", mask, 0.0, 1.0)
    return v, known, check.mask(mask, like[1])


def _beside(name: str, value: Any, wanted: bool, coefficients: str) -> None:
    """A term is given where the row has its coefficients, and nowhere else."""
    if wanted and value is None:
        raise ValueError(f"{name}: expected a tensor beside {coefficients}, got None")
    if not wanted and value is not None:
        raise ValueError(f"{name}: expected None without {coefficients}, got a tensor")
