"""Argument checks. A message names the argument, what it was, and what it may be; a failing call changes nothing."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ._debug import debug
from .overlap import apart, dense, overlap, start, strides

MAX_DIMS = 16  # of a tensor, the batch included (csrc/kernels/kernels.h)
FLOATS = "float32, float16, bfloat16 or float64"
FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127


def is_tensor(value: Any) -> bool:
    """Whether value is a torch tensor, without importing torch for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def unsigned(name: str, value: Any, bits: int) -> int:
    """An integer 0 .. 2^bits - 1."""
    try:
        number = value.__index__()
    except (AttributeError, TypeError):
        raise TypeError(f"{name}: expected an integer, got {value!r} ({type(value).__name__})") from None
    if isinstance(value, bool) or not 0 <= number < 1 << bits:
        raise ValueError(f"{name}: expected an integer from 0 to 2^{bits} - 1, got {value}")
    return int(number)


def key_tensor(name: str, value: Any) -> None:
    """A one-element int64 tensor, as a seed or stream in device memory."""
    import torch

    if value.dtype != torch.int64 or value.numel() != 1:
        raise ValueError(
            f"{name}: expected an integer or a one-element int64 tensor, "
            f"got {value.dtype} of shape {tuple(value.shape)}"
        )


def is_array(value: Any) -> bool:
    """Whether value is a NumPy array (a NumPy scalar is not), without importing NumPy for it."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def kind_of(named: Sequence[tuple[str, Any]]) -> str | None:
    """ "torch" or "numpy", whichever the given arrays are; None where none is given. TypeError for any other."""
    for name, value in named:
        if value is None:
            continue
        if is_tensor(value):
            return "torch"
        if is_array(value):
            return "numpy"
        raise TypeError(f"{name}: expected a torch tensor or a NumPy array, got {type(value).__name__}")
    return None


def is_float(dtype: Any) -> bool:
    """Whether a torch or NumPy dtype is one of the four that the kernels know."""
    floating = getattr(dtype, "is_floating_point", None)
    if floating is None:
        return (dtype.kind == "f" and dtype.itemsize in (2, 4, 8)) or dtype.name == "bfloat16"
    return bool(floating) and dtype.itemsize in (2, 4, 8)


def terms(named: Iterable[tuple[str, Any]]) -> None:
    """The arrays of a row: of one kind, shape and device; floating; none of higher precision than the first given."""
    first: Any = None
    for name, value in named:
        if value is None:
            continue
        if first is None:
            tensor = is_tensor(value)
            if not tensor and not is_array(value):
                raise TypeError(f"{name}: expected a torch tensor or a NumPy array, got {type(value).__name__}")
            first_name, first, kind = name, value, type(value)
            shape, dtype = value.shape, value.dtype
            if not shape:
                raise ValueError(f"{name}: expected dimension 0 to be the batch, got a 0-d tensor")
            if len(shape) > MAX_DIMS:
                raise ValueError(f"{name}: expected at most {MAX_DIMS} dimensions, got {len(shape)}")
            if not is_float(dtype):
                raise TypeError(f"{name}: expected {FLOATS}, got {dtype}")
            if tensor:
                strided(name, value)
            continue
        if type(value) is not kind and (is_tensor(value) is not tensor or not (tensor or is_array(value))):
            wanted = "a torch tensor" if tensor else "a NumPy array"
            raise TypeError(f"{name}: expected {wanted} like {first_name}, got {type(value).__name__}")
        if value.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)} like {first_name}, got {tuple(value.shape)}")
        if tensor and value.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} like {first_name}, got {value.device}")
        if tensor:
            strided(name, value)
        if value.dtype == dtype:
            continue
        if not is_float(value.dtype):
            raise TypeError(f"{name}: expected {FLOATS}, got {value.dtype}")
        if value.dtype.itemsize > dtype.itemsize:
            raise TypeError(f"{name}: expected {dtype} like {first_name}, or a lower precision, got {value.dtype}")


def strided(name: str, value: Any) -> None:
    """A tensor that has strides: no sparse one."""
    if value.layout is not sys.modules["torch"].strided:
        raise TypeError(f"{name}: expected a strided tensor, got one of layout {value.layout}")


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite host number in [low, high]."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected {_range(low, high)}, got an integer beyond float64") from None
    if not (low <= found <= high and math.isfinite(found)):
        raise ValueError(f"{name}: expected {_range(low, high)}, got {found}")
    return found


def inside(name: str, value: Any, low: float, high: float) -> Any:
    """A number, an array or a tensor, as it is: finite and in [low, high] (an array where it is looked at)."""
    if not is_tensor(value) and not is_array(value):
        number(name, value, low, high)
        return value
    if not _visible(value) or not math.prod(value.shape):
        return value
    first, last = map(float, value.detach().aminmax() if is_tensor(value) else (value.min(), value.max()))
    if not (low <= first and last <= high and math.isfinite(first) and math.isfinite(last)):
        raise ValueError(f"{name}: expected {_range(low, high)}, got {first:g} to {last:g}")
    return value


def before(name: str, t: Any, s: Any, meaning: str) -> None:
    """t < s, of numbers or tensors [B] or of one element, where the values of both are looked at."""
    if not is_tensor(t) and not is_tensor(s):
        if not t < s:
            raise ValueError(f"{name}: expected t < s, {meaning}, got {float(t):g} and {float(s):g}")
        return
    if any(is_tensor(value) and not _visible(value) for value in (t, s)):
        return
    import torch

    pair = [torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().reshape(-1) for value in (t, s)]
    for index, (a, b) in enumerate(zip(*(value.tolist() for value in torch.broadcast_tensors(*pair)), strict=True)):
        if not a < b:
            raise ValueError(f"{name}: expected t < s, {meaning}, got {a:g} and {b:g} at index {index}")


def whole(name: str, value: Any, low: int, high: int) -> None:
    """A tensor of integers low .. high, of any dtype, where it is looked at."""
    inside(name, value, low, high)
    if is_float(value.dtype) and _visible(value) and bool((value != value.round()).any()):
        raise ValueError(f"{name}: expected integers from {low} to {high}, got numbers between them")


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer of low .. high."""
    try:
        found = int(value.__index__())
    except (AttributeError, TypeError):
        raise TypeError(f"{name}: expected an integer, got {value!r} ({type(value).__name__})") from None
    if isinstance(value, bool) or found < low or (high is not None and found > high):
        wanted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")
    return found


