"""A call of map or reduce, split into what is an array and what is not.

The order of the arrays is x, m, m_uncond, z, table, index, device_key, sample_ids, then h, then the values: flat,
because torch.autograd.Function sees tensors only at the top level of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

X, M, M_UNCOND, Z, TABLE, INDEX, DEVICE_KEY, SAMPLE_IDS, FIRST_H = range(9)


class Spec(NamedTuple):
    """What of a call is no tensor (docs/design.md, "Torch ops"). dtypes: of map's outputs; kind: of reduce's sums."""

    row: tuple[float, ...]
    n_h: int
    cells: tuple[int, ...]
    scales: tuple[float, ...]
    formula: int
    noise: int
    key: tuple[int, ...]
    use_pred: bool
    dtypes: tuple[int, ...]
    size: tuple[int, ...] | None = None
    device: torch.device | None = None
    kind: int = 0

    @property
    def first_value(self) -> int:
        """Where the values start among the tensor arguments."""
        return FIRST_H + self.n_h


def invoke(op: Callable[..., Any], spec: Spec, tensors: Sequence[Any], *rest: Any) -> Any:
    """op on the arguments in the order of its schema."""
    x, m, m_uncond, z, table, index, device_key, sample_ids = tensors[:FIRST_H]
    h, values = list(tensors[FIRST_H : FIRST_H + spec.n_h]), list(tensors[FIRST_H + spec.n_h :])
    return op(
        x, m, m_uncond, h, z, spec.row, table, index, values, spec.cells, spec.scales, spec.formula, spec.noise,
        spec.key, device_key, sample_ids, spec.use_pred, *rest,
    )  # fmt: skip
