"""Eager calls past torch's dispatcher, and the same calls through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genkern import eager, eager_functions

FUNCTIONS = (eager_functions._EagerMap.apply, eager_functions._EagerReduce.apply, eager_functions._EagerLoss.apply)
connected = pytest.mark.skipif(
    eager.face is None, reason="this torch has no exchange API, or the compiled library is missing"
)


def slow(what: Callable[[], Any]) -> Any:
    """Runs something the way that goes through Python and the dispatcher."""
    before, eager.face = eager.face, None
    try:
        return what()
    finally:
        eager.face = before


def taken(what: Callable[[], Any]) -> int:
    """How many calls of it went past the dispatcher."""
    before = eager.face.eager_calls()
    what()
    return int(eager.face.eager_calls() - before)


def pair(shape: tuple[int, ...] = (3, 4), device: Any = "cpu") -> tuple[Tensor, Tensor]:
    return torch.randn(shape, device=device), torch.randn(shape, device=device)
