"""map and reduce with derivatives: one torch.autograd.Function each.

The Functions are skipped only where no derivative can be asked for: no torch.func transform and no forward-mode level
is active, and grad mode is off or no tensor argument requires a gradient. torch.compile cannot trace a Function that
has a jvp, so it is given the same Function without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager, rows
from .calls import (
    CODES,
    direct,
    run_map,
    run_map_out,
    run_numbers,
    run_quantile,
    run_ready,
    run_reduce,
    run_stat,
    transformed,
)
from .coefficients import differentiable_formula, ready
from .derivatives import Terms, laid_out, pulled_back, pushed_forward, transposed_row, transposed_terms
from .lanes import drawn_once, over_lanes
from .loss_function import sample_losses
from .reference import formula as reference
from .spec import FIRST_VALUE, KNOWN, M_UNCOND, TABLE, Spec, V, invoke, unpacked

__all__ = [
    "CODES", "differentiable_formula", "differentiated", "direct", "map_rows", "map_rows_out", "ready",
    "reduce_rows", "refuse_derivatives", "refuse_gradient", "run_numbers", "run_quantile", "run_ready", "run_stat",
    "sample_losses",
]  # fmt: skip


def map_rows(spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Apply a row, differentiably. tensors: as calls.py orders them."""
    if torch.compiler.is_compiling():
        return _CompiledMap.apply(spec, *_distinct(tensors)) if _requires_grad(tensors) else run_map(spec, *tensors)
    return _Map.apply(spec, *tensors) if needs_function(tensors) else run_map(spec, *tensors)


