"""The times of multistep sampling, chosen one after another by the quality of what they give.

    t_1 = the first candidate;      t_{k+1} = argmin over later candidates t of quality(t_1, .., t_k, t)

each by ternary search, for which quality has to fall and then rise with t: of two candidates at a third and at two
thirds of those left, the third beyond the worse one is dropped. About 2 log(n) / log(3/2) qualities a time.

Song, Dhariwal, Chen, Sutskever, arXiv:2303.01469, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import check


def search_times(
    quality: Callable[[Sequence[float]], float], candidates: Any, steps: int
) -> tuple[list[float], list[float]]:
    """Times for sample(times=), greedily.

    Args:
        quality: of decreasing times, smaller is better: a Frechet distance of samples at them, always of one seed.
        candidates: times that may be chosen, strictly decreasing, as consistency.times(40)[:0:-1]; the first is taken.
        steps: of the times to find, from 1 to the number of candidates.

    Returns:
        (times, qualities): the times, decreasing, and the quality of the first k of them, k = 1 .. steps.

    Raises:
        ValueError, TypeError: an argument is not what it may be; a quality that is NaN or no number.
    """
    if not callable(quality):
        raise TypeError(f"quality: expected a callable of times, got {type(quality).__name__}")
    given = np.asarray(candidates, dtype=np.float64)
    if given.ndim != 1 or not given.size or not (np.isfinite(given).all() and (np.diff(given) < 0.0).all()):
        raise ValueError(f"candidates: expected strictly decreasing finite times, at least one, got {candidates}")
    steps = check.integer("steps", steps, 1, len(given))
    known: dict[tuple[int, ...], float] = {}

    def of(indices: tuple[int, ...]) -> float:
        if indices not in known:
            found = float(quality(given[list(indices)].tolist()))
            if math.isnan(found):
                raise ValueError(f"quality: expected a number, got NaN at the times {given[list(indices)].tolist()}")
            known[indices] = found
        return known[indices]

    chosen: tuple[int, ...] = (0,)
    values = [of(chosen)]
    for k in range(1, steps):
        # As many candidates are left below as times are still to be found after this one.
        low, high = chosen[-1] + 1, len(given) - (steps - k)
        while high - low >= 3:
            third = (high - low) // 3
            left, right = low + third, high - third
            if of((*chosen, left)) < of((*chosen, right)):
                high = right
            else:
                low = left
        best = min(range(low, high + 1), key=lambda index: of((*chosen, index)))
        chosen = (*chosen, best)
        values.append(of(chosen))
    return given[list(chosen)].tolist(), values
