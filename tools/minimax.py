"""Derives the polynomials of csrc/kernels/philox.h and exp.h and prints them as they stand there, with their errors.

    -2 log(1 - g/2)  = g + g^2 R(g)         sqrt(1/2) <= 1 - g/2 <= sqrt(2), absolute error
    sin(pi/4 v)      = v S(v^2)             -1 <= v <= 1, relative error
    cos(pi/4 v)      = 1 + v^2 C(v^2)       -1 <= v <= 1, relative error
    exp(r)           = 1 + r + r^2 Q(r)     -log(2) / 2 <= r <= log(2) / 2, relative error; in float32 and in float64

Each is the polynomial whose largest weighted error is least (Remez's exchange), in exact enough arithmetic (mpmath).
A coefficient is stored in float32, those of the second exp in float64. Where t >= 0 the lowest is rounded, the others
are fitted again with it fixed, and so on; around t = 0 the powers left over are no Chebyshev system, and all are
rounded at once. The bounds printed are those of the rounded polynomials, evaluated exactly: what the arithmetic adds is
measured by tests/test_noise_native.py and tests/test_elementwise.py.

    python tools/minimax.py

Remez 1934; Brisebarre, Chevillard 2007, "Efficient polynomial L-infinity approximations" (why coefficients are
rounded one at a time).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Sequence

from mpmath import mp, mpf

mp.prec = 120
GRID = 800


@dataclasses.dataclass(frozen=True)
class Problem:
    """Fit sum_k c_k t^k to target(t) on [lo, hi], with the error weight(t) (sum - target)."""

    name: str
    lo: mpf
    hi: mpf
    terms: int
    target: Callable[[mpf], mpf]
    weight: Callable[[mpf], mpf]
    double: bool = False  # whether its coefficients are float64


def _log_target(g: mpf) -> mpf:
    return (-2 * mp.log1p(-g / 2) - g) / g**2 if abs(g) > mpf(2) ** -29 else mpf(1) / 4 + g / 12


def _sin_target(t: mpf) -> mpf:
    v = mp.sqrt(t)
    return mp.sin(mp.pi / 4 * v) / v if v else mp.pi / 4


def _cos_target(t: mpf) -> mpf:
    a2 = (mp.pi / 4) ** 2
    return (mp.cos(mp.pi / 4 * mp.sqrt(t)) - 1) / t if t > mpf(2) ** -40 else -a2 / 2


def _exp_target(r: mpf) -> mpf:
    return (mp.expm1(r) - r) / r**2 if abs(r) > mpf(2) ** -30 else mpf(1) / 2 + r / 6


HALF_LN2 = mp.log(2) / 2
PROBLEMS = (
    Problem("kLog", 2 - 2 * mp.sqrt(2), 2 - mp.sqrt(2), 7, _log_target, lambda g: g * g),
    Problem("kSin", mpf(0), mpf(1), 4, _sin_target, lambda t: 1 / _sin_target(t)),
    Problem("kCos", mpf(0), mpf(1), 3, _cos_target, lambda t: t / mp.cos(mp.pi / 4 * mp.sqrt(t))),
    Problem("kExpF", -HALF_LN2, HALF_LN2, 5, _exp_target, lambda r: r * r / mp.exp(r)),
    Problem("kExpD", -HALF_LN2, HALF_LN2, 10, _exp_target, lambda r: r * r / mp.exp(r), double=True),
)


def float32(value: mpf) -> float:
    """The nearest float32."""
    return float(struct.unpack("f", struct.pack("f", float(value)))[0])


def _poly(coefficients: Sequence[mpf], t: mpf) -> mpf:
    value = mpf(0)
    for c in reversed(coefficients):
        value = value * t + c
    return value


def _points(problem: Problem) -> list[mpf]:
    """A grid that is dense at the ends of the interval."""
    half, middle = (problem.hi - problem.lo) / 2, (problem.hi + problem.lo) / 2
    return [middle - half * mp.cos(mp.pi * k / GRID) for k in range(GRID + 1)]


def fit(problem: Problem, fixed: Sequence[float]) -> tuple[list[mpf], mpf]:
    """The minimax polynomial whose lowest coefficients are `fixed`, and its largest weighted error."""
    points = _points(problem)
    weights = [problem.weight(t) for t in points]
    targets = [problem.target(t) - _poly([mpf(c) for c in fixed], t) for t in points]
    first, free = len(fixed), problem.terms - len(fixed)
    nodes = [round((1 - mp.cos(mp.pi * (k + mpf(1) / 2) / (free + 1))) / 2 * GRID) for k in range(free + 1)]
    coefficients: list[mpf] = []
    for _ in range(30):
        rows, right = mp.matrix(free + 1, free + 1), mp.matrix(free + 1, 1)
        for i, node in enumerate(nodes):
            for k in range(free):
                rows[i, k] = weights[node] * points[node] ** (first + k)
            rows[i, free] = (-1) ** i
            right[i] = weights[node] * targets[node]
        solution = mp.lu_solve(rows, right)
        coefficients = [*(mpf(c) for c in fixed), *(solution[k] for k in range(free))]
        errors = [
            w * (_poly(coefficients[first:], t) * t**first - y)
            for w, t, y in zip(weights, points, targets, strict=True)
        ]
        largest = max(abs(e) for e in errors)
        if largest <= abs(solution[free]) * (1 + mpf(2) ** -20):
            break
        nodes = _exchange(errors, free + 1)
    return coefficients, largest


def _exchange(errors: Sequence[mpf], count: int) -> list[int]:
    """`count` neighbouring extrema of alternating sign that include the largest."""
    extrema: list[int] = []
    for k, error in enumerate(errors):
        if extrema and (errors[extrema[-1]] > 0) == (error > 0):
            if abs(error) > abs(errors[extrema[-1]]):
                extrema[-1] = k
        else:
            extrema.append(k)
    while len(extrema) > count:
        extrema.pop(0 if abs(errors[extrema[0]]) < abs(errors[extrema[-1]]) else -1)
    if len(extrema) < count:
        raise ArithmeticError(f"expected {count} alternating extrema, found {len(extrema)}")
    return extrema


def solve(problem: Problem) -> tuple[list[float], float, float]:
    """The rounded coefficients, lowest first; their weighted error; the error before rounding."""
    rounded: list[float] = []
    coefficients, ideal = fit(problem, rounded)
    while len(rounded) < problem.terms:
        c = coefficients[len(rounded)]
        rounded.append(float(c) if problem.double else float32(c))
        if problem.lo >= 0 and len(rounded) < problem.terms:
            coefficients, _ = fit(problem, rounded)
    values = [mpf(c) for c in rounded]
    error = max(abs(problem.weight(t) * (_poly(values, t) - problem.target(t))) for t in _points(problem))
    return rounded, float(error), float(ideal)


def c_literal(value: float, suffix: str = "f") -> str:
    """A hexadecimal literal of C++17, of float32 or, without the suffix, of float64."""
    mantissa, exponent = value.hex().split("p")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}p{exponent}{suffix}"


def in_bits(value: mpf, bits: int) -> mpf:
    """The nearest number of so many significant bits."""
    unit = mpf(2) ** (mp.floor(mp.log(value, 2)) + 1 - bits)
    return mp.nint(value / unit) * unit


def lines() -> list[str]:
    """The definitions, as they stand in philox.h and exp.h."""
    text = []
    for problem in PROBLEMS:
        coefficients, error, ideal = solve(problem)
        text.append(f"// largest weighted error {error:.1e} ({ideal:.1e} before the coefficients were rounded)")
        kind, suffix = ("double", "") if problem.double else ("float", "f")
        names = [f"{problem.name}{k} = {c_literal(c, suffix)}" for k, c in enumerate(coefficients)]
        text += [f"constexpr {kind} {name};" for name in names]
    text.append(f"constexpr float kMinus2Ln2 = {c_literal(float32(-2 * mp.log(2) * mpf(2) ** -23))};")
    # log(2) as the sum of two numbers, the first so short that n times it is exact, |n| <= 150 or 1076.
    for tag, kind, suffix, short, rounded in (("F", "float", "f", 15, float32), ("D", "double", "", 40, float)):
        high = in_bits(mp.log(2), short)
        text.append(f"constexpr {kind} kLog2E{tag} = {c_literal(rounded(1 / mp.log(2)), suffix)};")
        text.append(f"constexpr {kind} kLn2High{tag} = {c_literal(rounded(high), suffix)};")
        text.append(f"constexpr {kind} kLn2Low{tag} = {c_literal(rounded(mp.log(2) - high), suffix)};")
    return text


if __name__ == "__main__":
    print("\n".join(lines()))
