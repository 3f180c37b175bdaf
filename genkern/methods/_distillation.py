"""The rows of a distillation step, (13.31) and (13.32), at every pair of neighbouring times t = t_n, s = t_{n+1}.

With D = k x + o m of the teacher's network, whose input is i x, Phi(x, s) = ((1 - k) x - o m) / s and

    Euler   x^ = x + (t - s) Phi(x, s)
    Heun    x^ = (x^_E + x) / 2 + (t - s)/2 Phi(x^_E, t),  x^_E that of Euler's rule

and the rows named in_* and teach_* are these times what the student's and the teacher's next call scale their input by.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..samplers import Preconditioned

# Of columns().
COEFFICIENTS = (
    "lower", "upper", "noise_lower", "noise_upper", "in_upper", "in_upper_z",
    "teach_noise_lower", "teach_noise_upper", "teach_upper", "teach_upper_z",
    "euler_x", "euler_m", "in_euler_x", "in_euler_m", "teach_euler_x", "teach_euler_m",
    "heun_x", "heun_m", "in_heun_h", "in_heun_x", "in_heun_m",
    "minus_skip_upper", "out_upper", "skip_lower", "out_lower",
)  # fmt: skip


def columns(f: Preconditioned, times: np.ndarray, scalings: Any) -> dict[str, np.ndarray]:
    """In float64, [N-1] each.

    Args:
        f: the student's scalings.
        times: t_1 .. t_N.
        scalings: of the teacher: times -> (i, k, o, what the network is told).
    """
    t, s = times[:-1], times[1:]
    (i_t, k_t, o_t, told_t), (i_s, k_s, o_s, told_s) = scalings(t), scalings(s)
    dt, in_s, in_t = t - s, f.c_in(s), f.c_in(t)
    euler_x, euler_m = 1.0 + dt * (1.0 - k_s) / s, -dt * o_s / s
    heun_x, heun_m = 0.5 + dt / 2.0 * (1.0 - k_t) / t, -dt / 2.0 * o_t / t
    return {
        "lower": t, "upper": s, "noise_lower": np.log(t) / 4.0, "noise_upper": np.log(s) / 4.0,
        "in_upper": in_s, "in_upper_z": in_s * s,
        "teach_noise_lower": told_t, "teach_noise_upper": told_s, "teach_upper": i_s, "teach_upper_z": i_s * s,
        "euler_x": euler_x, "euler_m": euler_m, "in_euler_x": in_t * euler_x, "in_euler_m": in_t * euler_m,
        "teach_euler_x": i_t * euler_x, "teach_euler_m": i_t * euler_m,
        "heun_x": heun_x, "heun_m": heun_m, "in_heun_h": in_t * 0.5, "in_heun_x": in_t * heun_x,
        "in_heun_m": in_t * heun_m,
        "minus_skip_upper": -f.c_skip(s), "out_upper": f.c_out(s),
        "skip_lower": f.c_skip(t), "out_lower": f.c_out(t),
    }  # fmt: skip
