"""Calls on NumPy arrays: genkern._arrays where it is built, else the reference on the same memory, through torch.

bfloat16 arrays are those of ml_dtypes. Outputs are allocated here, with a dense input's strides.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy

from . import _library
from .spec import M, Spec, X, Z, invoke

DTYPES = ("float32", "float16", "bfloat16", "float64")  # by the code that the kernels use
CODES = {name: code for code, name in enumerate(DTYPES)}


def dtype_of(code: int) -> numpy.dtype[Any]:
    """The NumPy dtype of a code; bfloat16 needs ml_dtypes."""
    if DTYPES[code] == "bfloat16":
        return numpy.dtype(importlib.import_module("ml_dtypes").bfloat16)
    return numpy.dtype(DTYPES[code])


def code_of(dtype: Any) -> int:
    """The code of a NumPy dtype."""
    return CODES[numpy.dtype(dtype).name]


def run_map(spec: Spec, out: Sequence[numpy.ndarray] | None, *arrays: Any) -> tuple[numpy.ndarray, ...]:
    """map, into `out` where it is given."""
    outs = _outputs(spec, arrays) if out is None else tuple(out)
    compiled = _library.arrays()
    if compiled is not None:
        invoke(compiled.map, spec, arrays, list(outs))
        return outs
    import torch

    from .reference import formula

    results = invoke(formula.map, spec, [_to_torch(a) for a in arrays], spec.dtypes, spec.size, torch.device("cpu"))
    for target, result in zip(outs, results, strict=True):
        _copy(target, result)
    return outs


def run_reduce(spec: Spec, mask: Any, *arrays: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    """reduce: the residual, and the sums [B, 2]."""
    like = _like(arrays)
    residual = numpy.empty_like(like, dtype=arrays[M].dtype if arrays[M] is not None else like.dtype)
    sums = numpy.empty((like.shape[0], 2), dtype=numpy.float64 if like.dtype.name == "float64" else numpy.float32)
    compiled = _library.arrays()
    if compiled is not None:
        invoke(compiled.reduce, spec, arrays, mask, spec.kind, residual, sums)
        return residual, sums
    from .reference import formula

    results = invoke(formula.reduce, spec, [_to_torch(a) for a in arrays], _to_torch(mask), spec.kind)
    for target, result in zip((residual, sums), results, strict=True):
        _copy(target, result)
    return residual, sums


def run_stat(spec: Spec, outs: int, atol: float, rtol: float, *arrays: Any) -> numpy.ndarray:
    """stat: float64 [B, sums]. spec.kind: 0 moments, 1 error."""
    width = 1 if spec.kind else outs + outs * (outs + 1) // 2
    sums = numpy.empty((_like(arrays).shape[0], width), dtype=numpy.float64)
    compiled = _library.arrays()
    if compiled is not None:
        invoke(compiled.stat, spec, arrays, outs, spec.kind, atol, rtol, sums)
        return sums
    from .reference import stat

    _copy(sums, invoke(stat.stat, spec, [_to_torch(a) for a in arrays], outs, spec.kind, atol, rtol))
    return sums


def run_quantile(spec: Spec, q: float, *arrays: Any) -> numpy.ndarray:
    """stat_quantile: [B]."""
    like = _like(arrays)
    out = numpy.empty(like.shape[0], dtype=numpy.float64 if like.dtype.name == "float64" else numpy.float32)
    compiled = _library.arrays()
    if compiled is not None:
        invoke(compiled.stat_quantile, spec, arrays, q, out)
        return out
    from .reference import stat

    _copy(out, invoke(stat.stat_quantile, spec, [_to_torch(a) for a in arrays], q))
    return out


def _like(arrays: Sequence[Any]) -> Any:
    return next((arrays[slot] for slot in (X, M, Z) if arrays[slot] is not None), None)


def _outputs(spec: Spec, arrays: Sequence[Any]) -> tuple[numpy.ndarray, ...]:
    like = _like(arrays)
    dtypes = [dtype_of(code) for code in spec.dtypes]
    if like is None:
        assert spec.size is not None
        return tuple(numpy.empty(spec.size, dtype) for dtype in dtypes)
    return tuple(numpy.empty_like(like, dtype=dtype, subok=False) for dtype in dtypes)


def _to_torch(array: Any) -> Any:
    import torch

    if array is None:
        return None
    if any(stride < 0 or stride % array.itemsize for stride in array.strides) or not array.flags.writeable:
        array = array.copy()  # torch has no negative strides, and warns of read-only memory
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(numpy.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _copy(target: numpy.ndarray, result: Any) -> None:
    import torch

    if target.dtype.name == "bfloat16":
        target.view(numpy.uint16)[...] = result.contiguous().view(torch.uint16).numpy()
    else:
        target[...] = result.numpy()
