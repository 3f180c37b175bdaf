"""What tests watch for: a host that waits for the device, and what torch's dispatcher is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that launch nothing.
FREE = {"detach", "view", "view_as", "expand", "unbind", "select", "slice", "unsqueeze", "alias", "empty", "empty_like",
        "_unsafe_view", "split", "as_strided", "t", "_reshape_alias", "lift_fresh", "is_same_size",
        "_has_same_storage_numel"}  # fmt: skip


@contextlib.contextmanager
def unsynchronised() -> Iterator[None]:
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Calls(TorchDispatchMode):
    """The names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Names of the operations that launch something, by whether a tensor of the data's shape is among what they read
    and write; and how many such tensors those read and write.

    shape: of the data.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.full: list[str] = []
        self.small: list[str] = []
        self.tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name not in FREE:
            shapes = [t.shape for t in pytree.tree_leaves((args, kwargs, found)) if isinstance(t, torch.Tensor)]
            (self.full if self.shape in shapes else self.small).append(name)
            self.tensors += shapes.count(torch.Size(self.shape))
        return found
