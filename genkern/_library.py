"""Loads the compiled halves, each once and only when something asks for it, and remembers why one is missing."""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

from . import _diagnose

TORCH_LIBRARY = pathlib.Path(__file__).parent / "_lib" / "libgenkern_torch.so"

_loaded: dict[str, Any] = {}
_reasons: dict[str, str] = {}


def torch_ops() -> Any:
    """The namespace torch.ops.genkern, or None where the library is missing or does not load."""
    if "torch" not in _loaded:
        _loaded["torch"] = _load_torch()
    return _loaded["torch"]


def arrays() -> Any:
    """The module genkern._arrays (NumPy and DLPack arrays), or None where it is missing or does not load."""
    if "arrays" not in _loaded:
        try:
            _loaded["arrays"] = importlib.import_module("genkern._arrays")
        except ImportError as error:
            _loaded["arrays"] = None
            _reasons["arrays"] = _why_no_arrays(error)
    return _loaded["arrays"]


def torch_devices() -> frozenset[str]:
    """Device types for which the torch library holds kernels: a subset of {"cpu", "cuda"}."""
    ops = torch_ops()
    if ops is None:
        return frozenset()
    return frozenset(("cpu", "cuda") if ops.has_cuda() and "cuda" not in _reasons else ("cpu",))


def why_missing() -> str | None:
    """One sentence on what did not load, or None where both halves are there."""
    torch_ops()
    arrays()
    return "; ".join(_reasons.values()) or None


def _load_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        _reasons["torch"] = f"torch does not import ({error}): pip install torch"
        return None
    old = _diagnose.old_torch(torch.__version__)
    if old is not None:
        _reasons["torch"] = old
        return None
    if not TORCH_LIBRARY.exists():
        _reasons["torch"] = _diagnose.missing(TORCH_LIBRARY.name)
        return None
    try:
        torch.ops.load_library(str(TORCH_LIBRARY))
    except OSError as error:
        _reasons["torch"] = _diagnose.load_error(TORCH_LIBRARY, error, torch.__version__)
        return None
    old = _why_no_driver(torch) if torch.ops.genkern.has_cuda() else None
    if old is not None:
        _reasons["cuda"] = old
    return torch.ops.genkern


def _why_no_driver(torch: Any) -> str | None:
    """A sentence where a GPU is there whose driver is older than the CUDA runtime inside the library."""
    built = _diagnose.build()
    if torch.version.cuda is None or not built or not built["cuda"]:
        return None
    return _diagnose.old_driver(_diagnose.driver_version(), built["cuda"]["nvcc"])


def _why_no_arrays(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) or error.path is None:
        return _diagnose.missing("_arrays")
    return _diagnose.load_error(pathlib.Path(error.path), error)
