"""The rows of a distillation step, (13.31) and (13.32), at every pair of neighbouring times t = t_n, s = t_{n+1}.

With D = k x + o m of the teacher's network, whose input is i x, Phi(x, s) = ((1 - k) x - o m) / s and

    Euler             x^ = x + (t - s) Phi(x, s)
    Heun              x^ = (x^_E + x) / 2 + (t - s)/2 Phi(x^_E, t),  x^_E that of Euler's rule
    DPM-Solver++(2S)  x^ = (t/s) x + (1 - t/s) D(x_u, u),  x_u = (u/s) x + (1 - u/s) D(x, s),  u = (s t)^(1/2)

where u is half way in ln sigma, and Euler's rule is DPM-Solver++ of order 1. The rows named in_* are these times what
the student's, or the teacher's next, call scales its input by.

Lu, Zhou, Bao, Chen, Li, Zhu, arXiv:2211.01095, algorithm 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..samplers import Preconditioned

SOLVERS = ("heun", "euler", "dpmpp_2s")
ONE = (
    "lower", "upper", "noise_lower", "noise_upper", "in_upper", "in_upper_z", "told_first", "teach_upper",
    "teach_upper_z", "first_x", "first_m", "in_first_x", "in_first_m", "minus_skip_upper", "out_upper", "skip_lower",
    "out_lower",
)  # fmt: skip
TWO = ("told_second", "second_h", "second_x", "second_m", "in_second_h", "in_second_x", "in_second_m")


def names(solver: str) -> tuple[str, ...]:
    """Of columns()."""
    return ONE if solver == "euler" else ONE + TWO


def columns(f: Preconditioned, times: np.ndarray, scalings: Any, solver: str) -> dict[str, np.ndarray]:
    """In float64, [N-1] each.

    Args:
        f: the student's scalings.
        times: t_1 .. t_N.
        scalings: of the teacher: times -> (i, k, o, what the network is told).
        solver: of SOLVERS.
    """
    t, s = times[:-1], times[1:]
    ends = scalings(times)
    i, k, o, told = (column[1:] for column in ends)
    u = np.sqrt(t * s) if solver == "dpmpp_2s" else t  # where the teacher's first step goes
    in_s, in_t = f.c_in(s), f.c_in(t)
    first_x, first_m = 1.0 + (u - s) * (1.0 - k) / s, -(u - s) * o / s
    found = {
        "lower": t, "upper": s, "noise_lower": np.log(t) / 4.0, "noise_upper": np.log(s) / 4.0,
        "in_upper": in_s, "in_upper_z": in_s * s, "told_first": told, "teach_upper": i, "teach_upper_z": i * s,
        "first_x": first_x, "first_m": first_m,
        "minus_skip_upper": -f.c_skip(s), "out_upper": f.c_out(s),
        "skip_lower": f.c_skip(t), "out_lower": f.c_out(t),
    }  # fmt: skip
    if solver == "euler":
        return found | {"in_first_x": in_t * first_x, "in_first_m": in_t * first_m}
    i, k, o, told = scalings(u) if solver == "dpmpp_2s" else (column[:-1] for column in ends)
    if solver == "heun":
        h, x, m = np.full_like(t, 0.5), 0.5 + (t - s) / 2.0 * (1.0 - k) / t, -(t - s) / 2.0 * o / t
    else:
        h, x, m = t / s, (1.0 - t / s) * k, (1.0 - t / s) * o
    return found | {
        "in_first_x": i * first_x, "in_first_m": i * first_m, "told_second": told,
        "second_h": h, "second_x": x, "second_m": m, "in_second_h": in_t * h, "in_second_x": in_t * x,
        "in_second_m": in_t * m,
    }  # fmt: skip
