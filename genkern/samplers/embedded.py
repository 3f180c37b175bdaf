"""The passes of an embedded pair and its controller, whose every number lies on the device.

Time, step, error and acceptance are tensors beside the state, one number for all samples or one each, and every row
reads its dt from them: nothing here waits for the device. Six rows make an attempt: they read the state and up to five
slopes, and the one that makes x_s makes what is known of the error too. All that is written lies in memory of the
object's own, so that an attempt can be captured and replayed (graphs/adaptive.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..fused import apply_row
from ..rows import Out, Row, times
from ..stat import stat_row
from . import network

if TYPE_CHECKING:
    from .dopri5 import Dopri5
    from .loop import Run

F64 = torch.float64
SAFETY, LARGEST, SMALLEST = 0.9, 10.0, 0.2
RUNNING, ENDED, STUCK = range(3)
CALLS, FIRST_CALLS = 6, 2  # of an attempt; of the beginning
Velocity = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (network input, t) -> m, m_uncond


class Integration:
    """The state of a solve.

    Args:
        pair: its tolerances and control.
        x: the initial state, copied.  [B, ...], float32 or float64.
        forward: whether t increases.
        model_dtype: of the network's input; default x's.
        halves: how often the network's input holds the state: twice under guidance.
        guidance: the scale w, a number or a tensor.
    """

    def __init__(
        self, pair: Dopri5, x: Tensor, forward: bool, model_dtype: torch.dtype | None = None, halves: int = 1,
        guidance: Any = None,
    ) -> None:  # fmt: skip
        from . import dopri5

        self.pair, self.tableau, self.guidance = pair, dopri5, guidance
        self.sign, self._halves = 1.0 if forward else -1.0, halves
        n, self._model_dtype = x.shape[0], model_dtype or x.dtype
        self._time_dtype = F64 if self._model_dtype == F64 else torch.float32
        self._columns = n if pair.control == "sample" else 1
        self._like = (self._columns, *[1] * (x.ndim - 1))
        self.x = torch.clone(x)
        self._next, self._k = torch.empty_like(x), [torch.empty_like(x) for _ in range(5)]
        # By turns into two, so that no pass writes what the network's output may be a view of.
        size = (halves * n, *x.shape[1:])
        self._inputs = [torch.empty(size, dtype=self._model_dtype, device=x.device) for _ in range(2)]
        self._halved, self._turn = [seen.chunk(halves) for seen in self._inputs], 0
        # Times ascend: s = t forward, s = -t backward.
        self.s, self.end, self._proposed, self.h = (
            torch.zeros(self._columns, dtype=F64, device=x.device) for _ in range(4)
        )
        self.accepted = torch.zeros(self._columns, dtype=torch.bool, device=x.device)
        self.flag = torch.zeros(1, dtype=torch.uint8, device=x.device)

    def begin(self, velocity: Velocity) -> None:
        """k_1, and the first step: Hairer's, of |x|, |v| and the change of v over an Euler step."""
        m, m_uncond = self._called(velocity, self._entered(self.x), self.s)
        self._kept(0, m, m_uncond)
        size = self._norm(Out(x=1.0), self.x)
        slope = self._norm(Out(m=1.0), self.x, m=self._k[0])
        h = (0.01 * size / slope).masked_fill((size < 1e-5) | (slope < 1e-5), 1e-6)
        h = torch.minimum(h, self.end - self.s)
        seen = self._written(Out(x=1.0, m=times(self.sign, h)), x=self.x, m=self._k[0])
        m, m_uncond = self._called(velocity, seen, self.s + h)
        change = Out(m=1.0, h=(-1.0,))
        bend = self._norm(change, self.x, m=self._kept(1, m, m_uncond), h=(self._k[0],)) / h
        most = torch.maximum(slope, bend)
        flat = (h * 1e-3).clamp(min=1e-6)
        chosen = torch.where(most <= 1e-15, flat, (0.01 / most) ** (1.0 / self.pair.order))
        self._proposed.copy_(self._rounded(torch.minimum(100.0 * h, chosen)))

    def attempt(self, velocity: Velocity) -> None:
        """One step, accepted or not, of the samples that have not ended; the others stay as they are."""
        pair, k, a = self.pair, self._k, self.tableau.A
        active, last = self.s < self.end, self.s + self._proposed >= self.end
        self.h.copy_(torch.where(last, self.end - self.s, self._proposed).masked_fill(~active, 0.0))
        reached = torch.where(last, self.end, self.s + self.h)
        dt = self.sign * self.h

        m, m_uncond = k[0], None
        for j, weights in enumerate(a):  # the input of call j + 2; the slope before it is kept by the same pass
            older = k[:j]
            out = Out(x=1.0, m=times(weights[j], dt), **_terms([times(w, dt) for w in weights[:j]]))
            seen = self._written(out, keep=k[j] if j else None, x=self.x, m=m, m_uncond=m_uncond, older=older)
            m, m_uncond = self._called(velocity, seen, self.s + self.tableau.NODES[j + 1] * self.h)
        # b_2 = e_2 = 0, so that the error, as far as it is known, has k_2's place.
        used = (0, 2, 3, 4)
        outs = [
            Out(x=x, m=times(w[5], dt), **_terms([times(w[i], dt) for i in used]))
            for x, w in ((1.0, self.tableau.B), (0.0, self.tableau.E))
        ]
        error = k[1]
        self._apply(outs, (self._next, error), x=self.x, m=m, m_uncond=m_uncond, older=[k[i] for i in used])
        m, m_uncond = self._called(velocity, self._entered(self._next), reached)
        if m_uncond is not None:
            m = self._kept(2, m, m_uncond)
        last_term = Out(m=times(self.tableau.E[6], dt), h=(1.0,))
        r = self._norm(last_term, self._next, m=m, h=(error,)).nan_to_num(nan=math.inf, posinf=math.inf)

        torch.logical_and(r <= 1.0, active, out=self.accepted)
        least = torch.full_like(r, SMALLEST).masked_fill(r < 1.0, 1.0)
        factor = (SAFETY * r ** (-1.0 / pair.order)).clamp(max=LARGEST).maximum(least)
        self._proposed.copy_(torch.where(active, self.h * self._rounded(factor), self._proposed))
        stuck = active & ~(reached > self.s)
        self.s.copy_(torch.where(self.accepted, reached, self.s))
        # masked_fill, as torch.where copies a number to the device, and waits.
        self.flag.copy_((self.s >= self.end).all() * ENDED).masked_fill_(stuck.any(), STUCK)
        chosen = self.accepted.reshape(self._like)
        torch.where(chosen, self._next, self.x, out=self.x)
        torch.where(chosen, m.to(self.x.dtype), k[0], out=k[0])

    def aim(self, end: float) -> None:
        """Where the next attempts lead."""
        self.end.fill_(self.sign * end)

    def tensors(self) -> list[Tensor]:
        """All that it writes."""
        numbers = [self.s, self.end, self._proposed, self.h, self.accepted, self.flag]
        return [self.x, self._next, *self._k, *self._inputs, *numbers]

    def _written(
        self, out: Out, keep: Tensor | None = None, *, x: Tensor, m: Tensor, m_uncond: Tensor | None = None,
        older: Sequence[Tensor] = (),
    ) -> Tensor:  # fmt: skip
        """The network's next input from a row, and the slope m, which the same pass keeps where asked for."""
        self._turn ^= 1
        outs, into = [out] * self._halves, list(self._halved[self._turn])
        if keep is not None:
            outs, into = [*outs, Out(m=1.0)], [*into, keep]
        self._apply(outs, into, x=x, m=m, m_uncond=m_uncond, older=older)
        return self._inputs[self._turn]

    def _kept(self, slot: int, m: Tensor, m_uncond: Tensor | None) -> Tensor:
        """The slope m, guided, in memory of its own."""
        row = Row((Out(m=1.0),), guidance=None if m_uncond is None else self.guidance)
        apply_row(row, m=m, m_uncond=m_uncond, out=(self._k[slot],), dtypes=(self.x.dtype,))
        return self._k[slot]

    def _apply(
        self, outs: Sequence[Out], into: Sequence[Tensor], *, x: Tensor, m: Tensor, m_uncond: Tensor | None,
        older: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """A pass over x, the newest slope and up to four older ones, the fourth as the row's z."""
        row = Row(tuple(outs), guidance=None if m_uncond is None else self.guidance)
        noise = older[3] if len(older) > 3 else None
        dtypes = [out.dtype for out in into]
        apply_row(row, x=x, m=m, m_uncond=m_uncond, h=tuple(older[:3]), noise=noise, out=tuple(into), dtypes=dtypes)

    def _entered(self, x: Tensor) -> Tensor:
        """A state as the network's input."""
        if self._halves == 1 and self._model_dtype == x.dtype:
            return x
        self._turn ^= 1
        into = self._halved[self._turn]
        apply_row(Row((Out(x=1.0),) * len(into)), x=x, out=into, dtypes=[out.dtype for out in into])
        return self._inputs[self._turn]

    def _called(self, velocity: Velocity, seen: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        t = (self.sign * s).to(self._time_dtype)
        n = seen.shape[0]
        t = t.expand(n).contiguous() if t.shape[0] == 1 else torch.cat([t] * (n // t.shape[0]))
        m, m_uncond = velocity(seen, t)
        return m.detach(), None if m_uncond is None else m_uncond.detach()

    def _rounded(self, power: Tensor) -> Tensor:
        """A power as the steps take it. torch's pow has other last bits in another batch (a vector's, or its tail's): a
        sample's own steps take 8 bits of it, which differ with a chance of 2^-44."""
        return power if self.pair.control == "batch" else power.to(torch.bfloat16).to(F64)

    def _norm(self, out: Out, x_next: Tensor, m: Tensor | None = None, h: Sequence[Tensor] = ()) -> Tensor:
        """The root of the mean over a sample, or over all, of (e / (atol + rtol max(|x|, |x_next|)))^2, e the row `out`
        of x, m and h.  [columns], float64."""
        outs = (Out(x=out.x, m=out.m, h=(0.0, *out.h)), Out(x=1.0), Out(h=(1.0,)))
        terms, whole = [self.x, m, x_next, *h], self.pair.control == "batch"
        if whole and all(t is None or t.is_contiguous() for t in terms):  # as one long sample: fewer sums
            terms = [t if t is None else t.reshape(1, -1) for t in terms]
        x, m, *given = terms
        sums: Tensor = stat_row(
            Row(outs), x=x, m=m, h=tuple(given), kind="error", rtol=self.pair.rtol, atol=self.pair.atol
        )[:, 0]
        sums = sums.sum(0, keepdim=True) if whole else sums
        return (sums / (self.x.numel() // self._columns)).sqrt()


def _terms(weights: Sequence[Any]) -> dict[str, Any]:
    """The coefficients of up to four older slopes as those of h and z."""
    return {"h": tuple(weights[:3]), **({"z": weights[3]} if len(weights) > 3 else {})}


def velocity_of(task: Run, cond: Mapping[str, Any]) -> Velocity:
    """The network of a run, as a solve asks for it."""

    def velocity(seen: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        m = network.at_most(network.call(task.model, seen, t, cond), task.dtype)
        if task.calls == 1:
            return m, None
        m_uncond, m = m.chunk(2)
        return m, m_uncond

    return velocity