def reduce_rows(spec: Spec, mask: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """The residual of a row, and its sums over each sample, these differentiably (once)."""
    if torch.compiler.is_compiling():
        function = _CompiledReduce.apply if _requires_grad(tensors) else run_reduce
        return function(spec, mask, *_distinct(tensors))
    return _Reduce.apply(spec, mask, *tensors) if needs_function(tensors) else run_reduce(spec, mask, *tensors)


def map_rows_out(spec: Spec, out: Sequence[Tensor], *tensors: Tensor | None) -> None:
    """Apply a row into given outputs; these have no derivatives, as elsewhere in PyTorch."""
    refuse_derivatives(out, tensors)
    run_map_out(spec, out, *tensors)
    if not torch.compiler.is_compiling():  # so that autograd notices where it has saved what was written over
        for target in out:
            torch.autograd.graph.increment_version(target)


def refuse_derivatives(out: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> None:
    """RuntimeError where a call into given outputs would have to be differentiated."""
    if _requires_grad(tensors) or (not torch.compiler.is_compiling() and transformed()):
        raise RuntimeError("out: expected None where an argument requires a gradient or torch.func transforms the call")
    if _requires_grad(out):
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
    if _requires_grad(tensors):
        return True
    return transformed() and any(t is not None for t in tensors)


def differentiated(tensors: Sequence[Tensor | None]) -> bool:
    """The same under torch.compile too, which sees no transforms."""
    return _requires_grad(tensors) if torch.compiler.is_compiling() else needs_function(tensors)


def _requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same tensors; one given twice becomes a view the second time, as torch.compile refuses it in a Function."""
    found: list[Tensor | None] = []
    for t in tensors:
        found.append(t.view_as(t) if t is not None and any(t is other for other in found) else t)
    return found


def _given(tensors: Sequence[Any]) -> tuple[bool, ...]:
    return tuple([t is not None for t in tensors])


def _dtypes(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return tuple(None if t is None else t.dtype for t in tensors)


def _kept(spec: Spec, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What backward reads of the arguments: all, or the coefficients alone where the row is linear in them."""
    plain = all(tensors[slot] is None for slot in (M_UNCOND, TABLE, V, KNOWN))
    linear = plain and not (spec.use_pred or spec.formula)
    values = tensors[FIRST_VALUE:]
    if (
        torch.compiler.is_compiling()
        or transformed()
        or not linear
        or any(v is not None and v.requires_grad for v in values)
    ):
        return list(tensors)
    return [*[None] * FIRST_VALUE, *values]


def _by_maps(
    spec: Spec, wanted: Sequence[tuple[int, int]], grads: Sequence[Tensor | None], values: Sequence[Any],
    dtypes: Sequence[Any], factor: Tensor | None, scale: float = 1.0, into: Tensor | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the tensor arguments, the wanted ones by maps of up to three outputs each.

    factor, scale: as in transposed_row.
    into: one of grads, read for the last time: a gradient of its dtype is written over it.
    """
    found: list[Tensor | None] = [None] * len(dtypes)
    for start in range(0, len(wanted), rows.MAX_OUTS):
        part = wanted[start : start + rows.MAX_OUTS]
        row, terms = transposed_row(spec, part, grads, values, factor, scale)
        part_dtypes = [dtypes[slot] for slot, _ in part]
        last = start + rows.MAX_OUTS >= len(wanted)
        reused = next((slot for slot, _ in part if into is not None and last and dtypes[slot] == into.dtype), None)
        if into is None or reused is None:
            results = _map(row, terms, part_dtypes)
        else:
            # A tensor of its own, so that .grad can take it over: autograd holds the residual until this returns.
            results = tuple(
                into.detach() if slot == reused else torch.empty_like(into, dtype=dtypes[slot]) for slot, _ in part
            )
            _map(row, terms, part_dtypes, results)
        for (slot, _), result in zip(part, results, strict=True):
            found[slot] = result
    return found


def _map(
    row: rows.Row, terms: Sequence[Tensor], dtypes: Sequence[torch.dtype], out: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, ...]:
    """A row of x and h, differentiably where no outputs are given."""
    if not torch.compiler.is_compiling() and eager.face is not None:
        first, *others = terms
        quick: tuple[Tensor, ...] | None = eager.face.map_row(
            row, first, None, None, tuple(others), None, out, dtypes, 1
        )
        if quick is not None:
            return quick
    back, arguments = laid_out(row, terms, dtypes)
    if out is None:
        return map_rows(back, *arguments)
    run_map_out(back, out, *arguments)
    return out


# Of torch's private interface, so missed where it is not there: then nothing is done in place.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


class _CompiledMap(torch.autograd.Function):
    @staticmethod
    def forward(spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return run_map(spec, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, *tensors = inputs
        ctx.spec, ctx.given, ctx.dtypes = spec, _given(tensors), _dtypes(tensors)
        ctx.save_for_backward(*_kept(spec, tensors))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        spec, needed, tensors = ctx.spec, ctx.needs_input_grad[1:], ctx.saved_tensors
        wanted = [] if all(g is None for g in grads) else transposed_terms(spec, ctx.given, needed)
        if wanted is None:
            return (None, *pulled_back(spec, tensors, grads, needed))
        return (None, *_by_maps(spec, wanted, grads, tensors[FIRST_VALUE:], ctx.dtypes, None))


class _Map(_CompiledMap):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _CompiledMap.setup_context(ctx, inputs, output)
        if transformed():
            ctx.n_out = len(output)
            ctx.out_dtypes = _dtypes(output)
            ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        found = pushed_forward(ctx.spec, ctx.saved_tensors, tangents, ctx.n_out)
        return tuple(t.to(dtype) for t, dtype in zip(found, ctx.out_dtypes, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], spec: Spec, *tensors: Tensor | None) -> tuple[Any, Any]:
        spec, tensors = drawn_once(spec, in_dims[1:], tensors)

        def one(*full: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(invoke(reference.map, spec, full, spec.dtypes, spec.size, spec.device))

        outs = over_lanes(one, in_dims[1:], tensors)
        return outs, (0,) * len(outs)


def _keep_residual(ctx: Any, inputs: tuple[Any, ...], residual: Tensor, tie: Tensor | None) -> None:
    spec, _, *tensors = inputs
    ctx.mark_non_differentiable(residual)
    ctx.spec, ctx.given, ctx.dtypes = spec, _given(tensors), _dtypes(tensors)
    ctx.save_for_backward(residual, tie, *_kept(spec, tensors))  # the residual has the mask in it
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
    return (None, None, *_by_maps(spec, wanted, [residual], tensors[FIRST_VALUE:], ctx.dtypes, factor, scale, into))


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


def _reduce_backward_once(
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


class _Reduce(_CompiledReduce):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _keep_residual(ctx, inputs, *output)  # the sums tie a gradient to every input without keeping one (_Once)
        # A hook that packs what is saved may keep it, or give back what others hold.
        ctx.scratch = inputs[0].scratch and not transformed() and _saving_hooks(False) is None
        if transformed():
            ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, _: Any, grad_sums: Tensor | None) -> tuple[Any, ...]:
        residual, sums, *tensors = ctx.saved_tensors
        return _reduce_backward_once(ctx, residual, tensors, sums, grad_sums, _first(grad_sums))

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
        return _CompiledMap.backward(ctx, *grads)


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
        ctx.scratch = ctx.call[3] and _saving_hooks(False) is None
        return residual, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _lay_out(ctx)
        return _Reduce.backward(ctx, *grads)


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
        ctx.scratch = _saving_hooks(False) is None
        return residual, loss

    @staticmethod
    def backward(ctx: Any, _: Any, grad: Tensor | None) -> tuple[Any, ...]:
        _lay_out(ctx)
        residual, *tensors = ctx.saved_tensors
        factor = None if grad is None else grad.detach().reshape(1)
        return _reduce_backward_once(ctx, residual, tensors, residual, grad, factor, ctx.call[3])


def _kept_eagerly(kept: int, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """As _kept, which csrc/python/eager.cpp has decided: nothing, the coefficients, all."""
    return (*[None] * FIRST_VALUE, *tensors[FIRST_VALUE:]) if kept == 1 else tensors if kept else ()


def _lay_out(ctx: Any) -> None:
    numbers, n_h, codes, _, ctx.dtypes = ctx.call
    ctx.spec, ctx.given = unpacked(numbers, n_h, codes), _given(ctx.dtypes)


# Past Function.apply, which asks what genkern.eager has asked.
_apply = torch._C._FunctionBase.__dict__["apply"]
eager.connect(*(_apply.__get__(None, function) for function in (_EagerMap, _EagerReduce, _EagerLoss)))
