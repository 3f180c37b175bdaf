"""map with derivatives: a torch.autograd.Function, whose backward is a map again where the row is linear.

torch.compile cannot trace a Function that has a jvp, so it is given the same Function without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager, rows
from .asked import needs_function, refuse_derivatives, requires_grad
from .calls import run_map, run_map_out, transformed
from .derivatives import laid_out, pulled_back, pushed_forward, transposed_row, transposed_terms
from .lanes import drawn_once, over_lanes
from .reference import formula as reference
from .spec import FIRST_VALUE, KNOWN, M_UNCOND, TABLE, Spec, V, invoke


def map_rows(spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Apply a row, differentiably. tensors: as calls.py orders them."""
    if torch.compiler.is_compiling():
        return CompiledMap.apply(spec, *distinct(tensors)) if requires_grad(tensors) else run_map(spec, *tensors)
    return _Map.apply(spec, *tensors) if needs_function(tensors) else run_map(spec, *tensors)


def map_rows_out(spec: Spec, out: Sequence[Tensor], *tensors: Tensor | None) -> None:
    """Apply a row into given outputs; these have no derivatives, as elsewhere in PyTorch."""
    refuse_derivatives(out, tensors)
    run_map_out(spec, out, *tensors)
    if not torch.compiler.is_compiling():  # so that autograd notices where it has saved what was written over
        for target in out:
            torch.autograd.graph.increment_version(target)


def distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same tensors; one given twice becomes a view the second time, as torch.compile refuses it in a Function."""
    found: list[Tensor | None] = []
    for t in tensors:
        found.append(t.view_as(t) if t is not None and any(t is other for other in found) else t)
    return found


def given_of(tensors: Sequence[Any]) -> tuple[bool, ...]:
    return tuple([t is not None for t in tensors])


def dtypes_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    return tuple(None if t is None else t.dtype for t in tensors)


def kept_of(spec: Spec, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
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


def by_maps(
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


class CompiledMap(torch.autograd.Function):
    @staticmethod
    def forward(spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return run_map(spec, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, *tensors = inputs
        ctx.spec, ctx.given, ctx.dtypes = spec, given_of(tensors), dtypes_of(tensors)
        ctx.save_for_backward(*kept_of(spec, tensors))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        spec, needed, tensors = ctx.spec, ctx.needs_input_grad[1:], ctx.saved_tensors
        wanted = [] if all(g is None for g in grads) else transposed_terms(spec, ctx.given, needed)
        if wanted is None:
            return (None, *pulled_back(spec, tensors, grads, needed))
        return (None, *by_maps(spec, wanted, grads, tensors[FIRST_VALUE:], ctx.dtypes, None))


class _Map(CompiledMap):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        CompiledMap.setup_context(ctx, inputs, output)
        if transformed():
            ctx.n_out = len(output)
            ctx.out_dtypes = dtypes_of(output)
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
