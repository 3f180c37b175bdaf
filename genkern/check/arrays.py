"""Arrays: their kind, shape, device, dtype and memory, and that they go together."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ..overlap import apart, dense, overlap, start, strides
from .kinds import FLOATS, compiling, is_array, is_float, is_tensor
from .numbers import MAX_DIMS
from .values import visible


def terms(named: Iterable[tuple[str, Any]]) -> None:
    """The arrays of a row: of one kind, shape and device; floating; none of higher precision than the first given."""
    first: Any = None
    for name, value in named:
        if value is None:
            continue
        if first is None:
            tensor = is_tensor(value)
            if not tensor and not is_array(value):
                raise TypeError(f"{name}: expected a torch tensor or a NumPy array, got {type(value).__name__}")
            first_name, first, kind = name, value, type(value)
            shape, dtype = value.shape, value.dtype
            if not shape:
                raise ValueError(f"{name}: expected dimension 0 to be the batch, got a 0-d tensor")
            if len(shape) > MAX_DIMS:
                raise ValueError(f"{name}: expected at most {MAX_DIMS} dimensions, got {len(shape)}")
            if not is_float(dtype):
                raise TypeError(f"{name}: expected {FLOATS}, got {dtype}")
            if tensor:
                strided(name, value)
            continue
        if type(value) is not kind and (is_tensor(value) is not tensor or not (tensor or is_array(value))):
            wanted = "a torch tensor" if tensor else "a NumPy array"
            raise TypeError(f"{name}: expected {wanted} like {first_name}, got {type(value).__name__}")
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)} like {first_name}, got {tuple(value.shape)}")
        if tensor and value.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} like {first_name}, got {value.device}")
        if tensor:
            strided(name, value)
        if value.dtype == dtype:
            continue
        if not is_float(value.dtype):
            raise TypeError(f"{name}: expected {FLOATS}, got {value.dtype}")
        if value.dtype.itemsize > dtype.itemsize:
            raise TypeError(f"{name}: expected {dtype} like {first_name}, or a lower precision, got {value.dtype}")


def strided(name: str, value: Any) -> None:
    """A tensor that has strides: no sparse one."""
    if value.layout is not sys.modules["torch"].strided:
        raise TypeError(f"{name}: expected a strided tensor, got one of layout {value.layout}")


def outputs(
    named: Sequence[tuple[str, Any]],
    like: Any,
    shape: Sequence[int],
    dtypes: Sequence[Any],
    inputs: Sequence[tuple[str, Any]],
    coefficients: Sequence[tuple[str, Any]],
) -> None:
    """Given outputs: of like's kind, shape and device, of the right dtype; each an input itself or apart from it, and
    apart from the coefficients."""
    for (name, out), dtype in zip(named, dtypes, strict=True):
        if is_tensor(out) is not is_tensor(like) or not (is_tensor(out) or is_array(out)):
            wanted = "a torch tensor" if is_tensor(like) else "a NumPy array"
            raise TypeError(f"{name}: expected {wanted}, got {type(out).__name__}")
        if tuple(out.shape) != tuple(shape):
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(out.shape)}")
        if out.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {out.dtype}")
        if is_tensor(out):
            if out.device != like.device:
                raise ValueError(f"{name}: expected device {like.device}, got {out.device}")
        elif not out.flags.writeable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
    separate(named, inputs, coefficients)


def separate(
    named: Sequence[tuple[str, Any]],
    inputs: Sequence[tuple[str, Any]],
    coefficients: Sequence[tuple[str, Any]] = (),
) -> None:
    """Outputs whose elements have addresses of their own, each an input itself or apart from all inputs, and apart from
    all coefficients and outputs."""
    if compiling() and is_tensor(named[0][1]):
        return
    for k, (name, out) in enumerate(named):
        sizes = () if dense(out) else zip(out.shape, strides(out), strict=True)
        if any(stride == 0 and size > 1 for size, stride in sizes):
            raise ValueError(f"{name}: expected every element at its own address, got an expanded tensor")
        for position, (other, value) in enumerate([*inputs, *coefficients, *named[:k]]):
            if value is None or (value is out and position < len(inputs)) or apart(out, value):
                continue
            same = start(out) == start(value) and strides(out) == strides(value) and out.dtype == value.dtype
            if not overlap(out, value):
                continue
            if position >= len(inputs):
                raise ValueError(f"{name}: expected memory apart from {other}, got an overlap")
            if not same:
                raise ValueError(f"{name}: expected {other} itself or memory apart from it, got a partial overlap")


def mask(value: Any, like: Any) -> Any:
    """A mask, expanded to like's shape: bool or floating, of like's kind and device."""
    if is_tensor(value) is not is_tensor(like) or not (is_tensor(value) or is_array(value)):
        wanted = "a torch tensor" if is_tensor(like) else "a NumPy array"
        raise TypeError(f"mask: expected {wanted}, got {type(value).__name__}")
    if "bool" not in str(value.dtype) and not is_float(value.dtype):
        raise TypeError(f"mask: expected bool, {FLOATS}, got {value.dtype}")
    if is_tensor(value) and value.device != like.device:
        raise ValueError(f"mask: expected device {like.device}, got {value.device}")
    if "bool" not in str(value.dtype):
        if value.dtype.itemsize > 4 and like.dtype.itemsize < 8:
            raise TypeError(f"mask: expected bool, or at most the arithmetic's float32, got {value.dtype}")
        if visible(value) and math.prod(value.shape) and not bool((value >= 0).all()):
            raise ValueError("mask: expected numbers >= 0, got a negative one or NaN")
    sizes = (1,) * (like.ndim - value.ndim) + tuple(value.shape)
    if value.ndim > like.ndim or any(a not in (1, b) for a, b in zip(sizes, like.shape, strict=True)):
        raise ValueError(f"mask: expected a shape that broadcasts to {tuple(like.shape)}, got {tuple(value.shape)}")
    if is_tensor(value):
        return value.expand(like.shape)
    import numpy

    return numpy.broadcast_to(value, like.shape)


def sample_ids(ids: Any, batch: int, numpy: bool, device: Any) -> Any:
    """Sample ids as contiguous int64 [B] beside the other arrays."""
    if hasattr(ids, "dtype"):
        integer = "int" in str(ids.dtype)
    else:
        if not isinstance(ids, Iterable) or isinstance(ids, (str, bytes)):
            raise TypeError(f"sample_ids: expected a sequence of integers, or int64, got {ids!r}")
        ids = tuple(ids)
        integer = all(hasattr(i, "__index__") and not isinstance(i, bool) for i in ids)
        for i in ids:
            if integer and not -(1 << 63) <= i.__index__() < 1 << 63:
                raise ValueError(f"sample_ids: expected integers that int64 can hold, got {i}")
    if not integer:
        raise TypeError(f"sample_ids: expected int64, got {getattr(ids, 'dtype', ids)}")
    if numpy:
        import numpy as np

        found: Any = np.ascontiguousarray(ids, dtype=np.int64)
    else:
        import torch

        found = torch.as_tensor(ids, dtype=torch.int64, device=device).contiguous()
    if tuple(found.shape) != (batch,):
        raise ValueError(f"sample_ids: expected shape ({batch},), one a sample, got {tuple(found.shape)}")
    return found


def table(rows: Any, index: Any, cells: int, like: Any, batch: int) -> None:
    """A RowTable: rows of the right length, in the arithmetic's type, on the right device; an index of 1 or [B]."""
    if rows.ndim != 2 or rows.shape[1] != cells:
        raise ValueError(f"table: expected rows of {cells} cells, got shape {tuple(rows.shape)}")
    wide = like.dtype.itemsize == 8 if hasattr(like, "dtype") else False
    wanted = "float64" if wide else "float32"
    if str(rows.dtype).removeprefix("torch.") != wanted:
        raise TypeError(f"table: expected {wanted}, as the arithmetic of the state has it, got {rows.dtype}")
    for name, array in (("table", rows), ("index", index)):
        if array is not None and is_tensor(like) and (not is_tensor(array) or array.device != like.device):
            raise ValueError(f"{name}: expected a tensor on {like.device}, got {getattr(array, 'device', type(array))}")
    if index is None:
        if rows.shape[0] not in (1, batch):
            raise ValueError(f"table: expected 1 or {batch} rows where no index is given, got {rows.shape[0]}")
    elif "int64" not in str(index.dtype) or tuple(index.shape) not in ((1,), (batch,)):
        raise ValueError(f"index: expected int64 of shape (1,) or ({batch},), got {index.dtype} {tuple(index.shape)}")
    elif not rows.shape[0]:
        raise ValueError("table: expected at least one row")


def elements(shape: Sequence[int]) -> None:
    """At most 2^34 elements a sample, where noise is drawn: its counter has 32 bits, of four elements each."""
    n = 1
    for size in shape[1:]:
        n *= size
    if n > 1 << 34:
        raise ValueError(f"shape: expected at most 2^34 elements a sample where noise is drawn, got {n}")


def key_tensor(name: str, value: Any) -> None:
    """A one-element int64 tensor, as a seed or stream in device memory."""
    import torch

    if value.dtype != torch.int64 or value.numel() != 1:
        raise ValueError(
            f"{name}: expected an integer or a one-element int64 tensor, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )
