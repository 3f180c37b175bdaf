"""Conditions of a captured network: static copies of their tensors, which every call fills anew.

Conditions are trees of mappings, lists and tuples. Tensors in them are copied; what else they hold is captured as it
is, so another value is another capture: numbers and words by their value, other objects by their identity.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Same:
    """A key that is equal to itself and to another of the same object; it keeps the object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def signature(tree: Any) -> Hashable:
    """What must be equal for two trees to be served by one capture."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.device
    if isinstance(tree, Mapping):
        return "mapping", *((key, signature(value)) for key, value in tree.items())
    if isinstance(tree, (list, tuple)):
        return type(tree), *map(signature, tree)
    return (type(tree), tree) if isinstance(tree, PLAIN) else Same(tree)


def static(tree: Any) -> Any:
    """The same tree with tensors of its own, not filled yet."""
    return _mapped(tree, lambda t: torch.empty_like(t, requires_grad=False))


def fill(own: Any, given: Any) -> None:
    """Copies the tensors of a tree of the same signature into a static one."""
    for target, source in zip(tensors(own), tensors(given), strict=True):
        target.copy_(source)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree, in its order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors(value)


def _mapped(tree: Any, make: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return make(tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, make) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [_mapped(value, make) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree
