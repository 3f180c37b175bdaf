"""What log_prob() and sample_with_log_prob() of a flow share: their options, checked, and the walk of each part."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from .. import check
from ..flows import divergence as divergences
from ..noise import Noise
from ..samplers import Stage, density, loop, network

DIVERGENCES = ("exact", "hutchinson")


class DensityOptions(TypedDict, total=False):
    """The keyword arguments of log_prob() and sample_with_log_prob(), and what they mean there.

    divergence: "exact" (default; D vector-Jacobian products a network call, D the elements of a sample) or
        "hutchinson", an unbiased estimate.
    probes: of "hutchinson", how many; default 1. They are the same along a trajectory.
    probe: "rademacher" (default) or "gaussian".
    chunk: of "exact", unit vectors at once; default 32.
    source_log_prob: callable of x [B, ...] giving log p_0 [B]; default that of N(0, sigma(0)^2 I).
    differentiable: keep the gradient, of the model's parameters and of what is given.
    seed, noise, generator, cond, uncond, guidance_scale, dtype, model_dtype, batch_size: as samplers.Options.
    """

    divergence: str
    probes: int
    probe: str
    chunk: int
    source_log_prob: Callable[[Tensor], Tensor] | None
    differentiable: bool
    seed: int | None
    noise: Noise | None
    generator: torch.Generator | None
    cond: Mapping[str, Any] | None
    uncond: Mapping[str, Any] | None
    guidance_scale: Any
    dtype: torch.dtype
    model_dtype: torch.dtype | None
    batch_size: int | None


class DensityRun:
    """The options of a call on a state of this shape, checked before a seed is drawn."""

    def __init__(
        self, name: str, model: Any, shape: Sequence[int], device: torch.device, options: Mapping[str, Any]
    ) -> None:
        unknown = options.keys() - DensityOptions.__annotations__.keys()
        if unknown:
            raise TypeError(f"{name}() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        self.model, self.shape, self.device = model, check.shape(shape), device
        self.dtype = options.get("dtype", torch.float32)
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: expected torch.float32 or torch.float64 for the state, got {self.dtype}")
        dtype = options.get("model_dtype")
        self.model_dtype = network.dtype_of(model, self.dtype) if dtype is None else network.checked_dtype(dtype)
        self._exact = check.choice("divergence", options.get("divergence", "exact"), DIVERGENCES) == "exact"
        if self._exact and ("probes" in options or "probe" in options):
            raise ValueError("probes, probe: expected none with divergence='exact'")
        if not self._exact and "chunk" in options:
            raise ValueError("chunk: expected none with divergence='hutchinson'")
        self._chunk = check.integer("chunk", options.get("chunk", 32), 1)
        self._probes = check.integer("probes", options.get("probes", 1), 1)
        self._probe = check.choice("probe", options.get("probe", "rademacher"), divergences.PROBES)
        self._source: Any = options.get("source_log_prob")
        if self._source is not None and not callable(self._source):
            raise TypeError(f"source_log_prob: expected a callable, got {type(self._source).__name__}")
        self.differentiable = bool(options.get("differentiable", False))
        batch, size = options.get("batch_size"), self.shape[0]
        self._batch = max(size, 1) if batch is None else check.integer("batch_size", batch, 1)
        self._cond, self._guidance = network.conditions("cond", options.get("cond"), size), None
        self._uncond: dict[str, Any] | None = None
        scale, uncond = options.get("guidance_scale"), options.get("uncond")
        if (scale is None) is not (uncond is None):
            raise ValueError("guidance_scale, uncond: expected both or neither, got one of them")
        if scale is not None:
            self._uncond = network.conditions("uncond", uncond, size)
            network.doubled(self._uncond, self._cond)
            self._guidance = check.coefficient("guidance_scale", scale, torch.empty(size, device=device))
        noise = options.get("noise")
        if noise is not None and not isinstance(noise, Noise):
            raise TypeError(f"noise: expected a Noise, got {type(noise).__name__}")
        if noise is not None and noise.sample_ids is not None:
            noise = noise.of_samples(check.sample_ids(noise.sample_ids, size, False, device))
        self.noise = loop.resolve_noise(options.get("seed"), noise, options.get("generator"))

    def solve(self, along: Sequence[Stage] | density.Chosen, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last state, and the integral of the divergence."""
        if not isinstance(along, density.Chosen):
            density.check_stages(along)
        elif self.differentiable:
            raise ValueError("differentiable: expected False with a sampler that chooses its steps, got True")
        if not self.shape[0]:
            return x, x.new_zeros(0)
        bounds = [(low, min(low + self._batch, self.shape[0])) for low in range(0, self.shape[0], self._batch)]
        # A divergence needs autograd, which inference mode would leave out without a word.
        with torch.inference_mode(False), contextlib.nullcontext() if self.differentiable else torch.no_grad():
            x = x.clone() if x.is_inference() else x
            parts = [self._part(along, x, low, high) for low, high in bounds]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _part(self, along: Sequence[Stage] | density.Chosen, x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        cond, guidance = network.of_samples(self._cond, low, high), self._guidance
        if self._uncond is not None:
            cond = network.doubled(network.of_samples(self._uncond, low, high), cond)
            guidance = guidance[low:high] if isinstance(guidance, Tensor) and guidance.shape[0] > 1 else guidance
        walk: Any = density.solve if isinstance(along, density.Chosen) else density.walk
        found: tuple[Tensor, Tensor] = walk(
            self.model, along, x[low:high], self._divergence(low, high), cond=cond, guidance=guidance,
            model_dtype=self.model_dtype,
        )  # fmt: skip
        return found

    def _divergence(self, low: int, high: int) -> density.Divergence:
        if self._exact:
            return divergences.Exact(self._chunk, self.differentiable)
        ids = self.noise.sample_ids
        ids = torch.arange(low, high, device=self.device) if ids is None else ids[low:high]
        z = divergences.draw(
            (high - low, *self.shape[1:]), self._probes, self._probe, noise=self.noise.of_samples(ids),
            device=self.device, dtype=self.dtype,
        )  # fmt: skip
        return divergences.Hutchinson(z, self.differentiable)

    def source(self, x: Tensor, sigma: float) -> Tensor:
        """log p_0(x), [B], of x's dtype."""
        if self._source is None:
            return log_normal(x, sigma)
        with contextlib.nullcontext() if self.differentiable else torch.no_grad():
            found = self._source(x)
        if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"source_log_prob: expected a tensor of shape ({x.shape[0]},), got {got}")
        return found.to(x.dtype)


def log_normal(x: Tensor, sigma: float) -> Tensor:
    """log N(x; 0, sigma^2 I) of every sample, summed in float64.  [B], x's dtype."""
    dims = math.prod(x.shape[1:])
    square = x.double().reshape(x.shape[0], dims).square().sum(1)
    return (-0.5 * square / sigma**2 - dims * (0.5 * math.log(2.0 * math.pi) + math.log(sigma))).to(x.dtype)
