"""A state and its log-density along one ODE: the change of variables (13.16), step by step.

    dx/dt = v(x, t),      d log p_t(x_t)/dt = -div v(x_t, t)                                     (13.14)-(13.16)

A stage's row is linear in the states and in the network's output, with the same numbers for every element, and a
network that predicts the velocity has the slope m itself. So a solver's rows serve the integral l of div v as they
serve x, with the divergence in m's place: both have the solver's order, on any grid, either way in time. Under
guidance the divergence of m_u + w (m_c - m_u) is div m_u + w (div m_c - div m_u): the same row again.

Along a pair that chooses its steps, by the error of x alone, l_s = l + dt sum_j b_j div v_j where a step is accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..fused import apply_row
from ..rows import Row
from . import adaptive, dopri5, embedded, network
from .table import Stage

Divergence = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor]]  # (f, x) -> f(x), div f [B]


class Chosen(NamedTuple):
    """Steps that a pair chooses, between the times of a grid."""

    pair: dopri5.Dopri5
    grid: np.ndarray


def check_stages(stages: Sequence[Stage]) -> None:
    """Rows that step the integral too. ValueError: a sampler that clamps, draws noise or scales the network's input."""
    for stage in stages:
        if stage.pred is not None or stage.input_scale != 1.0 or stage.out.z != 0.0:
            raise ValueError("sampler: expected a solver of dx/dt = v(x, t), such as 'rk4', got one of another kind")


def walk(
    model: Any, stages: Sequence[Stage], x: Tensor, divergence: Divergence, *, cond: Mapping[str, Any],
    guidance: Any, model_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The stages from x, and the integral of the divergence along them from 0.

    Args:
        model: called as model(x, t, **cond).
        stages: that check_stages accepts.
        x: the initial state.  [B, ...], float32 or float64.
        divergence: of a field f at x: f(x) and div f(x), such as flows.Exact().
        cond: of the model; of a doubled batch, unconditional first, where guidance is given.
        guidance: w, a number or [B]; None without.
        model_dtype: of the network's input.

    Returns:
        (x, l): the last state [B, ...], and l [B], the integral of div v over t, of x's dtype.
    """
    total = x.new_zeros(x.shape[0])
    calls = x.shape[0] if guidance is None else 2 * x.shape[0]
    time_dtype = torch.float64 if model_dtype == torch.float64 else torch.float32
    times = torch.tensor([stage.model_time for stage in stages], dtype=time_dtype, device=x.device)
    states, before, memory = (x, total), (x, total), dict[int, tuple[Tensor, Tensor]]()
    for stage, time in zip(stages, times.unbind(), strict=True):
        t = time.expand(calls).contiguous()

        def velocity(seen: Tensor, t: Tensor = t) -> Tensor:
            return network.call(model, seen, t, cond)

        seen = states[0] if guidance is None else torch.cat([states[0], states[0]])
        outputs = divergence(velocity, seen.to(model_dtype))
        rows = Row((stage.out, *[out for _, out in stage.keeps]), guidance=guidance)
        stepped = []
        for j in (0, 1):
            m = network.at_most(outputs[j], x.dtype)
            m_uncond = None
            if guidance is not None:
                m_uncond, m = m[: x.shape[0]], m[x.shape[0] :]
            h = [memory[slot][j] for slot in stage.reads] if stage.reads else [before[j]] * len(stage.out.h)
            stepped.append(
                apply_row(rows, x=states[j], m=m, m_uncond=m_uncond, h=h, dtypes=(x.dtype,) * len(rows.outs))
            )
        before, states = states, (stepped[0][0], stepped[1][0])
        for k, (slot, _) in enumerate(stage.keeps, 1):
            memory[slot] = (stepped[0][k], stepped[1][k])
    return states


def solve(
    model: Any, along: Chosen, x: Tensor, divergence: Divergence, *, cond: Mapping[str, Any], guidance: Any,
    model_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As walk(), along a pair that chooses its steps; without a gradient.

    Raises:
        RuntimeError: as adaptive.walk.
    """
    halves = 1 if guidance is None else 2
    state = embedded.Integration(along.pair, x, bool(along.grid[0] < along.grid[-1]), model_dtype, halves, guidance)
    total, first = x.new_zeros(x.shape[0]), x.new_zeros(x.shape[0])  # l, and div v at the start of a step
    found: list[Tensor] = []

    def velocity(seen: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        m, d = divergence(lambda y: network.call(model, y, t, cond), seen)
        m, m_uncond = network.at_most(m, x.dtype), None
        if guidance is not None:
            (m_uncond, m), (d_uncond, d) = m.chunk(2), d.chunk(2)
            d = d_uncond + guidance * (d - d_uncond)
        found.append(d.to(x.dtype))
        return m, m_uncond

    def begin() -> None:
        state.begin(velocity)
        first.copy_(found[0])

    def attempt() -> None:
        found.clear()
        state.attempt(velocity)
        change = sum(b * d for b, d in zip(dopri5.B, (first, *found), strict=True))
        total.copy_(torch.where(state.accepted, total + state.sign * state.h * change, total))
        first.copy_(torch.where(state.accepted, found[-1], first))

    x, _, _ = adaptive.walk(state, begin, attempt, along.grid, keep=False, log=False)
    return x, total
