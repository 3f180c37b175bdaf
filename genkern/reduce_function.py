"""reduce with derivatives of its sums, once: a torch.autograd.Function that keeps the residual, and turns it into a
gradient where it lies if nothing else needs it.

torch.compile is given the same Function without jvp and vmap, as in map_function.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .asked import needs_function, requires_grad
from .calls import run_reduce, transformed
from .derivatives import Terms, pulled_back, pushed_forward, transposed_terms
from .lanes import drawn_once, over_lanes
from .map_function import by_maps, distinct, dtypes_of, given_of, kept_of
from .reference import formula as reference
from .spec import FIRST_VALUE, Spec, invoke

# Of torch's private interface, so missed where it is not there: then nothing is done in place.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def reduce_rows(spec: Spec, mask: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The residual of a row, and its sums over each sample, these differentiably (once)."""
    if torch.compiler.is_compiling():
        function = _CompiledReduce.apply if requires_grad(tensors) else run_reduce
        return function(spec, mask, *distinct(tensors))
    return Reduce.apply(spec, mask, *tensors) if needs_function(tensors) else run_reduce(spec, mask, *tensors)


def _keep_residual(ctx: Any, inputs: tuple[Any, ...], residual: Tensor, tie: Tensor | None) -> None:
    spec, _, *tensors = inputs
    ctx.mark_non_differentiable(residual)
    ctx.spec, ctx.given, ctx.dtypes = spec, given_of(tensors), dtypes_of(tensors)
    ctx.save_for_backward(residual, tie, *kept_of(spec, tensors))  # the residual has the mask in it
    ctx.set_materialize_grads(False)  # the residual's would be zeros of its size


class _CompiledReduce(torch.autograd.Function):
    @staticmethod
    def forward(spec: Spec, mask: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return run_reduce(spec, mask, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _keep_residual(ctx, inputs, output[0], None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, grad_sums: Tensor | None) -> tuple[Any, ...]:
        residual, _, *tensors = ctx.saved_tensors
        return _reduce_backward(ctx, residual, tensors, _first(grad_sums), 1.0, False)


def _reduce_backward(
    ctx: Any, residual: Tensor, tensors: Sequence[Tensor | None], factor: Tensor | None, scale: float, in_place: bool
) -> tuple[Any, ...]:
    """factor: the gradient of a sample's sum, but for the number scale; [B] or, the same for all, [1]."""
    spec, needed = ctx.spec, ctx.needs_input_grad[2:]
    if factor is None:
        return (None,) * (2 + len(needed))
    scale = scale if spec.kind else 2.0 * scale
    wanted = transposed_terms(spec, ctx.given, needed)
    if wanted is None:
        g = residual.to(factor.dtype) * (scale * factor).reshape(-1, *[1] * (residual.ndim - 1))
        return (None, None, *pulled_back(spec, tensors, [g], needed, masked=True))
    into = residual if in_place else None
    return (None, None, *by_maps(spec, wanted, [residual], tensors[FIRST_VALUE:], ctx.dtypes, factor, scale, into))


def _first(grad_sums: Tensor | None) -> Tensor | None:
    """The gradient of the first sum, [B]; [1] where it is one number, expanded."""
    if grad_sums is None:
        return None
    found = grad_sums[:, 0]
    return found[:1] if found.stride(0) == 0 else found.contiguous()


class _Once(torch.autograd.Function):
    """Gradients of reduce as they are, tied to its sums, and so to its inputs, by a derivative that raises: reduce
    keeps a residual and no input, and without this tie a second derivative would be silently 0."""

    @staticmethod
    def forward(sums: Tensor, grad_sums: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(_ONCE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        raise RuntimeError(_ONCE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], sums: Tensor, grad_sums: Tensor, *found: Tensor) -> tuple[Any, Any]:
        return _Once.apply(sums, grad_sums, *found), in_dims[2:]


_ONCE = "path_loss: expected one derivative, got a second one; its sums are differentiable once"


def reduce_backward_once(
    ctx: Any, residual: Tensor, tensors: Sequence[Tensor | None], result: Tensor, grad: Tensor | None,
    factor: Tensor | None, scale: float = 1.0,
) -> tuple[Any, ...]:  # fmt: skip
    """The gradients, tied where they may be differentiated to the result that grad is the gradient of."""
    again = torch.is_grad_enabled() or transformed()
    in_place = ctx.scratch and not (torch.compiler.is_compiling() or again or _keeps_graph())
    # Without a retained graph this is the residual's last use, and it becomes the gradient where it lies.
    if not again:
        return _reduce_backward(ctx, residual, tensors, factor, scale, in_place)
    with torch.no_grad():
        found = _reduce_backward(ctx, residual, tensors, factor, scale, False)
    slots = [k for k, g in enumerate(found) if g is not None]
    if not slots:
        return found
    tied = dict(zip(slots, _Once.apply(result, grad, *(found[k] for k in slots)), strict=True))
    return tuple(tied.get(k) for k in range(len(found)))


class Reduce(_CompiledReduce):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _keep_residual(ctx, inputs, *output)  # the sums tie a gradient to every input without keeping one (_Once)
        # A hook that packs what is saved may keep it, or give back what others hold.
        ctx.scratch = inputs[0].scratch and not transformed() and saving_hooks(False) is None
        if transformed():
            ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, _: Any, grad_sums: Tensor | None) -> tuple[Any, ...]:
        residual, sums, *tensors = ctx.saved_tensors
        return reduce_backward_once(ctx, residual, tensors, sums, grad_sums, _first(grad_sums))

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Tensor | None) -> tuple[None, Tensor]:
        mask, *tensors = ctx.saved_tensors
        of = Terms(ctx.spec, tensors)
        r = reference.combine(list(of.by_term.items()), of.cells, 0)
        (d_r,) = pushed_forward(ctx.spec, tensors, tangents, 1)
        if mask is not None:
            weight = mask.to(r.dtype)
            r, d_r = torch.where(weight != 0, r, 0.0), torch.where(weight != 0, weight * d_r, 0.0)
        change = r.sign() * d_r if ctx.spec.kind else 2.0 * r * d_r
        change = reference.by_sample(change)[:, None]
        return None, torch.cat([change, torch.zeros_like(change)], dim=1)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], spec: Spec, mask: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Any, Any]:
        spec, tensors = drawn_once(spec, in_dims[2:], tensors)

        def one(mask: Tensor | None, *full: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(invoke(reference.reduce, spec, full, mask, spec.kind))

        return over_lanes(one, in_dims[1:], (mask, *tensors)), (0, 0)