def indices(name: str, value: Any, count: int, batch: int) -> None:
    """An int64 tensor [B] of 0 .. count-1, its values where they are looked at."""
    import torch

    if value.dtype != torch.int64 or value.shape != (batch,):
        raise ValueError(f"{name}: expected int64 of shape ({batch},), got {value.dtype} of shape {tuple(value.shape)}")
    if _visible(value) and bool(((value < 0) | (value >= count)).any()):
        raise ValueError(f"{name}: expected integers from 0 to {count - 1}, got {value.tolist()}")


def coefficient(name: str, value: Any, like: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """A coefficient: a finite number in [low, high], or a floating tensor (array) of shape [B] or of one element.

    Args:
        like: the array whose batch, kind and device it goes with.

    Returns:
        A float, or a tensor (array) of shape [B] or [1] on like's device.
    """
    if type(value) is float:
        if low <= value <= high and (-FLOAT32_MAX <= value <= FLOAT32_MAX or _fits(name, value, like)):
            return value
        raise ValueError(f"{name}: expected {_range(low, high)}, got {value}")
    if is_tensor(value):
        if not is_tensor(like):
            raise TypeError(f"{name}: expected a number or a NumPy array, as the arrays are, got a torch tensor")
        _coefficient_shape(name, value, like)
        if value.device != like.device:
            if value.device.type != "cpu" or value.numel() != 1:
                raise ValueError(
                    f"{name}: expected device {like.device}, or one element on the CPU, got {value.device}"
                )
            _values(name, value, low, high)
            value = value.to(like.device)
        else:
            _values(name, value, low, high)
        return value if value.ndim == 1 else value.reshape(1)
    if is_array(value) and value.ndim:
        if not is_array(like):
            raise TypeError(f"{name}: expected a number or a torch tensor, as the tensors are, got a NumPy array")
        _coefficient_shape(name, value, like)
        _values(name, value, low, high)
        return value if value.ndim == 1 else value.reshape(1)
    found = number(name, value, low, high)
    _fits(name, found, like)
    return found


def _fits(name: str, value: float, like: Any) -> bool:
    """Whether a number is finite; ValueError where it is so, but not in like's arithmetic."""
    if not math.isfinite(value):
        return False
    if abs(value) > FLOAT32_MAX and getattr(getattr(like, "dtype", None), "itemsize", 8) < 8:
        raise ValueError(f"{name}: expected a number that float32 can hold, at most {FLOAT32_MAX:.8g}, got {value}")
    return True


def shape(value: Any) -> tuple[int, ...]:
    """A shape, dimension 0 the batch."""
    try:
        sizes = tuple(size.__index__() for size in value)
    except (TypeError, AttributeError):
        raise TypeError(f"shape: expected a sequence of integers, got {value!r}") from None
    if not 1 <= len(sizes) <= MAX_DIMS or any(size < 0 for size in sizes):
        raise ValueError(f"shape: expected 1 to {MAX_DIMS} sizes >= 0, dimension 0 the batch, got {sizes}")
    return sizes


def is_numpy_dtype(dtype: Any) -> bool:
    """Whether a dtype argument asks for NumPy: a numpy.dtype, a NumPy scalar type, or ml_dtypes' bfloat16."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and (
        isinstance(dtype, numpy.dtype) or (isinstance(dtype, type) and issubclass(dtype, numpy.generic))
    )


def clip_range(clip: Any) -> tuple[float, float] | None:
    """clip: None, or (lo, hi) with lo < hi, finite; or one positive number c for (-c, c)."""
    if clip is None:
        return None
    if isinstance(clip, (tuple, list)):
        if len(clip) != 2:
            raise ValueError(f"clip: expected (lo, hi), got {len(clip)} numbers")
        lo, hi = (number(f"clip[{k}]", c) for k, c in enumerate(clip))
    else:
        hi = number("clip", clip)
        lo = -hi
    if not lo < hi:
        raise ValueError(f"clip: expected lo < hi, got ({lo}, {hi})")
    return lo, hi


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)


def outputs(
    named: Sequence[tuple[str, Any]],
    like: Any,
    shape: Sequence[int],
    dtypes: Sequence[Any],
    inputs: Sequence[tuple[str, Any]],
) -> None:
    """Given outputs: of like's kind, shape and device, of the right dtype, and each either an input itself or apart."""
    for (name, out), dtype in zip(named, dtypes, strict=True):
        if is_tensor(out) is not is_tensor(like) or not (is_tensor(out) or is_array(out)):
            wanted = "a torch tensor" if is_tensor(like) else "a NumPy array"
            raise TypeError(f"{name}: expected {wanted}, got {type(out).__name__}")
        if tuple(out.shape) != tuple(shape):
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(out.shape)}")
        if out.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {out.dtype}")
        if is_tensor(out):
            if out.device != like.device:
                raise ValueError(f"{name}: expected device {like.device}, got {out.device}")
        elif not out.flags.writeable:
            raise ValueError(f"{name}: expected a writable array, got a read-only one")
    separate(named, inputs)


