"""What the four losses share: their noise, their times, the network's call, the loss of a residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from .. import check, ops
from ..noise import Noise, Purpose
from ..sample_losses import reduced
from ..samplers import network
from ..samplers.loop import check_source
from ..small import affine
from .times import LossSecondMoment, TimeSampler
from .times import named as times_named

Weight = float | Tensor | Callable[[Tensor], Tensor] | None
Times = str | TimeSampler | Callable[[Tensor], Any] | Tensor | None  # how they are drawn (methods.times), or themselves
Metric = Callable[[Tensor, Tensor], Tensor]  # d(f, target), [B]


class LossOptions(TypedDict, total=False):
    """The keyword arguments of every loss(), and what they mean there.

    noise: a Noise: times and noise are functions of its seed, stream and sample_ids; or the noise itself, [B, ...].
        Default: a seed from torch's CPU generator.
    generator: a torch.Generator that the seed is drawn from.
    weight: of a sample's loss: a number, a tensor [B], or a callable of the times [B] giving one.
    mask: bool or floating, broadcastable to x: elements left out of the loss.
    kind: "l2", "l1" or "pseudo_huber" (ops.path_loss).
    c: of "pseudo_huber", > 0; default 0.00054 sqrt(elements of a sample).
    reduction: "mean", "sum" or "none".
    cond: keyword arguments of the model; tensors have the batch as dimension 0.
    model_dtype: of the network's input; default that of the model's first parameter, else x's.
    """

    noise: Noise | Tensor | None
    generator: torch.Generator | None
    weight: Weight
    mask: Tensor | None
    kind: str
    c: float | None
    reduction: str
    cond: Mapping[str, Any] | None
    model_dtype: torch.dtype | None


class Batch:
    """A training batch: data, where its random numbers come from, and the call of a network on it.

    Everything that the caller gave is checked before a seed is drawn, at the first use of a random number.
    """

    purpose = Purpose.TRAINING  # of the data's noise

    def __init__(self, model: Any, x: Tensor, options: Mapping[str, Any]) -> None:
        unknown = options.keys() - LossOptions.__annotations__.keys()
        if unknown:
            raise TypeError(f"loss() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch tensor, got {type(x).__name__}")
        check.terms([("x", x)])
        given, self._generator = options.get("noise"), options.get("generator")
        self._noise: Noise | Tensor | None = given
        self._source = given if isinstance(given, Noise) else None
        if isinstance(given, Tensor):
            check.terms([("x", x), ("noise", given)])
        elif given is not None and self._source is None:
            raise TypeError(f"noise: expected a Noise or a tensor, got {type(given).__name__}")
        check_source(None, self._source, self._generator)
        self.model, self.size, self.device = model, x.shape[0], x.device
        self.cond = network.conditions("cond", options.get("cond"), self.size)
        dtype = options.get("model_dtype")
        self.model_dtype = network.dtype_of(model, x.dtype) if dtype is None else network.checked_dtype(dtype)
        kind, c = check.choice("kind", options.get("kind", "l2"), ops.LOSSES), options.get("c")
        if c is not None and kind != "pseudo_huber":
            raise ValueError(f"c: expected None with kind={kind!r}, got {c}")
        if c is not None and not check.number("c", c) > 0.0:
            raise ValueError(f"c: expected a number > 0, got {c}")
        check.choice("reduction", options.get("reduction", "mean"), ops.REDUCTIONS)
        mask, weight = options.get("mask"), options.get("weight")
        if mask is not None:
            check.mask(mask, x)
        if weight is not None and not callable(weight):
            check.coefficient("weight", weight, x)
        # Terms of a row have at most the state's precision, and the network's output is one of them.
        wide = self.model_dtype.itemsize > x.dtype.itemsize
        self.x = x.to(self.model_dtype) if wide else x
        self._options = options
        self._times_weight: Tensor | None = None

    @property
    def coef_dtype(self) -> torch.dtype:
        """Of tables and times: float64 for float64 data, else float32."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def source(self) -> Noise:
        """The Noise of the times, and of z where that is not given; drawn when first asked for."""
        if self._source is None:
            self._source = Noise.fresh(self._generator)
        return self._source

    @property
    def z(self) -> Noise | Tensor:
        """The noise of the data: given, or named."""
        return self._noise if isinstance(self._noise, Tensor) else self.source.at(self.purpose)

    def uniform(self, k: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """One number in (0, 1) a sample, [B], each by itself; k: of several. dtype: default coef_dtype."""
        return self._numbers(ops.uniform, k, dtype)

    def drawn(self, sampler: TimeSampler) -> Tensor:
        """t = F^{-1}(u) in [0, 1], [B], as the sampler of times and its distribution have them; float64 where there is
        a distribution. Its weights, where it has some, are kept for loss()."""
        of = getattr(sampler, "of", None)
        dtype = self.coef_dtype if of is None else torch.float64
        u = sampler.uniforms(self.source, self.size, self.device, dtype)
        if of is None:
            return u
        found = of(u)
        if isinstance(found, tuple) and len(found) == 2:
            found, weight = found
            self._times_weight = self.given_time("times", weight, -math.inf, math.inf)
        if not isinstance(found, Tensor) or found.shape != (self.size,):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"times: expected a tensor of shape ({self.size},) from the callable, got {got}")
        checked: Tensor = check.coefficient("times", found, self.x, 0.0, 1.0)
        return checked

    def normal(self, k: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """One standard normal number a sample, [B]; k: of several. dtype: default coef_dtype."""
        return self._numbers(ops.randn, k, dtype)

    def _numbers(self, draw: Callable[..., Tensor], k: int, dtype: torch.dtype | None) -> Tensor:
        dtype = self.coef_dtype if dtype is None else dtype
        return draw((self.size,), noise=self.source.at(Purpose.TIMES, k), device=self.device, dtype=dtype)

    def lognormal(self, mean: float, std: float, dtype: torch.dtype | None = None) -> Tensor:
        """exp(n), n ~ N(mean, std^2), one a sample, [B]. dtype: default coef_dtype."""
        return affine(self.normal(dtype=dtype), std, mean).exp()

    def index(self, count: int) -> Tensor:
        """One integer of 0 .. count-1 a sample, uniform, int64 [B]."""
        return self.index_at(self.uniform(), count)

    @staticmethod
    def index_at(u: Tensor, count: int) -> Tensor:
        """floor(u count), int64 [B], at numbers u in (0, 1)."""
        return (u * count).long().clamp_(max=count - 1)  # the product may be rounded to count

    def given_index(self, name: str, value: Any, count: int) -> Tensor:
        """Integers of 0 .. count-1 given by the caller, as int64 [B]."""
        if not isinstance(value, Tensor):
            return torch.full((self.size,), check.integer(name, value, 0, count - 1), device=self.device)
        check.indices(name, value, count, self.size)
        return value.to(self.device)

    def given_time(self, name: str, value: Any, low: float, high: float) -> Tensor:
        """Times given by the caller, as [B]."""
        found = check.coefficient(name, value, self.x, low, high)
        if isinstance(found, float):
            return torch.full((self.size,), found, device=self.device, dtype=self.coef_dtype)
        return found.to(self.coef_dtype).expand(self.size).contiguous()

    def times(self, t: Any, times: Times) -> Tensor:
        """The times of loss(t=, times=) in [0, 1], [B]: given as either, or drawn; uniform without both."""
        if t is not None and times is not None:
            raise ValueError("times: expected None beside t")
        if t is not None:
            return self.given_time("t", t, 0.0, 1.0)
        if not (times is None or isinstance(times, str) or callable(times) or hasattr(times, "uniforms")):
            return self.given_time("times", times, 0.0, 1.0)
        sampler = times_named(times)
        if isinstance(sampler, LossSecondMoment):
            raise ValueError(
                f"times: expected another in a flow, got LossSecondMoment({sampler.timesteps}), which draws the "
                "timesteps of Diffusion"
            )
        return self.drawn(sampler).to(self.coef_dtype)

    def coupled(self, x0: Tensor | None, coupling: Any) -> Noise | Tensor:
        """The sources of the data, x0 or the noise, in the order of a coupling (flows.couplings); without one as they
        are, and noise that is named stays so."""
        given = self.z if x0 is None else x0
        if coupling is None:
            return given
        sources = getattr(coupling, "sources", None)
        if sources is None and not callable(coupling):
            raise TypeError(f"coupling: expected a callable, got {type(coupling).__name__}")
        if isinstance(given, Noise):
            given = ops.randn(tuple(self.x.shape), noise=given, device=self.device, dtype=self.x.dtype)
        chance = self.source.at(Purpose.TIMES, 2)  # beside those of the times
        u = ops.uniform((self.size,), noise=chance, device=self.device, dtype=torch.float64)
        if sources is not None:
            found: Tensor = sources(given, self.x, self.cond, u)
            check.terms([("x", self.x), ("coupling", found)])
            return found
        with torch.no_grad():
            index = coupling(given, self.x, self.cond, u)
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != (self.size,):
            got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f"coupling: expected an index of int64 and shape ({self.size},), got {got}")
        check.indices("coupling", index, self.size, self.size)
        return given.index_select(0, index)

    def call(
        self, x: Tensor, t: Tensor, model: Any = None, name: str = "model", given: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The network, or another, at (x, t); given: further keyword arguments, or others in place of cond's."""
        cond = self.cond if given is None else {**self.cond, **given}
        found = network.call(self.model if model is None else model, x, t, cond, name)
        return network.at_most(found, self.x.dtype)

    def loss(
        self, m: Tensor, x: Tensor | None, times: Tensor, *, factor: Tensor | None = None,
        importance: Tensor | None = None, record: Callable[[Tensor, Tensor], object] | None = None,
        added: Tensor | None = None, default: Tensor | None = None, **target: Any,
    ) -> Tensor:  # fmt: skip
        """ops.path_loss under the caller's options.

        Args:
            default: the weight where the caller gives none.  [B].
            factor: of the samples' losses, beside the caller's weight.  [B].
            importance: weights of how the times were drawn.  [B].
            record: given the times and the losses without those weights.
            added: to the samples' losses, under the caller's weight alone.  [B].
        """
        options = self._options
        weight, reduction = self._weight(times, default), options.get("reduction", "mean")
        own = [of for of in (weight, self._times_weight) if of is not None]
        if factor is not None:
            weight = factor if weight is None else factor * check.coefficient("weight", weight, m)
        if self._times_weight is not None:
            drawn = self._times_weight.to(self.coef_dtype)
            weight = drawn if weight is None else drawn * weight
        found = ops.path_loss(
            m, x, **target, weight=weight, mask=options.get("mask"),
            kind=options.get("kind", "l2"), c=options.get("c"),
            reduction=reduction if importance is None and added is None else "none",
        )  # fmt: skip
        if importance is None and added is None:
            return found
        if added is not None:
            for of in own:
                added = added * check.coefficient("weight", of, m)
            found = found + added.to(found.dtype)
        if record is not None:
            record(times, found.detach())
        if importance is not None:
            found = found * importance
        losses: Tensor = reduced(found, reduction)
        return losses

    def squared(self, mask: bool = True) -> None:
        """The loss has its own distance. ValueError: kind or c of the caller, or a mask where it may not have one."""
        for name in ("kind", "c") if mask else ("kind", "c", "mask"):
            if self._options.get(name) is not None:
                raise ValueError(f"{name}: expected None, as this loss is of squares, got {name}")

    def measurable(self, metric: Metric | None) -> None:
        """A metric in place of `kind`. TypeError: not callable. ValueError: kind or mask beside it."""
        if metric is None:
            return
        if not callable(metric):
            raise TypeError(f"metric: expected a callable of (f, target), got {type(metric).__name__}")
        for name in ("kind", "mask"):
            if self._options.get(name) is not None:
                raise ValueError(f"{name}: expected None beside a metric, got {name} and metric")

    def measured(
        self, metric: Metric, f: Tensor, target: Tensor, times: Tensor, *, default: Tensor | None = None
    ) -> Tensor:
        """metric(f, target), weighted and reduced under the caller's options; default as in loss()."""
        found = metric(f, target)
        if not isinstance(found, Tensor):
            raise TypeError(f"metric: expected a tensor [{self.size}], got {type(found).__name__}")
        if found.ndim == 0 or found.shape[0] != self.size or found.numel() != self.size:
            raise ValueError(f"metric: expected shape ({self.size},), one a sample, got {tuple(found.shape)}")
        return self.weighed(found.reshape(self.size).to(self.coef_dtype), times, default)

    def mean_squares(self, m: Tensor, **target: Any) -> Tensor:
        """The mean square of ops.path_loss's residual over a sample, under the caller's mask.  [B]."""
        found: Tensor = ops.path_loss(m, **target, mask=self._options.get("mask"), reduction="none")
        return found

    def weighed(self, found: Tensor, times: Tensor, default: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """Losses of the samples, [B], weighted and reduced under the caller's options, times a number; default as in
        loss()."""
        weight = self._weight(times, default)
        if weight is not None:
            weight = check.coefficient("weight", weight, found)
            if isinstance(weight, float):
                scale *= weight
            else:
                found = found * weight.to(found.dtype)
        found = reduced(found, self._options.get("reduction", "mean"))
        return found if scale == 1.0 else found * scale

    def _weight(self, times: Tensor, default: Tensor | None) -> float | Tensor | None:
        """The caller's weight at these times, else the default."""
        weight = self._options.get("weight")
        if callable(weight):
            weight = weight(times.to(self.coef_dtype))
            if weight is None:
                raise TypeError("weight: expected a number or a tensor [B] from the callable, got None")
        return default if weight is None else weight
