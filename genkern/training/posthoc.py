"""Power-function averages of any length after the training, from those that were stored on the way.

The average of relative length sigma_rel after step t has the profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)
over the parameters of step tau <= t (emas.py). A combination of stored averages i has the profile sum_i x_i p_i, and x
minimises

    int (p - sum_i x_i p_i)^2 d tau,      so that      A x = b,      A_ij = <p_i, p_j>,  b_i = <p_i, p>,

    <p_a, p_b> = (g_a + 1) (g_b + 1) / (g_a + g_b + 1) (t_a / t_b)^(g_b) / t_b      for t_a <= t_b,  g: gamma

and is divided by its sum, so that parameters that do not move are their own average. What is stored later than t is
left out.

Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, arXiv:2312.02696, section 3.2, appendix C, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import check
from .emas import PowerDecay


def coefficients(stored: Sequence[tuple[int, PowerDecay]], step: int, power: PowerDecay) -> np.ndarray:
    """x: the weights of stored averages in the one of `power` after `step`.

    Args:
        stored: (t_i, its PowerDecay) of every average, t_i >= 1.
        step: t, at least one stored average's.
        power: of the average that is wanted.

    Returns:
        [N] float64, of sum 1; 0 where t_i > t.

    Raises:
        ValueError: no average stored at t or before it.
    """
    step = check.integer("step", step, 1)
    times = np.array([check.integer("stored", t, 1) for t, _ in stored], dtype=np.float64)
    powers = np.array([of.gamma for _, of in stored])
    chosen = np.flatnonzero(times <= step)
    if not chosen.size:
        raise ValueError(f"step: expected averages stored at {step} or before it, got {sorted(int(t) for t in times)}")
    t, g = times[chosen], powers[chosen]
    left = _product(t[:, None], g[:, None], t[None], g[None])
    # Averages stored close together are nearly dependent; the least squares solution does not mind.
    x = np.linalg.lstsq(left, _product(t, g, np.float64(step), np.float64(power.gamma)), rcond=None)[0]
    found = np.zeros(len(times))
    found[chosen] = x / x.sum()
    return found


def reconstruct(states: Sequence[Mapping[str, Any]], sigma_rel: float, step: int | None = None) -> dict[str, Any]:
    """The average of a relative length after a step, from what EMASet.state_dict() gave on the way.

    Args:
        states: of one EMASet, kept at several steps, in any order; its averages of a PowerDecay are used.
        sigma_rel: of the average, in (0, 12^(-1/2)].
        step: after which; default the last stored.

    Returns:
        A state for EMA.load_state_dict(): the parameters by name, float32 (float64 where they are), the buffers of the
        last state up to the step, and the decay after the step.

    Raises:
        ValueError: no states, none of a PowerDecay up to the step, other parameters in one than in another; sigma_rel
            outside its range.
    """
    power = PowerDecay(sigma_rel)
    if not states:
        raise ValueError("states: expected at least one, got none")
    last = max(int(state["steps"]) for state in states)
    step = check.integer("step", last if step is None else step, 1)
    stored: list[tuple[int, PowerDecay]] = []
    averages: list[Mapping[str, Any]] = []
    for state in states:
        for (kind, value), average in zip(state["decays"], state["averages"], strict=True):
            if kind == "sigma_rel" and state["steps"]:
                stored.append((int(state["steps"]), PowerDecay(value)))
                averages.append(average)
    if not stored:
        raise ValueError("states: expected averages of a PowerDecay, got none")
    first = averages[0]["parameters"]
    for average in averages[1:]:
        held = average["parameters"]
        if held.keys() != first.keys() or any(held[name].shape != first[name].shape for name in first):
            raise ValueError("states: expected the same parameters in all, got other names or shapes in some")
    x = coefficients(stored, step, power)
    parameters: dict[str, Tensor] = {}
    for name, like in first.items():
        total = torch.zeros_like(like, dtype=torch.float64)
        for weight, average in zip(x.tolist(), averages, strict=True):
            if weight:
                total.add_(average["parameters"][name].double(), alpha=weight)
        parameters[name] = total.to(like.dtype)
    nearest = max((k for k, (t, _) in enumerate(stored) if t <= step), key=lambda k: stored[k][0])
    return {"decay": power.decay(step), "parameters": parameters, "buffers": dict(averages[nearest]["buffers"])}


def _product(t_a: Any, g_a: Any, t_b: Any, g_b: Any) -> Any:
    """<p_a, p_b>."""
    ratio = np.minimum(t_a, t_b) / np.maximum(t_a, t_b)
    power = np.where(t_a <= t_b, g_b, g_a)
    return (g_a + 1.0) * (g_b + 1.0) / (g_a + g_b + 1.0) * ratio**power / np.maximum(t_a, t_b)
