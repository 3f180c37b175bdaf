"""What pairs on disk are a function of: the parts of each pair, and the settings as a manifest has them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..flows.pair_store import Pairs, PairStore

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
    """SHA-256 of a Module's parameters and buffers, those that are not persistent too."""
    if not isinstance(model, nn.Module):
        return "unknown"
    return files.digest({**dict(model.named_parameters()), **dict(model.named_buffers())})


def same_pair(store: PairStore, shard: int, drawn: Pairs) -> None:
    """ValueError: the first pair of a shard, drawn again, is another than the one on the disk.

    What told() does not tell apart shows here: other functions of one name, and what objects keep in private. Integers
    have to be equal, and the root mean square of a difference of floating numbers at most 0.05 of that of the stored
    ones: a solver in bfloat16 on another device rounds by 0.01 or so, so SHA-256 would refuse what is the same.
    """
    stored = store.read(shard)
    there = {"x0": stored.x0, "x1": stored.x1, **{f"cond[{name!r}]": value for name, value in stored.cond.items()}}
    again = {"x0": drawn.x0, "x1": drawn.x1, **{f"cond[{name!r}]": value for name, value in drawn.cond.items()}}
    for name in sorted({*there, *again}):
        a, b = there.get(name), again.get(name)
        if a is None or b is None or a.shape[1:] != b.shape[1:] or a.dtype != b.dtype or not _near(a[:1], b.cpu()):
            raise ValueError(
                f"path: expected a folder of the same settings, {store.path} has another {name} of pair "
                f"{store.ids(shard).start} than these arguments give"
            )


def _near(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double(), b.double()
    return bool(torch.linalg.vector_norm(a - b) <= 0.05 * torch.linalg.vector_norm(a))


def told(value: Any) -> Any:
    """A setting as JSON has it: tensors and Modules by their SHA-256, functions by their module and qualified name,
    functools.partial by its function and arguments, objects by their class and public attributes (a private one may be
    a cache, of other contents in the next run). Two lambdas of a scope, or a method of two objects, are alike here."""
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
    if isinstance(value, functools.partial):
        return {"partial": [told(value.func), told(value.args), told(value.keywords)]}
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {digest(value)}"
    public = {name: part for name, part in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    return {type(value).__name__: told(public)}
