"""Whether derivatives may be asked of a call, and how one that has none refuses them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .calls import transformed


def refuse_derivatives(out: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> None:
    """RuntimeError where a call into given outputs would have to be differentiated."""
    if requires_grad(tensors) or (not torch.compiler.is_compiling() and transformed()):
        raise RuntimeError("out: expected None where an argument requires a gradient or torch.func transforms the call")
    if requires_grad(out):
        raise RuntimeError("out: expected a tensor that requires no gradient, got one that does, under grad mode")


def refuse_gradient(tensors: Sequence[Tensor | None]) -> None:
    """RuntimeError where a call that has no derivatives would have to be differentiated or transformed."""
    if differentiated(tensors):
        raise RuntimeError(
            "row: expected arguments that require no gradient, outside torch.func transforms, as a statistic has no "
            "derivatives; genkern.reference.stat has them"
        )


def needs_function(tensors: Sequence[Tensor | None]) -> bool:
    """Whether derivatives may be asked of a call. To look at one argument alone would lose the others' gradients."""
    if requires_grad(tensors):
        return True
    return transformed() and any(t is not None for t in tensors)


def differentiated(tensors: Sequence[Tensor | None]) -> bool:
    """The same under torch.compile too, which sees no transforms."""
    return requires_grad(tensors) if torch.compiler.is_compiling() else needs_function(tensors)


def requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
