"""The same dropout in two calls: of the target and the student, of a forward-mode pass and the call with a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .. import check


@contextlib.contextmanager
def drawn_again(model: Any, device: torch.device) -> Iterator[None]:
    """What the model draws from torch's generators in this context, the next call after it draws again.

    The states of the CPU's generator, and on CUDA of the device's, are put back at the end: they lie on the host, and
    nothing waits. It does nothing for a model that is no module in training mode, under torch.compile, which keeps its
    own state of generators, or while a CUDA graph is captured.
    """
    module = isinstance(model, torch.nn.Module) and model.training
    on_cuda = device.type == "cuda"
    if not module or check.compiling() or (on_cuda and torch.cuda.is_current_stream_capturing()):
        yield
        return
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        yield
