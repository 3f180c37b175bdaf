"""Calling a network: model(x, t, **cond), its output unwrapped and checked, its conditions split and doubled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check
from .._debug import debug


class Wrapped:
    """A model in another form, made anew by a method for one run; its captures are kept for the model itself.

    model: the caller's.
    """

    def __init__(self, model: Any) -> None:
        self.model = model


def inner(model: Any) -> Any:
    """The caller's model."""
    return model.model if isinstance(model, Wrapped) else model


def call(model: Any, x: Tensor, t: Tensor, cond: Mapping[str, Any], name: str = "model") -> Tensor:
    """model(x, t, **cond), unwrapped from a tuple or from `.sample`.

    Raises:
        ValueError: the output has another shape or device than x. TypeError: it is no floating tensor.
        FloatingPointError: under gk.debug(values=True), input or output is not finite.
    """
    if debug.values:
        _finite(name, "input", x)
    out = model(x, t, **cond)
    if not isinstance(out, Tensor):
        out = out[0] if isinstance(out, tuple) and out else getattr(out, "sample", out)
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: expected a tensor, a tuple or an object with .sample, got {type(out).__name__}")
    if out.shape != x.shape:
        raise ValueError(f"{name}: expected output of shape {tuple(x.shape)} like its input, got {tuple(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"{name}: expected output on {x.device} like its input, got {out.device}")
    if out.dtype != x.dtype and not check.is_float(out.dtype):
        raise TypeError(f"{name}: expected output of {check.FLOATS}, got {out.dtype}")
    if debug.values:
        _finite(name, "output", out)
    return out


def range_of(model: Any, n: int, dtype: torch.dtype) -> Tensor:
    """v of a network that says a variance beside its prediction (methods/_learned_variance.py): that of the n samples
    of its last call, under guidance of their conditional half.  [n, ...]"""
    v: Tensor = model.v
    return at_most(v[v.shape[0] - n :], dtype)


def _finite(name: str, what: str, x: Tensor) -> None:
    """FloatingPointError: a number of x is not finite. Not asked of what is traced or captured."""
    if check.compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if not bool(x.detach().isfinite().all()):
        raise FloatingPointError(f"{name}: expected finite numbers in its {what}, got NaN or infinite ones")


def at_most(m: Tensor, dtype: torch.dtype) -> Tensor:
    """m, rounded to dtype where it is of a higher precision: no term of a row may exceed the state's."""
    return m if m.dtype == dtype or m.dtype.itemsize <= dtype.itemsize else m.to(dtype)


def dtype_of(model: Any, default: torch.dtype) -> torch.dtype:
    """The dtype of the model's first floating parameter, else the default."""
    if isinstance(model, torch.nn.Module):
        return next((p.dtype for p in model.parameters() if check.is_float(p.dtype)), default)
    return default


def checked_dtype(dtype: Any) -> torch.dtype:
    """A dtype that a network may compute in. TypeError: another."""
    if not isinstance(dtype, torch.dtype) or not check.is_float(dtype):
        raise TypeError(f"model_dtype: expected {check.FLOATS}, got {dtype!r}")
    return dtype


def device_of(model: Any) -> torch.device:
    """The device of the model's first parameter, else torch's default device."""
    if isinstance(model, torch.nn.Module):
        parameter = next(model.parameters(), None)
        if parameter is not None:
            return parameter.device
    return torch.get_default_device()


def checked_device(device: Any) -> torch.device:
    """A device that is here. ValueError: another, or none."""
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:  # torch raises any of them
        raise ValueError(f"device: expected a device that torch has here, got {device!r}") from error


def conditions(name: str, cond: Mapping[str, Any] | None, batch: int) -> dict[str, Any]:
    """cond as a dictionary. A tensor has the batch as its dimension 0, or none; anything else is passed as it is.

    Raises:
        TypeError: not a mapping. ValueError: a tensor whose dimension 0 is not the batch.
    """
    if cond is None:
        return {}
    if not isinstance(cond, Mapping):
        raise TypeError(f"{name}: expected a mapping of keyword arguments of the model, got {type(cond).__name__}")
    for key, value in cond.items():
        if isinstance(value, Mapping):
            conditions(f"{name}[{key!r}]", value, batch)
        elif isinstance(value, Tensor) and value.ndim and value.shape[0] != batch:
            raise ValueError(
                f"{name}[{key!r}]: expected dimension 0 to be the batch, {batch}, got {tuple(value.shape)}"
            )
    return dict(cond)


def of_samples(cond: Mapping[str, Any], low: int, high: int) -> dict[str, Any]:
    """The conditions of samples low .. high-1."""
    found: dict[str, Any] = {}
    for key, value in cond.items():
        if isinstance(value, Mapping):
            found[key] = of_samples(value, low, high)
        else:
            found[key] = value[low:high] if isinstance(value, Tensor) and value.ndim else value
    return found


def stacked(conds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The conditions of as many batches, one after another; each is checked against the first by doubled()."""
    first, *others = conds
    if not others:
        return dict(first)
    found: dict[str, Any] = {}
    for key, value in first.items():
        each = [other[key] for other in others]
        if isinstance(value, Mapping) and all(isinstance(other, Mapping) for other in each):
            found[key] = stacked([value, *each])
        elif isinstance(each[0], Tensor) and each[0].ndim:
            found[key] = torch.cat([value, *each])
        else:
            found[key] = each[0]
    return found


def doubled(uncond: Mapping[str, Any], cond: Mapping[str, Any], name: str = "uncond") -> dict[str, Any]:
    """The conditions of a doubled batch, unconditional first. What is no tensor of the batch is taken from cond.

    Raises:
        ValueError: different keys, or shapes after the batch.
    """
    if uncond.keys() != cond.keys():
        raise ValueError(f"{name}: expected the keys of cond, {sorted(cond)}, got {sorted(uncond)}")
    found: dict[str, Any] = {}
    for key, value in cond.items():
        other = uncond[key]
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found[key] = doubled(other, value, f"{name}[{key!r}]")
        elif isinstance(value, Tensor) and value.ndim:
            if not isinstance(other, Tensor) or other.shape != value.shape:
                got = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
                raise ValueError(f"{name}[{key!r}]: expected shape {tuple(value.shape)} like cond's, got {got}")
            found[key] = torch.cat([other, value])
        else:
            found[key] = value
    return found
