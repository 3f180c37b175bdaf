"""What pairs on disk are a function of: the parts of each pair, and the settings as a manifest has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import files

Given = Mapping[str, Tensor] | Callable[[Tensor], Mapping[str, Tensor]] | None


def of_count(name: str, value: Any, count: int) -> None:
    """ValueError: a tensor whose dimension 0 is not the number of pairs."""
    if isinstance(value, Tensor) and (not value.ndim or len(value) != count):
        raise ValueError(f"{name}: expected dimension 0 to be the pairs, {count}, got shape {tuple(value.shape)}")


def of_ids(given: Given, ids: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The conditions of some pairs. TypeError: what is no mapping of tensors; ValueError: of another length."""
    found = given(ids) if callable(given) else {name: value[ids] for name, value in (given or {}).items()}
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise TypeError(f"cond: expected tensors by name, got {found!r}")
    for name, value in found.items():
        of_count(f"cond[{name!r}]", value, len(ids))
    return {name: value.to(device) for name, value in found.items()}


def digest(model: Any) -> str:
    if not isinstance(model, nn.Module):
        return "unknown"
    return files.digest({name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)})


def told(value: Any) -> Any:
    """A setting as JSON has it: tensors and Modules by their SHA-256, objects by their class and public attributes (a
    private one may be a cache, of other contents in the next run)."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return files.digest({"": value})
    if isinstance(value, Mapping):
        return {str(key): told(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [told(part) for part in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {digest(value)}"
    public = {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    return {type(value).__name__: told(public)}
