"""sample_losses.formula as one node of autograd's graph, with up to three operations on [B] numbers in its backward
pass. As torch differentiates the formula, operation by operation, it is a dozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .calls import transformed
from .sample_losses import formula


def sample_losses(
    sums: Tensor, c: float | None, masked: bool, weight: Tensor | None, scale: float, reduction: str
) -> Tensor:
    """sample_losses.formula of tensors, differentiably (once, as the sums are)."""
    wants = torch.is_grad_enabled() and sums.requires_grad and not (weight is not None and weight.requires_grad)
    if wants and not torch.compiler.is_compiling() and not transformed():
        found: Tensor = _apply(sums, c, masked, weight, scale, reduction)
        return found
    losses: Tensor = formula(sums, c, masked, weight, scale, reduction)[0]
    return losses


class _SampleLosses(torch.autograd.Function):
    """What of the arguments is no tensor has no gradient, nor has the weight."""

    @staticmethod
    def forward(
        ctx: Any, sums: Tensor, c: float | None, masked: bool, weight: Tensor | None, scale: float, reduction: str
    ) -> Tensor:
        losses, divisor = formula(sums, c, masked, weight, scale, reduction)
        ctx.save_for_backward(weight, divisor)
        ctx.size = sums.shape[0]
        ctx.scale = scale / (ctx.size if reduction == "mean" and ctx.size else 1) / (1 if c is None else 2)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, divisor = ctx.saved_tensors
        if weight is not None:
            grad = grad * weight
        if divisor is not None:
            grad = grad / divisor
        if ctx.scale != 1.0:
            grad = grad * ctx.scale
        # The sum of the mask has no derivative, and reduce reads none: the same numbers stand for it.
        return (grad.reshape(-1, 1).expand(ctx.size, 2), None, None, None, None, None)


# Past Function.apply, which asks what sample_losses has asked.
_apply = torch._C._FunctionBase.__dict__["apply"].__get__(None, _SampleLosses)
