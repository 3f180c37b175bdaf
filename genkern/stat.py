"""Statistics of every sample of a row's outputs: one pass of a kernel that writes none of them.

    moments    S_j = sum out_j,   P_ij = sum out_i out_j, i <= j
    error      sum (out_0 / (atol + rtol max(|out_1|, |out_2|)))^2
    quantile   of |out_0|: v[k] + (q (n - 1) - k) (v[k + 1] - v[k]), v sorted, k = floor(q (n - 1))

Of n elements a sample: mean_j = S_j / n, variance_j = P_jj / n - mean_j^2, norm_j = sqrt(P_jj), dot_ij = P_ij. The
outputs are those of fused.apply_row, in the arithmetic's precision; sums are float64, of products in float64, and
depend on a sample and its strides alone: they have the same bits in every run and in every batch. A quantile is an
exact order statistic, found by counting, of samples of any size. Nothing waits for the device, and a CUDA graph may
capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import check, rows
from .fused import NAMES, AnyRow, _call, _checked, _torch_side
from .noise import Noise
from .spec import Spec

KINDS = ("moments", "error")


def stat_row(
    row: AnyRow, *, x: Any = None, m: Any = None, m_uncond: Any = None, h: Sequence[Any] = (), noise: Any = None,
    kind: str = "moments", atol: float = 0.0, rtol: float = 0.0, names: Sequence[str] = NAMES,
) -> Any:  # fmt: skip
    """Sums over every sample of a row's outputs.

    Args:
        row: a Row, a DDIMRow, or a RowTable, of one to three outputs.
        x, m, m_uncond, h, names: as in fused.apply_row.
        noise: a given tensor; none is drawn.
        kind: "moments", or "error", the squared error norm of an embedded pair of steps (Hairer, Norsett, Wanner 1993,
            section II.4, times n): out_0 the difference of the two, out_1 and out_2 the states that it is measured by;
            those that the row has not count as 0.
        atol, rtol: of "error", >= 0; 0 / 0 is NaN.

    Returns:
        float64, [B, n_out + n_out (n_out + 1) / 2]: S_j, then P_ij in the order of `product`; of "error" [B, 1].

    Raises:
        ValueError, TypeError: as fused.apply_row; noise that is no tensor. RuntimeError: an argument requires a
            gradient, or torch.func transforms the call.
    """
    code = KINDS.index(check.choice("kind", kind, KINDS))
    atol, rtol = check.number("atol", atol, 0.0), check.number("rtol", rtol, 0.0)
    spec, outs, tensors, numpy = _laid_out(row, x, m, m_uncond, h, noise, code, names)
    if numpy:
        from . import arrays

        return arrays.run_stat(spec, outs, atol, rtol, *tensors)
    return _torch_side().run_stat(spec, outs, atol, rtol, *tensors)


def quantile_row(
    row: AnyRow, q: float, *, x: Any = None, m: Any = None, m_uncond: Any = None, h: Sequence[Any] = (),
    noise: Any = None, names: Sequence[str] = NAMES,
) -> Any:  # fmt: skip
    """The quantile of |out_0| in every sample.

    Args:
        row: as in stat_row, of one output.
        q: 0 to 1.
        others: as in stat_row.

    Returns:
        [B], float32 (float64 for float64); NaN of a sample that has a NaN, or no element.

    Raises:
        as stat_row; ValueError: q outside [0, 1], a row with several outputs.
    """
    q = check.number("q", q, 0.0, 1.0)
    spec, outs, tensors, numpy = _laid_out(row, x, m, m_uncond, h, noise, 0, names)
    if outs != 1:
        raise ValueError(f"row: expected one output, got {outs}")
    if numpy:
        from . import arrays

        return arrays.run_quantile(spec, q, *tensors)
    return _torch_side().run_quantile(spec, q, *tensors)


def product(outs: int, i: int, j: int) -> int:
    """The column of P_ij among the moments of `outs` outputs.

    >>> [product(2, 0, 0), product(2, 0, 1), product(2, 1, 1)]
    [2, 3, 4]
    """
    i, j = min(i, j), max(i, j)
    return outs + sum(outs - k for k in range(i)) + j - i


def _laid_out(
    row: AnyRow, x: Any, m: Any, m_uncond: Any, h: Sequence[Any], noise: Any, kind: int, names: Sequence[str]
) -> tuple[Spec, int, list[Any], bool]:
    """A call: its spec, its number of outputs, its arrays, and whether they are NumPy's."""
    packed = rows.pack(row)
    if isinstance(noise, Noise) or (noise is None and packed.draws):
        raise ValueError(f"noise: expected a tensor in a statistic, got {noise}")
    given = _checked(packed, x, m, m_uncond, h, noise, None, None, names)
    spec, tensors = _call(packed, given, noise, False, (), kind)
    if not given.numpy:
        _torch_side().refuse_gradient(tensors)
    return spec, packed.n_out, tensors, given.numpy