def separate(named: Sequence[tuple[str, Any]], inputs: Sequence[tuple[str, Any]]) -> None:
    """Outputs whose elements have addresses of their own, each an input itself or apart from all inputs and outputs."""
    if compiling() and is_tensor(named[0][1]):
        return
    for k, (name, out) in enumerate(named):
        sizes = () if dense(out) else zip(out.shape, strides(out), strict=True)
        if any(stride == 0 and size > 1 for size, stride in sizes):
            raise ValueError(f"{name}: expected every element at its own address, got an expanded tensor")
        for position, (other, value) in enumerate([*inputs, *named[:k]]):
            if value is None or (value is out and position < len(inputs)) or apart(out, value):
                continue
            same = start(out) == start(value) and strides(out) == strides(value) and out.dtype == value.dtype
            if not overlap(out, value):
                continue
            if position >= len(inputs):
                raise ValueError(f"{name}: expected memory apart from {other}, got an overlap")
            if not same:
                raise ValueError(f"{name}: expected {other} itself or memory apart from it, got a partial overlap")


def mask(value: Any, like: Any) -> Any:
    """A mask, expanded to like's shape: bool or floating, of like's kind and device."""
    if is_tensor(value) is not is_tensor(like) or not (is_tensor(value) or is_array(value)):
        wanted = "a torch tensor" if is_tensor(like) else "a NumPy array"
        raise TypeError(f"mask: expected {wanted}, got {type(value).__name__}")
    if "bool" not in str(value.dtype) and not is_float(value.dtype):
        raise TypeError(f"mask: expected bool, {FLOATS}, got {value.dtype}")
    if is_tensor(value) and value.device != like.device:
        raise ValueError(f"mask: expected device {like.device}, got {value.device}")
    if "bool" not in str(value.dtype):
        if value.dtype.itemsize > 4 and like.dtype.itemsize < 8:
            raise TypeError(f"mask: expected bool, or at most the arithmetic's float32, got {value.dtype}")
        if _visible(value) and math.prod(value.shape) and not bool((value >= 0).all()):
            raise ValueError("mask: expected numbers >= 0, got a negative one or NaN")
    sizes = (1,) * (like.ndim - value.ndim) + tuple(value.shape)
    if value.ndim > like.ndim or any(a not in (1, b) for a, b in zip(sizes, like.shape, strict=True)):
        raise ValueError(f"mask: expected a shape that broadcasts to {tuple(like.shape)}, got {tuple(value.shape)}")
    if is_tensor(value):
        return value.expand(like.shape)
    import numpy

    return numpy.broadcast_to(value, like.shape)


