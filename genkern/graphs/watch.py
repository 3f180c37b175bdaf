"""What a capture has taken from a model: addresses of parameters and buffers, modules, training flags.

A captured graph reads a parameter where it was when it was captured. A Watch is made at the capture and asked before
every replay whether the model is still that one; it costs some 0.2 us a parameter and never looks at the device.

Modules are found in the model itself, or in what a function or an object that is not a module refers to: closures,
globals that it names, bound arguments, attributes; of long lists only in the first entries. Other attributes of modules
(numbers, flags) are not watched.
"""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_FEW = 64  # entries of a list or dictionary that are looked at
_DEPTH = 4  # of functions, partials and objects between the model and its modules


class Watch:
    """A model as it was."""

    def __init__(self, model: Any) -> None:
        self._roots = [weakref.ref(root) for root in _roots(model)]
        self._states: list[tuple[dict[str, Any], int, Any]] = []
        self._lengths: list[tuple[Any, int]] = []
        self._children: list[tuple[dict[str, Any], str, Any]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor, int]] = []
        self._loose: list[tuple[Tensor, int]] = []
        for root in _roots(model):
            if isinstance(root, Tensor):
                self._loose.append((root, _address(root)))
                continue
            for module in root.modules():
                self._add(module)

    def _add(self, module: torch.nn.Module) -> None:
        # The dictionary of attributes, not the module, which it would keep alive.
        state = vars(module)
        self._states.append((state, len(state), state.get("training")))  # torch.compile's module has none of its own
        for name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
            self._lengths.append((state[name], len(state[name])))
        for members in (module._parameters, module._buffers):
            self._tensors += [(members, name, t, _address(t)) for name, t in members.items() if t is not None]
        self._children += [(module._modules, name, child) for name, child in module._modules.items()]

    def holds(self, model: Any) -> bool:
        """Whether the model is as it was: the same modules in the same mode, the same tensors at the same addresses."""
        roots = _roots(model)
        if len(roots) != len(self._roots) or any(ref() is not root for ref, root in zip(self._roots, roots)):  # noqa: B905
            return False
        for state, length, training in self._states:
            if len(state) != length or state.get("training") is not training:
                return False
        for members, length in self._lengths:
            if len(members) != length:
                return False
        for members, name, child in self._children:
            if members.get(name) is not child:
                return False
        for members, name, tensor, address in self._tensors:
            if members.get(name) is not tensor or _address(tensor) != address:
                return False
        return all(_address(tensor) == address for tensor, address in self._loose)


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
