"""What ties the results of genkern.eager's calls to autograd: Functions that have nothing left to compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager
from .map_function import CompiledMap, given_of
from .reduce_function import Reduce, reduce_backward_once, saving_hooks
from .spec import FIRST_VALUE, unpacked


class _EagerMap(torch.autograd.Function):
    """What ties a map that genkern.eager has run to autograd. Nothing transforms such a call, so it needs neither
    setup_context, which alone costs as much as five small kernels, nor jvp and vmap."""

    @staticmethod
    def forward(ctx: Any, ready: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.call, kept, outs = ready  # without the outputs, which hold ctx
        if len(outs) > 1:
            ctx.set_materialize_grads(False)
        if kept:
            ctx.save_for_backward(*_kept_eagerly(kept, tensors))
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _lay_out(ctx)
        return CompiledMap.backward(ctx, *grads)


class _EagerReduce(torch.autograd.Function):
    """The same of a reduction."""

    @staticmethod
    def forward(
        ctx: Any, ready: tuple[Any, ...], mask: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.call, kept, (residual, sums) = ready
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(residual)
        ctx.save_for_backward(residual, sums, *_kept_eagerly(kept, tensors))
        ctx.scratch = ctx.call[3] and saving_hooks(False) is None
        return residual, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _lay_out(ctx)
        return Reduce.backward(ctx, *grads)


class _EagerLoss(torch.autograd.Function):
    """The same of a reduction summed over the batch; ctx.call[3] is what is left of the sum's factor, the rest of which
    the residual has (all but in float16), as it has m's coefficient, 1 in the numbers then, where m alone wants a
    gradient. The residual, which no one sees, is what ties a gradient to the inputs
    (_Once): the loss itself may be changed in place."""

    @staticmethod
    def forward(
        ctx: Any, ready: tuple[Any, ...], mask: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.call, kept, (residual, loss) = ready
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(residual, *_kept_eagerly(kept, tensors))
        ctx.scratch = saving_hooks(False) is None
        return residual, loss

    @staticmethod
    def backward(ctx: Any, _: Any, grad: Tensor | None) -> tuple[Any, ...]:
        _lay_out(ctx)
        residual, *tensors = ctx.saved_tensors
        factor = None if grad is None else grad.detach().reshape(1)
        return reduce_backward_once(ctx, residual, tensors, residual, grad, factor, ctx.call[3])


def _kept_eagerly(kept: int, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """As kept_of, which csrc/python/results.h has decided: nothing, the coefficients, all."""
    return (*[None] * FIRST_VALUE, *tensors[FIRST_VALUE:]) if kept == 1 else tensors if kept else ()


def _lay_out(ctx: Any) -> None:
    numbers, n_h, codes, _, ctx.dtypes = ctx.call
    ctx.spec, ctx.given = unpacked(numbers, n_h, codes), given_of(ctx.dtypes)


def connect() -> None:
    """Hands the Functions to the eager calls."""
    # Past Function.apply, which asks what genkern.eager has asked.
    apply = torch._C._FunctionBase.__dict__["apply"]
    eager.connect(*(apply.__get__(None, function) for function in (_EagerMap, _EagerReduce, _EagerLoss)))
