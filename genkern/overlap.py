"""Whether two strided arrays, torch tensors or NumPy arrays, share memory."""

from __future__ import annotations

import math
from typing import Any


def dense(t: Any) -> bool:
    """Whether an array is C-contiguous, its elements one after another."""
    return bool(t.is_contiguous() if hasattr(t, "data_ptr") else t.flags.c_contiguous)


def apart(p: Any, q: Any) -> bool:
    """Whether two arrays are seen to share no memory at a glance: both dense, one ending before the other begins."""
    if not (dense(p) and dense(q)):
        return False
    p0, q0 = start(p), start(q)
    return bool(p0 + p.nbytes <= q0 or q0 + q.nbytes <= p0)


def overlap(p: Any, q: Any) -> bool:
    """Whether two arrays share memory: exactly where their strides are equal, by their extent otherwise."""
    if not math.prod(p.shape) or not math.prod(q.shape):
        return False
    p0, q0 = start(p), start(q)
    if not (p0 and q0):  # fake tensors have no memory
        return False
    low = [a + sum(min((n - 1) * s, 0) for n, s in _dims(t)) for a, t in ((p0, p), (q0, q))]
    high = [a + sum(max((n - 1) * s, 0) for n, s in _dims(t)) + t.dtype.itemsize for a, t in ((p0, p), (q0, q))]
    if high[0] <= low[1] or high[1] <= low[0]:
        return False
    if p.dtype.itemsize != q.dtype.itemsize or strides(p) != strides(q):
        return True
    dims = sorted(((n, abs(s)) for n, s in _dims(p) if n > 1 and s), key=lambda dim: -dim[1])
    return _reachable(q0 - p0, dims, p.dtype.itemsize)


def _reachable(distance: int, dims: list[tuple[int, int]], width: int) -> bool:
    """Whether sum_i d_i stride_i comes within `width` of distance for some |d_i| < size_i, outermost first."""
    if not dims:
        return abs(distance) < width
    (n, stride), rest = dims[0], dims[1:]
    slack = sum((size - 1) * s for size, s in rest) + width
    first = max(-(n - 1), -((slack - distance) // stride))
    last = min(n - 1, (distance + slack) // stride)
    return any(_reachable(distance - d * stride, rest, width) for d in range(first, last + 1))


def _dims(t: Any) -> list[tuple[int, int]]:
    return list(zip(t.shape, strides(t), strict=True))


def strides(t: Any) -> tuple[int, ...]:
    """Strides in bytes."""
    return tuple(s * t.dtype.itemsize for s in t.stride()) if hasattr(t, "data_ptr") else tuple(t.strides)


def start(t: Any) -> int:
    """The address of the first element."""
    return int(t.data_ptr() if hasattr(t, "data_ptr") else t.__array_interface__["data"][0])
