"""Arguments on the host: numbers and their ranges, words, shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MAX_DIMS = 16  # of a tensor, the batch included (csrc/kernels/kernels.h)


def unsigned(name: str, value: Any, bits: int) -> int:
    """An integer 0 .. 2^bits - 1."""
    try:
        number = value.__index__()
    except (AttributeError, TypeError):
        raise TypeError(f"{name}: expected an integer, got {value!r} ({type(value).__name__})") from None
    if isinstance(value, bool) or not 0 <= number < 1 << bits:
        raise ValueError(f"{name}: expected an integer from 0 to 2^{bits} - 1, got {value}")
    return int(number)


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite host number in [low, high]."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name}: expected a number, got {value!r} ({type(value).__name__})")
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected {number_range(low, high)}, got an integer beyond float64") from None
    if not (low <= found <= high and math.isfinite(found)):
        raise ValueError(f"{name}: expected {number_range(low, high)}, got {found}")
    return found


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


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)


def shape(value: Any) -> tuple[int, ...]:
    """A shape, dimension 0 the batch."""
    try:
        sizes = tuple(size.__index__() for size in value)
    except (TypeError, AttributeError):
        raise TypeError(f"shape: expected a sequence of integers, got {value!r}") from None
    if not 1 <= len(sizes) <= MAX_DIMS or any(size < 0 for size in sizes):
        raise ValueError(f"shape: expected 1 to {MAX_DIMS} sizes >= 0, dimension 0 the batch, got {sizes}")
    return sizes


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


def number_range(low: float, high: float) -> str:
    if low > -math.inf and high < math.inf:
        return f"a number from {low:g} to {high:g}"
    if low > -math.inf:
        return f"a finite number >= {low:g}"
    return f"a finite number <= {high:g}" if high < math.inf else "a finite number"