def sample_ids(ids: Any, batch: int, numpy: bool, device: Any) -> Any:
    """Sample ids as contiguous int64 [B] beside the other arrays."""
    if hasattr(ids, "dtype"):
        integer = "int" in str(ids.dtype)
    else:
        if not isinstance(ids, Iterable) or isinstance(ids, (str, bytes)):
            raise TypeError(f"sample_ids: expected a sequence of integers, or int64, got {ids!r}")
        ids = tuple(ids)
        integer = all(hasattr(i, "__index__") and not isinstance(i, bool) for i in ids)
        for i in ids:
            if integer and not -(1 << 63) <= i.__index__() < 1 << 63:
                raise ValueError(f"sample_ids: expected integers that int64 can hold, got {i}")
    if not integer:
        raise TypeError(f"sample_ids: expected int64, got {getattr(ids, 'dtype', ids)}")
    if numpy:
        import numpy as np

        found: Any = np.ascontiguousarray(ids, dtype=np.int64)
    else:
        import torch

        found = torch.as_tensor(ids, dtype=torch.int64, device=device).contiguous()
    if tuple(found.shape) != (batch,):
        raise ValueError(f"sample_ids: expected shape ({batch},), one a sample, got {tuple(found.shape)}")
    return found


def table(rows: Any, index: Any, cells: int, like: Any, batch: int) -> None:
    """A RowTable: rows of the right length, in the arithmetic's type, on the right device; an index of 1 or [B]."""
    if rows.ndim != 2 or rows.shape[1] != cells:
        raise ValueError(f"table: expected rows of {cells} cells, got shape {tuple(rows.shape)}")
    wide = like.dtype.itemsize == 8 if hasattr(like, "dtype") else False
    wanted = "float64" if wide else "float32"
    if str(rows.dtype).removeprefix("torch.") != wanted:
        raise TypeError(f"table: expected {wanted}, as the arithmetic of the state has it, got {rows.dtype}")
    for name, array in (("table", rows), ("index", index)):
        if array is not None and is_tensor(like) and (not is_tensor(array) or array.device != like.device):
            raise ValueError(f"{name}: expected a tensor on {like.device}, got {getattr(array, 'device', type(array))}")
    if index is None:
        if rows.shape[0] not in (1, batch):
            raise ValueError(f"table: expected 1 or {batch} rows where no index is given, got {rows.shape[0]}")
    elif "int64" not in str(index.dtype) or tuple(index.shape) not in ((1,), (batch,)):
        raise ValueError(f"index: expected int64 of shape (1,) or ({batch},), got {index.dtype} {tuple(index.shape)}")
    elif not rows.shape[0]:
        raise ValueError("table: expected at least one row")


