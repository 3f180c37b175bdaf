"""Calls on torch tensors, without derivatives: the compiled library where it serves the device, else the reference;
and what torch.compile and torch.export need to know of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library, eager, rows
from .reference import formula as reference
from .reference import stat as reference_stat
from .spec import DEVICE_KEY, FIRST_VALUE, SAMPLE_IDS, M, Spec, V, X, Z, invoke, numbers

CODES = {dtype: code for code, dtype in enumerate(reference.DTYPES)}

_OPS = _library.torch_ops()
# The overload itself: a call through the packet resolves it anew each time.
_MAP: Any = None if _OPS is None else _OPS.map.default
_MAP_OUT: Any = None if _OPS is None else _OPS.map_out.default
_REDUCE: Any = None if _OPS is None else _OPS.reduce.default
_STAT: Any = None if _OPS is None else _OPS.stat.default
_QUANTILE: Any = None if _OPS is None else _OPS.stat_quantile.default
# The same with their numbers as text, which is quicker to call, and dark to torch.compile.
_MAP_NUMBERS: Any = None if _OPS is None else _OPS.map_numbers.default
_REDUCE_NUMBERS: Any = None if _OPS is None else _OPS.reduce_numbers.default
_DEVICES = _library.torch_devices()


def has_kernel(device: torch.device) -> bool:
    """Whether the compiled library serves this device."""
    return device.type in _DEVICES


def direct(device: torch.device) -> bool:
    """Whether a call may go to run_numbers: a kernel is there, and nothing traces or transforms the call."""
    return has_kernel(device) and not torch.compiler.is_compiling() and not transformed()


def transformed() -> bool:
    """Whether a torch.func transform or a forward-mode level is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def run_map(spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """map, without derivatives."""
    like = _like(tensors)
    device = spec.device if like is None else like.device
    assert device is not None
    if not has_kernel(device):
        outs = invoke(reference.map, spec, tensors, spec.dtypes, spec.size, device)
        return tuple(outs) if like is None else tuple(_laid_out(out, like) for out in outs)
    if torch.compiler.is_compiling() or _not_plain(tensors[FIRST_VALUE:]):
        return tuple(invoke(_MAP, spec, tensors, spec.dtypes, spec.size, spec.device))
    if like is None:
        assert spec.size is not None
        found = [torch.empty(spec.size, dtype=reference.DTYPES[code], device=device) for code in spec.dtypes]
    else:
        found = [torch.empty_like(like, dtype=reference.DTYPES[code]) for code in spec.dtypes]
    run_numbers(numbers(spec), found, tensors)
    return tuple(found)


def run_map_out(spec: Spec, out: Sequence[Tensor], *tensors: Tensor | None) -> None:
    """map into given outputs, without derivatives."""
    if not has_kernel(out[0].device):
        results = invoke(reference.map, spec, tensors, spec.dtypes, spec.size, spec.device)
        for target, result in zip(out, results, strict=True):
            target.copy_(result)
    elif torch.compiler.is_compiling() or _not_plain(tensors[FIRST_VALUE:]):
        invoke(_MAP_OUT, spec, tensors, list(out))
    else:
        run_numbers(numbers(spec), out, tensors)


def run_ready(ready: bytes | str, out: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> bool:
    """run_numbers past torch's dispatcher, where it can go there.

    Returns:
        False where nothing was written: a tensor is not plain, something watches or transforms the call, or a check
        fails, among them that every output is an input itself or certainly apart from it.
    """
    return eager.face is not None and eager.face.map_numbers(ready, out, tensors) is not None


def run_numbers(text: str, out: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> None:
    """The kernel of map into given outputs, of a spec's numbers as text: of all forms the one that costs least."""
    if run_ready(text, out, tensors):
        return
    values = tensors[FIRST_VALUE:] or None
    if len(out) == 1 and values is None:
        _MAP_NUMBERS(text, out[0], *tensors)
    else:
        _MAP_NUMBERS(text, out[0], *tensors[:FIRST_VALUE], values, *out[1:])


def run_reduce(spec: Spec, mask: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    """reduce, without derivatives."""
    like = _like(tensors)
    assert like is not None
    if not has_kernel(like.device):
        residual, sums = invoke(reference.reduce, spec, tensors, mask, spec.kind)
    elif torch.compiler.is_compiling() or _not_plain(tensors[FIRST_VALUE:]):
        residual, sums = invoke(_REDUCE, spec, tensors, mask, spec.kind)
    else:
        residual, sums = _REDUCE_NUMBERS(numbers(spec), *tensors[:V], tensors[FIRST_VALUE:] or None, mask)
    return residual, sums


def run_stat(spec: Spec, outs: int, atol: float, rtol: float, *tensors: Tensor | None) -> Tensor:
    """stat: float64 [B, sums]. spec.kind: 0 moments, 1 error."""
    like = _like(tensors)
    assert like is not None
    op = _STAT if has_kernel(like.device) else reference_stat.stat
    found: Tensor = invoke(op, spec, tensors, outs, spec.kind, atol, rtol)
    return found


def run_quantile(spec: Spec, q: float, *tensors: Tensor | None) -> Tensor:
    """stat_quantile: [B]."""
    like = _like(tensors)
    assert like is not None
    found: Tensor = invoke(_QUANTILE if has_kernel(like.device) else reference_stat.stat_quantile, spec, tensors, q)
    return found


def draw(
    spec: Spec, device_key: Tensor | None, sample_ids: Tensor | None, shape: Sequence[int], device: torch.device,
    accumulator: torch.dtype,
) -> Tensor:  # fmt: skip
    """The z that a call drew, again."""
    if not has_kernel(device) or _wrapped(device_key) or _wrapped(sample_ids):
        return reference.draw(spec.noise, spec.key, device_key, sample_ids, shape, device, accumulator)
    row = [0.0] * rows.n_cells(1)
    row[rows.W], row[rows.out_cell(0, rows.Z)] = 1.0, 1.0
    alone = Spec(
        tuple(row), 0, (), (), 0, spec.noise, spec.key, False, (CODES[accumulator],), tuple(shape), device
    )  # fmt: skip
    tensors: list[Tensor | None] = [None] * FIRST_VALUE
    tensors[DEVICE_KEY], tensors[SAMPLE_IDS] = device_key, sample_ids
    return run_map(alone, *tensors)[0]


def _like(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The tensor whose shape, strides and device the outputs take."""
    x = tensors[X]
    if x is not None:
        return x
    m = tensors[M]
    return m if m is not None else tensors[Z]


def _not_plain(values: Sequence[Tensor | None]) -> bool:
    """Whether a coefficient is of a subclass of tensors, which torch's dispatcher asks for its way in a Tensor[], but
    not in the Tensor[]? of map_numbers and reduce_numbers."""
    for value in values:  # a loop costs less than any() of a generator
        if type(value) not in (Tensor, torch.nn.Parameter):
            return True
    return False


def _wrapped(tensor: Tensor | None) -> bool:
    """Whether torch.func holds the tensor's memory back from a kernel."""
    return tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _laid_out(out: Tensor, like: Tensor) -> Tensor:
    """out with the strides that torch.empty_like gives, as the kernels' outputs have them."""
    target = torch.empty_like(like, dtype=out.dtype)
    return out if out.stride() == target.stride() else target.copy_(out)


def _fake_map(
    x: Any, m: Any, m_uncond: Any, h: Any, z: Any, row: Any, table: Any, index: Any, values: Any, cells: Any,
    scales: Any, formula: Any, noise: Any, key: Any, device_key: Any, sample_ids: Any, use_pred: Any, out_dtypes: Any,
    size: Any = None, device: Any = None, *elementwise: Any,
) -> list[Tensor]:  # fmt: skip
    like = x if x is not None else m if m is not None else z
    if like is None:
        return [torch.empty(size, dtype=reference.DTYPES[code], device=device) for code in out_dtypes]
    return [torch.empty_like(like, dtype=reference.DTYPES[code]) for code in out_dtypes]


def _fake_map_out(*arguments: Any) -> None:
    return None


def _fake_reduce(
    x: Any, m: Any, m_uncond: Any, h: Any, z: Any, row: Any, table: Any, index: Any, values: Any, cells: Any,
    scales: Any, formula: Any, noise: Any, key: Any, device_key: Any, sample_ids: Any, use_pred: Any, mask: Any,
    kind: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    like = x if x is not None else m if m is not None else z
    residual = torch.empty_like(like, dtype=(m if m is not None else like).dtype)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return residual, torch.empty((like.shape[0], 2), dtype=wide, device=like.device)


def _fake_stat(x: Any, m: Any, m_uncond: Any, h: Any, z: Any, *others: Any) -> Tensor:
    like = x if x is not None else m if m is not None else z
    outs, kind = others[-4:-2]
    width = 1 if kind else outs + outs * (outs + 1) // 2
    return torch.empty((like.shape[0], width), dtype=torch.float64, device=like.device)


def _fake_quantile(x: Any, m: Any, m_uncond: Any, h: Any, z: Any, *others: Any) -> Tensor:
    like = x if x is not None else m if m is not None else z
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.empty(like.shape[0], dtype=wide, device=like.device)


def _fake_map_numbers(*arguments: Any, **named: Any) -> None:
    return None


def _fake_reduce_numbers(text: Any, x: Any = None, m: Any = None, z: Any = None, *others: Any, **named: Any) -> Any:
    return _fake_reduce(x, m, None, (), z, *[None] * 14)


if _OPS is not None:
    for _name, _fake in (
        ("map", _fake_map),
        ("map_out", _fake_map_out),
        ("reduce", _fake_reduce),
        ("stat", _fake_stat),
        ("stat_quantile", _fake_quantile),
        ("map_numbers", _fake_map_numbers),
        ("reduce_numbers", _fake_reduce_numbers),
    ):
        torch.library.register_fake(f"genkern::{_name}")(_fake)
