"""Editing given data: a loop that starts part of the way along the path.

    x = alpha_t init + sigma_t z        at the first t of the last max(1, floor(strength n)) of n steps

Meng et al., arXiv:2108.01073 (SDEdit).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from torch import Tensor

from .. import check

if TYPE_CHECKING:
    from .parameterization import Parameterization


class EditingOptions(TypedDict, total=False):
    """The keyword arguments of every sample() for data that are given.

    init: data to start from, noised, [B, ...] floating; its noise is that of an initial state. Needs strength.
    strength: in (0, 1]: the part of the steps that is walked, the last max(1, floor(strength n)) of n. At 1 all are,
        and little is left of init.
    """

    init: Tensor | None
    strength: float | None


def begun(grid: np.ndarray, along: Parameterization, options: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """The times that are walked, and loop.run's arguments for init and strength, which options may have.

    Raises:
        ValueError, TypeError: strength is not what it may be.
    """
    found = dict(options)
    init, strength = found.pop("init", None), found.pop("strength", None)
    if init is None:
        if strength is not None:
            raise ValueError(f"strength: expected None without init, got {strength}")
        return grid, found
    if strength is None:
        raise ValueError("strength: expected a number > 0, at most 1, beside init, got None")
    if not check.number("strength", strength, 0.0, 1.0) > 0.0:
        raise ValueError(f"strength: expected a number > 0, at most 1, got {strength}")
    steps = len(grid) - 1
    walked = max(1, math.floor(steps * strength + 1e-9))  # 0.29 * 100 is 28.999999999999996
    grid = grid[steps - walked :]
    alpha, sigma = along.scales(float(grid[0]))
    return grid, {**found, "init": init, "init_scale": alpha, "scale": sigma}


def refuse(options: Mapping[str, Any], where: str) -> None:
    """ValueError: options of editing, which have no meaning where the walk is toward the noise."""
    for name in EditingOptions.__annotations__:
        if options.get(name) is not None:
            raise ValueError(f"{name}: expected None {where}")
