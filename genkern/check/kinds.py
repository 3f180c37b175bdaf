"""What a value is, asked without importing torch or NumPy for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

FLOATS = "float32, float16, bfloat16 or float64"


def is_tensor(value: Any) -> bool:
    """Whether value is a torch tensor, without importing torch for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array(value: Any) -> bool:
    """Whether value is a NumPy array (a NumPy scalar is not), without importing NumPy for it."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def kind_of(named: Sequence[tuple[str, Any]]) -> str | None:
    """ "torch" or "numpy", whichever the given arrays are; None where none is given. TypeError for any other."""
    for name, value in named:
        if value is None:
            continue
        if is_tensor(value):
            return "torch"
        if is_array(value):
            return "numpy"
        raise TypeError(f"{name}: expected a torch tensor or a NumPy array, got {type(value).__name__}")
    return None


def is_float(dtype: Any) -> bool:
    """Whether a torch or NumPy dtype is one of the four that the kernels know."""
    floating = getattr(dtype, "is_floating_point", None)
    if floating is None:
        return (dtype.kind == "f" and dtype.itemsize in (2, 4, 8)) or dtype.name == "bfloat16"
    return bool(floating) and dtype.itemsize in (2, 4, 8)


def is_numpy_dtype(dtype: Any) -> bool:
    """Whether a dtype argument asks for NumPy: a numpy.dtype, a NumPy scalar type, or ml_dtypes' bfloat16."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and (
        isinstance(dtype, numpy.dtype) or (isinstance(dtype, type) and issubclass(dtype, numpy.generic))
    )


def compiling() -> bool:
    """Whether torch.compile or torch.export traces this call."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()