def ddim_path(
    prediction: str, alpha_t: Any, sigma_t: Any, alpha_s: Any, sigma_s: Any, eta: Any, rounding: float
) -> None:
    """Path values of a DDIM step given as tensors: no division by zero, and sigma_s^2 >= d^2, where values are looked
    at (host numbers alone are judged by rows.ddim_numbers)."""
    if type(alpha_t) is type(sigma_t) is type(alpha_s) is type(sigma_s) is type(eta) is float:
        return
    path = (alpha_t, sigma_t, alpha_s, sigma_s, eta)
    if not all(isinstance(p, float) or _visible(p) for p in path):
        return
    alpha_t, sigma_t, alpha_s, sigma_s, eta = (p.detach() if is_tensor(p) else p for p in path)
    if prediction == "epsilon" and _any(alpha_t == 0.0):
        raise ValueError("alpha_t: expected > 0 with prediction='epsilon', got 0")
    if prediction == "sample" and _any(sigma_t == 0.0):
        raise ValueError("sigma_t: expected > 0 with prediction='sample', got 0")
    if isinstance(eta, float) and eta == 0.0:
        return
    if _any((eta != 0.0) & ((sigma_t == 0.0) | (alpha_s == 0.0))):
        raise ValueError("eta: expected 0 where sigma_t or alpha_s is 0, got another number")
    # eta is 0 where these are 0: any other divisor does.
    sigma_t, alpha_s = sigma_t + (sigma_t == 0.0), alpha_s + (alpha_s == 0.0)
    kept = 1.0 - (alpha_t / alpha_s) ** 2
    if _any((eta != 0.0) & (kept < -rounding)):
        raise ValueError("eta: expected 0 where alpha_t > alpha_s (a step toward the noise), got another number")
    if _any((eta * (1.0 / sigma_t)) ** 2 * kept > 1.0 + rounding):
        raise ValueError(
            "eta: expected sigma_s^2 - d^2 >= 0 in every sample, d = eta (sigma_s / sigma_t) "
            "sqrt(1 - alpha_t^2 / alpha_s^2), got a larger eta"
        )


def _any(found: Any) -> bool:
    return bool(found if isinstance(found, bool) else found.any())


def _coefficient_shape(name: str, value: Any, like: Any) -> None:
    if not is_float(value.dtype):
        raise TypeError(f"{name}: expected a number or a tensor of {FLOATS}, got {value.dtype}")
    if value.shape != like.shape[:1] and math.prod(value.shape) != 1:
        raise ValueError(
            f"{name}: expected a number, one element, or shape ({like.shape[0]},), one a sample, "
            f"got {tuple(value.shape)}"
        )


def elements(shape: Sequence[int]) -> None:
    """At most 2^34 elements a sample, where noise is drawn: its counter has 32 bits, of four elements each."""
    n = 1
    for size in shape[1:]:
        n *= size
    if n > 1 << 34:
        raise ValueError(f"shape: expected at most 2^34 elements a sample where noise is drawn, got {n}")


def compiling() -> bool:
    """Whether torch.compile or torch.export traces this call."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def _visible(value: Any) -> bool:
    """Whether an array's values are looked at: on the host, where that is cheap, or when gk.debug(values=True) asks;
    never those of fake tensors or of what torch.func and torch.compile trace."""
    if not is_tensor(value):
        return True
    if compiling() or (value.device.type != "cpu" and not debug.values):
        return False
    torch = sys.modules["torch"]
    return type(value) in (torch.Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(
        value
    )


def _values(name: str, value: Any, low: float, high: float) -> None:
    if not _visible(value):
        return
    # Of B numbers; for few of them faster than torch.
    numbers = (value if value.ndim == 1 else value.reshape(-1)).tolist()
    index = _first_outside(numbers, low, high)
    if index is not None:
        raise ValueError(f"{name}: expected {_range(low, high)}, got {numbers[index]} at index {index}")


def finite(name: str, value: Any, source: str) -> None:
    """FloatingPointError: a number of a small array [B] that is looked at here (_visible) is not finite."""
    if not _visible(value):
        return
    numbers = value.tolist()
    index = _first_outside(numbers, -math.inf, math.inf)
    if index is not None:
        raise FloatingPointError(f"{name}: expected finite numbers, got {numbers[index]} at index {index}, {source}")


def _first_outside(numbers: list[float], low: float, high: float) -> int | None:
    """The index of the first number that is not finite, or not in [low, high]."""
    # A finite sum has no NaN among its terms, and least and greatest are what they say: a third of the loop's time.
    if math.isfinite(sum(numbers)):
        unbounded = low == -math.inf and high == math.inf
        if unbounded or not numbers or (low <= min(numbers) and max(numbers) <= high):
            return None
    inside = (low <= number <= high and math.isfinite(number) for number in numbers)
    return next((index for index, found in enumerate(inside) if not found), None)


def _range(low: float, high: float) -> str:
    if low > -math.inf and high < math.inf:
        return f"a number from {low:g} to {high:g}"
    if low > -math.inf:
        return f"a finite number >= {low:g}"
    return f"a finite number <= {high:g}" if high < math.inf else "a finite number"
