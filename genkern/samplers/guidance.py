"""Guidance: what a row reads of a network that is called with a condition and without it, or with several.

    one condition       m = m_u + w (m_c - m_u)                                              arXiv:2207.12598
    several             m = m_u + sum_k w_k (m_k - m_u)                                      arXiv:2206.01714
    interval            m = m_c at times outside [lo, hi], where the network sees no other   arXiv:2404.07724
    rescale             m' = (phi std(m_c) / std(m) + 1 - phi) m, std over a sample          arXiv:2305.08891, 3.4
    projected (APG)     m' = m_c + (w - 1) / b (s r - (1 - eta) s k y_c)                     arXiv:2410.02416
        r = b (m_c - m_u) + beta r_before, s = min(1, norm / |r|), k = <r, y_c> / |y_c|^2

where y = a x + b m is the predicted data, so that r is the difference of the predictions, and s r - s k y_c what of it
is perpendicular to the conditional one. The first form is part of the step's own pass; so is the rescaled one, after
a pass for the sums over each sample (stat.py). Several conditions are one pass more for every four of them; APG is two
more, the sums and m'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .. import check
from ..fused import apply_row
from ..reference import stat as reference
from ..rows import Out, Row, times
from ..small import affine
from ..stat import product, stat_row
from . import network

if TYPE_CHECKING:
    from .loop import Run
    from .parameterization import Parameterization
    from .table import Stage

Conditions = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class APG:
    """Adaptive projected guidance: the guidance's part along the predicted data, which saturates, is damped.

    Args:
        eta: weight of the part parallel to the conditional prediction of the data; 1 is plain guidance.
        norm: bound of |r| in every sample, > 0; infinite for none. It grows with the root of a sample's size.
        momentum: beta, of the sum of differences over the guided steps, -1 < beta < 1; the paper's are negative.

    Raises:
        ValueError: a number outside its range. TypeError: no number.

    Source: Sadat, Hilliges, Weber, arXiv:2410.02416, algorithm 1.
    """

    eta: float = 0.0
    norm: float = math.inf
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check.number("eta", self.eta)
        if self.norm != math.inf and not check.number("norm", self.norm) > 0.0:
            raise ValueError(f"norm: expected a number > 0, got {self.norm}")
        if not -1.0 < check.number("momentum", self.momentum) < 1.0:
            raise ValueError(f"momentum: expected a number between -1 and 1, got {self.momentum}")


class GuidanceOptions(TypedDict, total=False):
    """The keyword arguments of every sample() for conditions and guidance.

    cond: keyword arguments of the model; tensors have the batch as dimension 0. Under guidance also a sequence of K
        such mappings, of the same keys: the model then sees (K + 1) B samples in one call, unconditional first.
    uncond: the same for guidance: the empty condition, or a negative one, away from which w > 1 leads.
    guidance_scale: w, a number or a tensor [B]; needs uncond. Of several conditions a sequence of as many.
    guidance_interval: (lo, hi), guide where lo <= t <= hi alone, t the time of the network's call as the family counts
        it (0 .. T-1, [0, 1], or a noise level). Elsewhere the model sees the B samples with cond, and no others.
    guidance_rescale: phi of 0 to 1; 0 is none.
    apg: an APG, the projected form; w is as of plain guidance.
    """

    cond: Conditions | Sequence[Conditions] | None
    uncond: Conditions | None
    guidance_scale: Any
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float
    apg: APG | None


@dataclasses.dataclass(frozen=True)
class Guided:
    """How a run is guided, beside its scales: over `on` of its stages, by `count` conditions."""

    on: tuple[bool, ...]
    count: int
    rescale: float
    apg: APG | None
    explicit: bool  # another form than the first, or asked for: m is made before the step's pass

    @property
    def fused(self) -> bool:
        """Whether the step's own pass guides."""
        return not self.explicit


