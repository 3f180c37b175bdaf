"""What a capture has taken from a model: addresses of parameters and buffers, modules, training flags.

A captured graph reads a parameter where it was when it was captured. A Watch is made at the capture and asked before
every replay whether the model is still that one; it never looks at the device.

Modules are found in the model itself, or in what a function or an object that is not a module refers to: closures,
globals that it names, bound arguments, attributes; of long lists only in the first entries. Other attributes of modules
(numbers, flags) are not watched.
"""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_FEW = 64  # entries of a list or dictionary that are looked at
_DEPTH = 4  # of functions, partials and objects between the model and its modules


class _Module:
    """A module as it was. Everything is referenced weakly: a module may hold a method of its own, or its parent."""

    def __init__(self, module: torch.nn.Module) -> None:
        state = vars(module)
        self._ref, self._shape = weakref.ref(module), _shape(state)
        self._children = [(name, _weak(child)) for name, child in module._modules.items()]
        self._tensors = [
            (kind, name, weakref.ref(tensor), _address(tensor))
            for kind in ("_parameters", "_buffers")
            for name, tensor in state[kind].items()
            if tensor is not None
        ]
        self._absent = [
            (kind, name)
            for kind in ("_parameters", "_buffers")
            for name, tensor in state[kind].items()
            if tensor is None
        ]

    def holds(self) -> bool:
        module = self._ref()
        if module is None:
            return False
        state = vars(module)
        if _shape(state) != self._shape:
            return False
        if any(state[kind].get(name) is not None for kind, name in self._absent):
            return False
        for name, child in self._children:
            if state["_modules"].get(name) is not child():
                return False
        for kind, name, ref, address in self._tensors:
            tensor = ref()
            if tensor is None or state[kind].get(name) is not tensor or _address(tensor) != address:
                return False
        return True


def _shape(state: dict[str, Any]) -> tuple[Any, ...]:
    """What a module's attributes tell at a glance: its mode (torch.compile's module has none of its own), how many of
    each kind it has, its hooks by their numbers, of which torch uses none twice, and a forward of its own."""
    return (
        state.get("training"), len(state), len(state["_parameters"]), len(state["_buffers"]), len(state["_modules"]),
        tuple(state["_forward_hooks"]), tuple(state["_forward_pre_hooks"]), id(state.get("forward")),
    )  # fmt: skip


class Watch:
    """A model as it was."""

    def __init__(self, model: Any) -> None:
        roots = _roots(model)
        self._roots = [weakref.ref(root) for root in roots]
        self._addresses = [_address(root) for root in roots if isinstance(root, Tensor)]
        modules = [module for root in roots if isinstance(root, torch.nn.Module) for module in root.modules()]
        self._modules = [_Module(module) for module in modules]

    def holds(self, model: Any) -> bool:
        """Whether the model is as it was: the same modules in the same mode, the same tensors at the same addresses."""
        roots = _roots(model)
        if len(roots) != len(self._roots) or any(a() is not b for a, b in zip(self._roots, roots, strict=True)):
            return False
        if [_address(root) for root in roots if isinstance(root, Tensor)] != self._addresses:
            return False
        return all(module.holds() for module in self._modules)


def _weak(child: Any) -> Callable[[], Any]:
    return weakref.ref(child) if child is not None else lambda: None


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return id(tensor)


def _roots(model: Any) -> list[Any]:
    """The modules, and the tensors outside them, that a model refers to."""
    found: list[Any] = []
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if id(value) in seen:
            return
        if isinstance(value, (torch.nn.Module, Tensor)):
            seen.add(id(value))
            found.append(value)
        elif depth:
            seen.add(id(value))
            for part in _parts(value):
                visit(part, depth - 1)

    visit(model, _DEPTH)
    return found


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        inner = vars(value).get("_torchdynamo_orig_callable", vars(value).get("__wrapped__"))
        if inner is not None:  # of torch.compile, of a decorator
            yield inner
            return
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a variable that is not assigned yet
                continue
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        names = value.__globals__
        yield from (names[name] for name in value.__code__.co_names if name in names)
    elif isinstance(value, (list, tuple)):
        yield from value[:_FEW]
    elif isinstance(value, dict):
        yield from itertools.islice(value.values(), _FEW)
    elif not isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)) and hasattr(value, "__dict__"):
        yield from vars(value).values()
