"""Tables that are made on a device once and kept there."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


def kept(tables: dict[Any, Any], key: Hashable, make: Callable[[], Any]) -> Any:
    """The tensor of a key, made when first asked for. Under a dispatch mode (fake tensors) or a transform of torch.func
    it is made for this call alone: what those make means nothing after them, and they take no tensor of others."""
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    if _get_current_dispatch_mode() is not None:
        return make()
    if key not in tables:
        made = make()
        if type(made) is not torch.Tensor or torch._C._functorch.is_functorch_wrapped_tensor(made):
            return made
        tables[key] = made
    return tables[key]


def constant(method: Callable[..., Any]) -> Any:
    """Marks a method of constants whose result torch.compile may take as a constant of the graph: what
    torch.compiler.assume_constant_result does, without the import of the compiler."""
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method