def checked(
    options: GuidanceOptions, stages: Sequence[Stage], along: Parameterization | None, like: Tensor, explicit: bool
) -> tuple[list[dict[str, Any]], Any, Guided | None]:
    """The conditions (under guidance the unconditional ones first), the scales, and how they guide.

    The scales are a number or a tensor where the step's pass guides; else float64 [K, B] or [K, 1].

    Args:
        options: as GuidanceOptions says.
        like: an empty tensor of shape [B] on the run's device.
        explicit: whether m is asked for before the step's pass.

    Raises:
        ValueError, TypeError: an option is not what it may be, or does not go with another.
    """
    cond: Any = options.get("cond")
    uncond, scale = options.get("uncond"), options.get("guidance_scale")
    interval, rescale, apg = options.get("guidance_interval"), options.get("guidance_rescale", 0.0), options.get("apg")
    several, batch = isinstance(cond, Sequence) and not isinstance(cond, (str, bytes)), like.shape[0]
    if scale is None:
        if uncond is not None:
            raise ValueError("guidance_scale: expected a number or a tensor beside uncond, got None")
        if several and all(isinstance(each, Mapping) for each in cond):
            raise ValueError("guidance_scale: expected a scale for each of the conditions, got None")
        for name, value in (("guidance_interval", interval), ("guidance_rescale", rescale or None), ("apg", apg)):
            if value is not None:
                raise ValueError(f"{name}: expected none without guidance_scale, got {value}")
        return [network.conditions("cond", cond, batch)], None, None
    if uncond is None:
        raise ValueError("uncond: expected the unconditional conditions beside guidance_scale, got None")
    null = network.conditions("uncond", uncond, batch)
    named = [(f"cond[{k}]", each) for k, each in enumerate(cond)] if several else [("cond", cond)]
    if not named:
        raise ValueError("cond: expected at least one condition, got an empty sequence")
    given = [network.conditions(name, each, batch) for name, each in named]
    for each in given:
        network.doubled(null, each)
    if several:
        if interval is not None or rescale or apg is not None:
            raise ValueError(
                "cond: expected one condition beside guidance_interval, guidance_rescale and apg, got a sequence"
            )
        if not isinstance(scale, Sequence) or len(scale) != len(given):
            got = len(scale) if isinstance(scale, Sequence) else type(scale).__name__
            raise ValueError(f"guidance_scale: expected a sequence of {len(given)}, one a condition, got {got}")
        scales = [check.coefficient(f"guidance_scale[{k}]", w, like) for k, w in enumerate(scale)]
    else:
        scales = [check.coefficient("guidance_scale", scale, like)]
    rescale = check.number("guidance_rescale", rescale, 0.0, 1.0)
    if apg is not None:
        _check_apg(apg, rescale, stages, along)
    explicit = explicit or several or apg is not None
    guided = Guided(_within(interval, stages), len(given), rescale, apg, explicit)
    return [null, *given], _matrix(scales, like.device) if explicit else scales[0], guided


def _within(interval: Any, stages: Sequence[Stage]) -> tuple[bool, ...]:
    if interval is None:
        return (True,) * len(stages)
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise ValueError(f"guidance_interval: expected (lo, hi), got {interval!r}")
    lo, hi = (check.number(f"guidance_interval[{k}]", end) for k, end in enumerate(interval))
    if not lo <= hi:
        raise ValueError(f"guidance_interval: expected lo <= hi, got ({lo}, {hi})")
    return tuple(lo <= stage.called_at <= hi for stage in stages)


def _check_apg(apg: Any, rescale: float, stages: Sequence[Stage], along: Parameterization | None) -> None:
    if not isinstance(apg, APG):
        raise TypeError(f"apg: expected a genkern.APG, got {type(apg).__name__}")
    if rescale:
        raise ValueError(f"guidance_rescale: expected 0 beside apg, got {rescale}")
    if along is None:
        raise ValueError("apg: expected None where the sampler's path is not known")
    for stage in stages:
        if along.data(stage.called_at).m == 0.0:
            raise ValueError(
                "apg: expected a sampler all of whose network calls say something of the data, got one that calls it "
                f"at t = {stage.called_at:g}"
            )


