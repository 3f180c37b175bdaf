"""A call of map or reduce, split into what is an array and what is not.

The order of the arrays is x, m, z, m_uncond, three h, table, index, device_key, sample_ids, v, known, mask (map's;
reduce takes its mask beside them), then the values: flat, because torch.autograd.Function sees tensors only at the top
level of its arguments. What is not given is None.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

X, M, Z, M_UNCOND, FIRST_H, _, _, TABLE, INDEX, DEVICE_KEY, SAMPLE_IDS, V, KNOWN, MASK, FIRST_VALUE = range(15)


class Spec(NamedTuple):
    """What of a call is no tensor (docs/design.md, "Torch ops"). dtypes: of map's outputs; kind: of reduce's sums;
    scratch: whether reduce's backward may write over the residual, as no one else holds it; blended: bits of map's
    outputs that known is put into."""

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
    scratch: bool = False
    blended: int = 0


def invoke(op: Callable[..., Any], spec: Spec, tensors: Sequence[Any], *rest: Any) -> Any:
    """op on the arguments in the order of its schema, what is elementwise last and only where it is given."""
    x, m, z, m_uncond, h0, h1, h2, table, index, device_key, sample_ids, v, known, mask = tensors[:FIRST_VALUE]
    if v is not None or known is not None:
        rest = (*rest, v, known, mask, spec.blended)
    h, values = [t for t in (h0, h1, h2) if t is not None], list(tensors[FIRST_VALUE:])
    return op(
        x, m, m_uncond, h, z, spec.row, table, index, values, spec.cells, spec.scales, spec.formula, spec.noise,
        spec.key, device_key, sample_ids, spec.use_pred, *rest,
    )  # fmt: skip


def packed(spec: Spec) -> bytes:
    """A spec's numbers as bytes (csrc/faces/numbers.h says in which order)."""
    row, cells = spec.row, spec.cells
    n_row, n_values = len(row), len(cells)
    key = spec.key or _NO_KEY
    return _layout(n_row, n_values).pack(
        spec.formula, spec.noise, spec.use_pred, spec.kind, n_row, n_values, spec.blended, *key, *row, *cells,
        *spec.scales
    )  # fmt: skip


def keyed(ready: bytes, key: tuple[int, ...]) -> bytes:
    """What packed() gives of the same spec with another key: seed, stream and draw; () where it draws nothing."""
    return ready[:_KEY_AT] + _KEY.pack(*(key or _NO_KEY)) + ready[_KEY_AT + _KEY.size :]


def numbers(spec: Spec) -> str:
    """The same as one text of hexadecimal digits, the form in which a torch op takes them soonest."""
    return packed(spec).hex()


def unpacked(numbers: bytes, n_h: int, dtypes: tuple[int, ...]) -> Spec:
    """The spec of a call that was packed in C++."""
    formula, noise, use_pred, kind, n_row, n_values, blended = numbers[:7]
    found = _layout(n_row, n_values).unpack(numbers)[7:]
    key, row, rest = found[:3], found[3 : 3 + n_row], found[3 + n_row :]
    cells, scales = rest[:n_values], rest[n_values:]
    return Spec(row, n_h, cells, scales, formula, noise, key, bool(use_pred), dtypes, kind=kind, blended=blended)


def _layout(n_row: int, n_values: int) -> struct.Struct:
    layout = _LAYOUTS.get((n_row, n_values))
    if layout is None:
        layout = _LAYOUTS[n_row, n_values] = struct.Struct(f"=7Bx3q{n_row}d{n_values}q{n_values}d")
    return layout


_NO_KEY = (0, 0, 0)
_KEY, _KEY_AT = struct.Struct("=3q"), struct.calcsize("=7Bx")
_LAYOUTS: dict[tuple[int, int], struct.Struct] = {}
