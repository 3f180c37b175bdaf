"""What the four losses share: their noise, their times, the network's call, the loss of a residual."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from .. import check, ops
from ..noise import Noise, Purpose
from ..samplers import network
from ..samplers.loop import check_source
from .times import TimeSampler, Uniform

Weight = float | Tensor | Callable[[Tensor], Tensor] | None
Times = Tensor | Callable[[Tensor], Any] | None  # uniforms [B] to times [B], or to (times, weights)


class LossOptions(TypedDict, total=False):
    """The keyword arguments of every loss(), and what they mean there.

    noise: a Noise: times and noise are functions of its seed, stream and sample_ids; or the noise itself, [B, ...].
        Default: a seed from torch's CPU generator.
    generator: a torch.Generator that the seed is drawn from.
    weight: of a sample's loss: a number, a tensor [B], or a callable of the times [B] giving one.
    mask: bool or floating, broadcastable to x: elements left out of the loss.
    kind: "l2", "l1" or "pseudo_huber" (ops.path_loss).
    reduction: "mean", "sum" or "none".
    cond: keyword arguments of the model; tensors have the batch as dimension 0.
    model_dtype: of the network's input; default that of the model's first parameter, else x's.
    """

    noise: Noise | Tensor | None
    generator: torch.Generator | None
    weight: Weight
    mask: Tensor | None
    kind: str
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
        check.choice("kind", options.get("kind", "l2"), ops.LOSSES)
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

    def uniform(self, sampler: TimeSampler | None = None) -> Tensor:
        """One number in (0, 1) a sample, [B], as the sampler of times has it; default each by itself."""
        return (Uniform() if sampler is None else sampler).uniforms(
            self.source, self.size, self.device, self.coef_dtype
        )

    def normal(self) -> Tensor:
        """One standard normal number a sample, [B]."""
        return ops.randn((self.size,), noise=self.source.at(Purpose.TIMES), device=self.device, dtype=self.coef_dtype)

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

    def times(self, t: Any, times: Times, low: float, high: float) -> Tensor:
        """The times of loss(t=, times=), [B]: given, or drawn by a callable of uniforms, which may weigh them; uniform
        without either, low and high being 0 and 1."""
        if t is not None and times is not None:
            raise ValueError("times: expected None beside t")
        if t is not None:
            return self.given_time("t", t, low, high)
        if times is None:
            return self.uniform()
        if not callable(times):
            return self.given_time("times", times, low, high)
        noise = self.source.at(Purpose.TIMES)
        found = times(ops.uniform((self.size,), noise=noise, device=self.device, dtype=torch.float64))
        if isinstance(found, tuple) and len(found) == 2:
            found, self._times_weight = found
            check.coefficient("times", self._times_weight, self.x)
        if not isinstance(found, Tensor) or found.shape != (self.size,):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"times: expected a tensor of shape ({self.size},) from the callable, got {got}")
        return self.given_time("times", found, low, high)

    def coupled(self, x0: Tensor | None, coupling: Any) -> Noise | Tensor:
        """The sources of the data, x0 or the noise, in the order of a coupling (flows.couplings); without one as they
        are, and noise that is named stays so."""
        given = self.z if x0 is None else x0
        if coupling is None:
            return given
        if not callable(coupling):
            raise TypeError(f"coupling: expected a callable, got {type(coupling).__name__}")
        if isinstance(given, Noise):
            given = ops.randn(tuple(self.x.shape), noise=given, device=self.device, dtype=self.x.dtype)
        chance = self.source.at(Purpose.TIMES, 2)  # beside those of the times
        u = ops.uniform((self.size,), noise=chance, device=self.device, dtype=torch.float64)
        with torch.no_grad():
            index = coupling(given, self.x, self.cond, u)
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.shape != (self.size,):
            got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f"coupling: expected an index of int64 and shape ({self.size},), got {got}")
        return given.index_select(0, index)

    def call(self, x: Tensor, t: Tensor, model: Any = None, name: str = "model") -> Tensor:
        """The network, or another, at (x, t)."""
        found = network.call(self.model if model is None else model, x, t, self.cond, name)
        return network.at_most(found, self.x.dtype)

    def loss(
        self, m: Tensor, x: Tensor | None, times: Tensor, *, factor: Tensor | None = None,
        importance: Tensor | None = None, record: Callable[[Tensor, Tensor], object] | None = None,
        added: Tensor | None = None, **target: Any,
    ) -> Tensor:  # fmt: skip
        """ops.path_loss under the caller's options.

        Args:
            factor: of the samples' losses, beside the caller's weight.  [B].
            importance: weights of how the times were drawn.  [B].
            record: given the times and the losses without those weights.
            added: to the samples' losses, under the caller's weight alone.  [B].
        """
        options = self._options
        weight, reduction = options.get("weight"), options.get("reduction", "mean")
        if callable(weight):
            weight = weight(times)
            if weight is None:
                raise TypeError("weight: expected a number or a tensor [B] from the callable, got None")
        own = [of for of in (weight, self._times_weight) if of is not None]
        if factor is not None:
            weight = factor if weight is None else factor * check.coefficient("weight", weight, m)
        if self._times_weight is not None:
            drawn = self._times_weight.to(self.coef_dtype)
            weight = drawn if weight is None else drawn * weight
        found = ops.path_loss(
            m, x, **target, weight=weight, mask=options.get("mask"),
            kind=options.get("kind", "l2"), reduction=reduction if importance is None and added is None else "none",
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
        if reduction == "none":
            return found
        return found.sum() / max(self.size, 1) if reduction == "mean" else found.sum()
