"""The values of coefficients, times and indices, which are numbers or arrays: finite, and in their range.

Those of arrays are looked at where `visible` says so.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from .._debug import debug
from .kinds import FLOATS, compiling, is_array, is_float, is_tensor
from .numbers import number, number_range

FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127


def visible(value: Any) -> bool:
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
        raise ValueError(f"{name}: expected {number_range(low, high)}, got {value}")
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


def _coefficient_shape(name: str, value: Any, like: Any) -> None:
    if not is_float(value.dtype):
        raise TypeError(f"{name}: expected a number or a tensor of {FLOATS}, got {value.dtype}")
    if value.shape != like.shape[:1] and math.prod(value.shape) != 1:
        raise ValueError(
            f"{name}: expected a number, one element, or shape ({like.shape[0]},), one a sample, "
            f"got {tuple(value.shape)}"
        )


def _values(name: str, value: Any, low: float, high: float) -> None:
    if not visible(value):
        return
    # Of B numbers; for few of them faster than torch.
    numbers = (value if value.ndim == 1 else value.reshape(-1)).tolist()
    index = _first_outside(numbers, low, high)
    if index is not None:
        raise ValueError(f"{name}: expected {number_range(low, high)}, got {numbers[index]} at index {index}")


def _first_outside(numbers: list[float], low: float, high: float) -> int | None:
    """The index of the first number that is not finite, or not in [low, high]."""
    # A finite sum has no NaN among its terms, and least and greatest are what they say: a third of the loop's time.
    if math.isfinite(sum(numbers)):
        unbounded = low == -math.inf and high == math.inf
        if unbounded or not numbers or (low <= min(numbers) and max(numbers) <= high):
            return None
    inside = (low <= number <= high and math.isfinite(number) for number in numbers)
    return next((index for index, found in enumerate(inside) if not found), None)


def finite(name: str, value: Any, source: str) -> None:
    """FloatingPointError: a number of a small array [B] that is looked at here (visible) is not finite."""
    if not visible(value):
        return
    numbers = value.tolist()
    index = _first_outside(numbers, -math.inf, math.inf)
    if index is not None:
        raise FloatingPointError(f"{name}: expected finite numbers, got {numbers[index]} at index {index}, {source}")


def inside(name: str, value: Any, low: float, high: float) -> Any:
    """A number, an array or a tensor, as it is: finite and in [low, high] (an array where it is looked at)."""
    if not is_tensor(value) and not is_array(value):
        number(name, value, low, high)
        return value
    if not visible(value) or not math.prod(value.shape):
        return value
    first, last = map(float, value.detach().aminmax() if is_tensor(value) else (value.min(), value.max()))
    if not (low <= first and last <= high and math.isfinite(first) and math.isfinite(last)):
        raise ValueError(f"{name}: expected {number_range(low, high)}, got {first:g} to {last:g}")
    return value


def whole(name: str, value: Any, low: int, high: int) -> None:
    """A tensor of integers low .. high, of any dtype, where it is looked at."""
    inside(name, value, low, high)
    if is_float(value.dtype) and visible(value) and bool((value != value.round()).any()):
        raise ValueError(f"{name}: expected integers from {low} to {high}, got numbers between them")


def indices(name: str, value: Any, count: int, batch: int) -> None:
    """An int64 tensor [B] of 0 .. count-1, its values where they are looked at."""
    import torch

    if value.dtype != torch.int64 or value.shape != (batch,):
        raise ValueError(f"{name}: expected int64 of shape ({batch},), got {value.dtype} of shape {tuple(value.shape)}")
    if visible(value) and bool(((value < 0) | (value >= count)).any()):
        raise ValueError(f"{name}: expected integers from 0 to {count - 1}, got {value.tolist()}")


def before(name: str, t: Any, s: Any, meaning: str) -> None:
    """t < s, of numbers or tensors [B] or of one element, where the values of both are looked at."""
    if not is_tensor(t) and not is_tensor(s):
        if not t < s:
            raise ValueError(f"{name}: expected t < s, {meaning}, got {float(t):g} and {float(s):g}")
        return
    if any(is_tensor(value) and not visible(value) for value in (t, s)):
        return
    import torch

    pair = [torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().reshape(-1) for value in (t, s)]
    for index, (a, b) in enumerate(zip(*(value.tolist() for value in torch.broadcast_tensors(*pair)), strict=True)):
        if not a < b:
            raise ValueError(f"{name}: expected t < s, {meaning}, got {a:g} and {b:g} at index {index}")


def ddim_path(
    prediction: str, alpha_t: Any, sigma_t: Any, alpha_s: Any, sigma_s: Any, eta: Any, rounding: float
) -> None:
    """Path values of a DDIM step given as tensors: no division by zero, and sigma_s^2 >= d^2, where values are looked
    at (host numbers alone are judged by rows.ddim_numbers)."""
    if type(alpha_t) is type(sigma_t) is type(alpha_s) is type(sigma_s) is type(eta) is float:
        return
    path = (alpha_t, sigma_t, alpha_s, sigma_s, eta)
    if not all(isinstance(p, float) or visible(p) for p in path):
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