def _matrix(scales: Sequence[Any], device: torch.device) -> Tensor:
    """Scales, numbers or [B] or [1], as float64 [K, B] or [K, 1]."""
    rows = [torch.as_tensor(w, dtype=torch.float64, device=device).reshape(-1) for w in scales]
    size = next((row.shape[0] for row in rows if row.shape[0] != 1), 1)
    return torch.stack([row.expand(size) for row in rows])


def of_samples(scales: Any, low: int, high: int) -> Any:
    """The scales of samples low .. high-1."""
    if not isinstance(scales, Tensor) or scales.shape[-1] == 1:
        return scales
    return scales[..., low:high]


class Outputs:
    """What the rows of a part's loop read of the network.

    Args:
        task: the run.
        n: samples of the part.
        like: a state of it.
    """

    def __init__(self, task: Run, n: int, like: Tensor) -> None:
        self._guided, self._n, self._dtype = task.guided, n, task.dtype
        self._differentiable = task.differentiable
        self._read: Tensor | None = None
        self._sum: Tensor | None = None
        apg = None if task.guided is None else task.guided.apg
        if apg is not None:
            assert task.along is not None
            read = [task.along.data(stage.called_at) for stage in task.stages]
            columns = [(a, b, 1.0 / b, -1.0 / b, 1.0) for a, b in read]
            self._read = torch.tensor(columns, dtype=torch.float64, device=task.device)
            self._sum = torch.zeros_like(like) if apg.momentum else None

    def tensors(self) -> list[Tensor]:
        """What it keeps on the device."""
        return [t for t in (self._read, self._sum) if t is not None]

    def begin(self) -> None:
        """Before the first stage."""
        if self._sum is not None:
            self._sum = torch.zeros_like(self._sum) if self._differentiable else self._sum.zero_()

    def __call__(
        self, model: Any, i: int, stage: Any, x: Tensor, seen: Tensor, t: Tensor, cond: Conditions, scales: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A network call: m, of at most the state's precision; m_u where the step's pass guides; and a factor of the
        guided m, float64 [n], where that is rescaled.

        Args:
            model: the network.
            i: a stage that is guided or not as this one is.
            stage: this stage's number, int64 [1] on the device; the projected form alone reads it.
            x, seen: the state [n, ...] and the network's input, for one condition already doubled.
            t, cond: of as many samples as the network sees in a guided call.
            scales: as checked() gives them, of the part.
        """
        guided, n = self._guided, self._n
        if guided is None:
            return network.at_most(network.call(model, seen, t, cond), self._dtype), None, None
        if not guided.on[i]:
            single = network.of_samples(cond, n, 2 * n)
            return network.at_most(network.call(model, seen[n:], t[:n], single), self._dtype), None, None
        if guided.count > 1:
            seen = torch.cat([seen] * (guided.count + 1))
        m_u, *m_k = network.at_most(network.call(model, seen, t, cond), self._dtype).chunk(guided.count + 1)
        if guided.apg is not None:
            return self._projected(guided.apg, stage, x, m_k[0], m_u, scales[0]), None, None
        if guided.count > 1:
            return self._composed(m_k, m_u, scales), None, None
        w = scales if guided.fused else scales[0]
        factor = self._rescaling(m_k[0], m_u, w, guided.rescale) if guided.rescale else None
        if guided.fused:
            return m_k[0], m_u, factor
        row = Row((Out(m=1.0 if factor is None else factor),), guidance=w)
        return apply_row(row, m=m_k[0], m_uncond=m_u, dtypes=(self._dtype,))[0], None, None

    def _composed(self, m_k: Sequence[Tensor], m_u: Tensor, scales: Tensor) -> Tensor:
        """m_u + sum_k w_k (m_k - m_u), four conditions a pass."""
        m, c = m_u, 1.0 - scales.sum(0)
        for low in range(0, len(m_k), 4):
            first, *others = m_k[low : low + 4]
            w, *w_others = scales[low : low + 4].unbind()
            row = Row((Out(x=c if low == 0 else 1.0, m=w, h=tuple(w_others)),))
            (m,) = apply_row(row, x=m, m=first, h=others, dtypes=(self._dtype,))
        return m

    def _rescaling(self, m_c: Tensor, m_u: Tensor, w: Any, phi: float) -> Tensor:
        """phi std(m_c) / std(m) + 1 - phi; 1 where m is constant over a sample, but for rounding.  float64 [n]."""
        row = Row((Out(m=1.0), Out(h=(1.0,))), guidance=w)
        sums = self._moments(row, m=m_c, m_uncond=m_u, h=(m_c,))
        # n times the variances; of the moments the squares are every second from there on.
        squares, size = sums[:, product(2, 0, 0) :: 2], max(math.prod(m_c.shape[1:]), 1)
        spread, wanted = torch.addcmul(squares, sums[:, :2], sums[:, :2], value=-1.0 / size).unbind(1)
        rounding = affine(squares[:, 0], 1e-14, 1e-100)  # a spread no greater is 0 but for it
        ratio = wanted / spread.maximum(rounding)
        # Of 0, where the conditional output is constant, the root has no finite derivative.
        factor = affine(ratio.clamp(min=1e-60).sqrt(), phi, 1.0 - phi)
        return factor.masked_fill_(spread <= rounding, 1.0)

    def _projected(self, apg: APG, stage: Tensor, x: Tensor, m_c: Tensor, m_u: Tensor, w: Tensor) -> Tensor:
        """m' = m_c + c r - (1 - eta) c k y_c,  c = (w - 1) s / b, from the sums of r^2, r y_c and y_c^2."""
        assert self._read is not None
        of_stage = self._read.index_select(0, stage).t()
        a, b, inverse, minus_inverse, one = of_stage.unbind()
        minus_b, before = times(-1.0, b), () if self._sum is None else (self._sum,)
        momentum = (apg.momentum,) if before else ()
        rows = Row((Out(m=b, h=(minus_b, *momentum)), Out(x=a, m=b)))
        sums = self._moments(rows, x=x, m=m_c, h=(m_u, *before))
        r_r, r_y, y_y = sums[:, 2:].unbind(1)
        c = torch.addcmul(minus_inverse, w, inverse)
        if apg.norm != math.inf:
            # min(1, norm / |r|), finite where r is 0; 1e-100 has a square that is a number.
            c = c * (r_r * max(apg.norm, 1e-100) ** -2.0).clamp(min=1.0).rsqrt()
        k = r_y / y_y.clamp(min=1e-200)  # where y is 0, so is r y
        along_a, along_b = (times(apg.eta - 1.0, along) for along in of_stage[:2] * (c * k))
        # m_u + (1 + c b) (m_c - m_u) is m_c + c b (m_c - m_u) without the difference of two large numbers.
        outs = [Out(x=along_a, m=1.0, h=(along_b, *[times(beta, c) for beta in momentum]))]
        h: tuple[Tensor, ...] = (m_c, *before)
        guided = torch.addcmul(one, c, b)
        if before:
            outs.append(Out(h=(b, apg.momentum, minus_b)))
            h = (*h, m_u)
        row = Row(tuple(outs), guidance=guided)
        terms: dict[str, Any] = {"x": x, "m": m_c, "m_uncond": m_u, "h": h}
        if not before or torch.is_grad_enabled():
            m, *r = apply_row(row, dtypes=(self._dtype,) * len(outs), **terms)
            if before:
                self._sum = r[0] if self._differentiable else r[0].detach()
            return m
        (r_before,) = before
        return apply_row(row, out=(torch.empty_like(r_before), r_before), **terms)[0]

    def _moments(self, row: Row, **terms: Any) -> Tensor:
        """stat_row, or, where a gradient is kept (of the loop, or of an energy), the same in plain torch."""
        if not torch.is_grad_enabled():
            return stat_row(row, **terms)
        return reference.moments(apply_row(row, dtypes=(self._dtype,) * len(row.outs), **terms))
