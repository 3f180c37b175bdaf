"""What is kept beside a model for as long as it lives, without keeping it alive; in every thread its own.

A model that is made anew for every call is the same model where it does the same: a bound method of the same object, a
function of the same code over the same objects, such as a lambda around a module. It is kept beside that object.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from .conditions import PLAIN

T = TypeVar("T")


def beside(model: Any, make: Callable[[], T]) -> T:
    """What is kept beside a model, made when first asked for.

    Raises:
        TypeError: the model cannot be referenced weakly, or has no hash.
    """
    owner, name = _owner(model)
    try:
        kept = vars(_kept).setdefault("beside", weakref.WeakKeyDictionary()).setdefault(owner, {})
    except TypeError:
        raise TypeError(
            f"cuda_graph: expected a model that has a hash and can be referenced weakly, got {type(owner).__name__}; "
            "a genkern.Loop takes any"
        ) from None
    if name not in kept:
        kept[name] = make()
    found: T = kept[name]
    return found


_kept = threading.local()


class _Weak:
    """A key that is equal to another of the same living object."""

    def __init__(self, value: Any) -> None:
        self._hash, self._ref = id(value), weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        value = self._ref()
        return isinstance(other, _Weak) and value is not None and value is other._ref()

    def __hash__(self) -> int:
        return self._hash


def _owner(model: Any) -> tuple[Any, Hashable]:
    """The object that lives as long as the model is of use, and which of its models this is."""
    if isinstance(model, types.MethodType):
        return model.__self__, model.__func__
    if isinstance(model, types.FunctionType):
        try:
            held = [cell.cell_contents for cell in model.__closure__ or ()]
            held += [*(model.__defaults__ or ()), *(model.__kwdefaults__ or {}).values()]
            module = next((value for value in held if isinstance(value, torch.nn.Module)), None)
            if module is not None:
                return module, (model.__code__, *[_key(value) for value in held])
        except (TypeError, ValueError):  # what has no weak reference, a variable that is not assigned yet
            pass
    return model, None


def _key(value: Any) -> Hashable:
    return (type(value), value) if isinstance(value, PLAIN) else _Weak(value)
