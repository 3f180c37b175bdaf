"""How the training of a consistency model grows finer: functions of the step k = 0 .. K of a run of K steps.

    CT     N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1,      mu(k) = exp(s0 ln mu0 / N(k))
    iCT    N(k) = min(s0 2^floor(k / K'), s1) + 1,      K' = floor(K / (log2 floor(s1 / s0) + 1))
    ECT    a(k) = ceil(k / every),      r/t = 1 - n(t) / q^a,      n(t) = 1 + k sigmoid(-b t)

N is the number of times (13.30), mu the decay of the target's running average, a the exponent of ECT's stage.

Song, Dhariwal, Chen, Sutskever, arXiv:2303.01469, appendix C (CT); Song, Dhariwal, arXiv:2310.14189, table 1 (iCT);
Geng, Pokle, Luo, Lin, Kolter, arXiv:2406.14548, section 3.2 (ECT).
"""

from __future__ import annotations

import math

from .. import check


def ct_steps(step: int, total: int, s0: int = 2, s1: int = 150) -> int:
    """CT's N(k): from s0 at step 0 to s1 + 1 at step K.

    Args:
        step: k, 0 to total.
        total: K, >= 1.
        s0: N at the start, >= 2.
        s1: one less than N at the end, >= s0 - 1.

    Raises:
        ValueError: an argument outside its range. TypeError: one that is no integer.
    """
    total = check.integer("total", total, 1)
    step, s0 = check.integer("step", step, 0, total), check.integer("s0", s0, 2)
    s1 = check.integer("s1", s1, s0 - 1)
    # ceil(sqrt(v) - 1) + 1 = ceil(sqrt(v)), in integers, as a rounded root of a square could be a step too high.
    v = -(-(step * ((s1 + 1) ** 2 - s0 * s0) + total * s0 * s0) // total)
    return math.isqrt(v - 1) + 1


def ct_decay(step: int, total: int, s0: int = 2, s1: int = 150, mu0: float = 0.9) -> float:
    """CT's mu(k), the decay for EMA.update: from mu0, in (0, 1), at N = s0 towards 1. Other arguments as ct_steps."""
    n_steps = ct_steps(step, total, s0, s1)
    if not 0.0 < check.number("mu0", mu0) < 1.0:
        raise ValueError(f"mu0: expected a number in (0, 1), got {mu0}")
    return math.exp(s0 * math.log(mu0) / n_steps)


def ict_steps(step: int, total: int, s0: int = 10, s1: int = 1280) -> int:
    """iCT's N(k): s0 + 1, doubled (less 1) at even intervals, at most s1 + 1.

    Args:
        step: k, 0 to total.
        total: K, at least the number of doublings and one.
        s0, s1: one less than N at the start and at the end, 1 <= s0 <= s1.

    Raises:
        ValueError: an argument outside its range. TypeError: one that is no integer.
    """
    total = check.integer("total", total, 1)
    step, s0 = check.integer("step", step, 0, total), check.integer("s0", s0, 1)
    s1 = check.integer("s1", s1, s0)
    every = math.floor(total / (math.log2(s1 // s0) + 1))
    if every < 1:
        raise ValueError(f"total: expected a step at least for each doubling from {s0=} to {s1=}, got {total}")
    return int(min(s0 << min(step // every, s1.bit_length()), s1)) + 1


def ect_stage(step: int, every: int) -> int:
    """ECT's exponent a(k) = ceil(k / every): 0 at the first step alone. every: steps a stage, the paper's d, >= 1."""
    return -(-check.integer("step", step, 0) // check.integer("every", every, 1))
