"""A learned range of variances: a network with doubled channels, whose second half v says how noisy a step is.

    log variance of p(x_s | x_t) = (1 + v) / 2 log beta + (1 - v) / 2 log beta~       elementwise, v about [-1, 1]

between the posterior's, beta~ = (the DDPM's sigma_t)^2, and the chain's, beta = 1 - alpha_t^2 / alpha_s^2
("fixed_small" and "fixed_large", samplers/ddpm.py). At t = 0, where beta~ is 0, that of t = 1 takes its place, as
sigma_1 of (13.10). v is trained by the variational objective, in nats, with the predicted data held fixed, beside the
loss (13.5) of the prediction:

    L = L_gamma + lambda T L_t,    lambda = 0.001,    L_t = KL(q(x_s | x_t, x), p(x_s | x_t)), mean of elements,
    KL = (l_p - l_q + e^{l_q - l_p} - 1 + c^2 (x - f)^2 e^{-l_p}) / 2,    and at t = 0  -log N(x; f, e^{l_p})

l the logarithms of the variances, c the weight of the data in (13.7). A step's noise, scaled by the standard deviation
exp((log beta~ + log beta) / 4 + v (log beta - log beta~) / 4), is drawn in the step's pass, which reads v where the
network has left it (rows.Elementwise). Nichol, Dhariwal, arXiv:2102.09672, section 3.1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import check, paths
from ..fused import apply_row
from ..kept import constant, kept
from ..rows import Out, Row
from ..samplers import network
from ..samplers.nonmarkovian import backward, ddpm_std
from ..samplers.table import Stage

LAMBDA = 1e-3


class Halved(network.Wrapped):
    """A network of doubled channels as one of the prediction alone. Of its last call it keeps the input x, the
    prediction m and the second half v."""

    x: Tensor
    m: Tensor
    v: Tensor

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        out = self.model(x, t, **cond)
        if not isinstance(out, Tensor):
            out = out[0] if isinstance(out, tuple) and out else getattr(out, "sample", out)
        wanted = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if x.ndim > 1 else None
        if not isinstance(out, Tensor) or wanted is None or tuple(out.shape) != wanted:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"model: expected output of shape {wanted}, channels doubled (variance='learned_range'), got {got}"
            )
        self.x, (self.m, self.v) = x, out.chunk(2, dim=1)
        return self.m


def ranges(path: paths.DiscreteVP, t: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log beta~ and log beta of steps from t to s, float64; of the step to clean data beta~ of t = 1, or beta. A step
    whose beta is 0, to an alpha_0 that is alpha_1, is taken for that to clean data."""
    alpha_t, sigma_t, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
    small, large = ddpm_std(alpha_t, sigma_t, alpha_s, sigma_s) ** 2, 1.0 - (alpha_t / alpha_s) ** 2
    large = np.where(large > 0.0, large, sigma_t**2)
    first = path.posterior_variance(np.array([1]))[0] if path.timesteps > 1 else large
    small = np.where(small > 0.0, small, first)
    return np.log(small), np.log(large)


class Range:
    """The terms of the variational objective by timestep, for networks of doubled channels."""

    def __init__(self, path: paths.DiscreteVP, prediction: str) -> None:
        self.path, self.prediction = path, prediction
        t = np.arange(path.timesteps)
        scales = path.alpha(t), path.sigma(t), path.alpha(t - 1), path.sigma(t - 1)
        std = ddpm_std(*scales)
        std[0] = 0.0
        weight = backward(*scales, std).y
        low, high = ranges(path, t, t - 1)
        a, b = path.data(prediction, t)
        self._table = np.stack([weight, low, high, np.broadcast_to(a, t.shape), np.broadcast_to(b, t.shape)])
        self._tables: dict[Any, Any] = {}

    @constant
    def _on(self, device: Any, dtype: torch.dtype) -> Tensor:
        """c, log beta~, log beta, and the data's a and b of every t, [5, T], on a device, kept there."""

        def make() -> Tensor:
            return torch.as_tensor(self._table, dtype=dtype).to(device)

        found: Tensor = kept(self._tables, (torch.device(device), dtype), make)
        return found

    def terms(self, halved: Halved, x: Tensor, t: Tensor, *, hold: bool) -> Tensor:
        """KL at times t, at t = 0 -log N(x; f, e^{l_p}), in nats, elementwise, of the network's last call.  [B, ...].

        Args:
            hold: the predicted data f and x are held fixed: the gradient is that of v alone.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        table = self._on(x.device, dtype).index_select(1, t)
        a, b = table[3:].unbind()
        with torch.no_grad() if hold else contextlib.nullcontext():
            x_t, m, data = ((of.detach() if hold else of).to(dtype) for of in (halved.x, halved.m, x))
            (error,) = apply_row(Row((Out(x=a, m=b, h=(-1.0,)),)), x=x_t, m=m, h=(data,))
        wide = (slice(None), *[None] * (x.ndim - 1))
        c, low, high = (of[wide] for of in table[:3].unbind())
        log_p = (low + high + halved.v.to(dtype) * (high - low)) * 0.5
        inverse = (-log_p).exp()
        divergence = 0.5 * (log_p - low + (low - log_p).exp() - 1.0 + (c * error).square() * inverse)
        density = 0.5 * (math.log(2.0 * math.pi) + log_p + error.square() * inverse)
        return torch.where((t == 0)[wide], density, divergence)

    def hybrid(self, halved: Halved, x: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        """lambda T L_t of every sample, [B], of the network's last call."""
        each = self.terms(halved, x, t, hold=True).flatten(1)
        if mask is None:
            mean = each.mean(dim=1)
        else:
            w = check.mask(mask, x).to(each.dtype).flatten(1)
            mean = (each * w).sum(dim=1) / w.sum(dim=1).clamp(min=torch.finfo(each.dtype).tiny)
        return LAMBDA * self.path.timesteps * mean


def sampling(
    model: Any, stages: Sequence[Stage], path: paths.DiscreteVP, grid: np.ndarray, options: dict[str, Any], *,
    learned: bool,
) -> tuple[Halved, Sequence[Stage], dict[str, Any]]:  # fmt: skip
    """What the loop runs in place of a model of doubled channels.

    Args:
        learned: with the learned variance, the stages being DDPM's; else the prediction alone is used.

    Raises:
        ValueError: with it, a guide, or several conditions.
    """
    halved, options = Halved(model), dict(options)
    if options.get("model_dtype") is None:
        options["model_dtype"] = network.dtype_of(model, options.get("dtype", torch.float32))
    start = next((options[k] for k in ("start", "init", "noise") if isinstance(options.get(k), Tensor)), None)
    if options.get("device") is None:
        options["device"] = network.device_of(model) if start is None else start.device
    if not learned:
        return halved, stages, options
    if options.get("guide") is not None:
        raise ValueError(f"guide: expected None with a learned variance, got {options['guide']}")
    if isinstance(options.get("cond"), (list, tuple)):
        raise ValueError(f"cond: expected one condition with a learned variance, got {len(options['cond'])}")
    low, high = ranges(path, grid[:-1], grid[1:])
    plain = (path.sigma(grid[1:]) == 0.0) | (path.alpha(grid[:-1]) == path.alpha(grid[1:]))  # no noise to scale
    changed = [
        stage if end else dataclasses.replace(stage, out=dataclasses.replace(stage.out, z=1.0), log_scale=scale)
        for stage, end, scale in zip(stages, plain, zip(*log_scales(low, high), strict=True), strict=True)
    ]
    return halved, changed, options


def log_scales(low: np.ndarray, high: np.ndarray) -> tuple[list[float], list[float]]:
    """l0 and l1 of the standard deviation exp(l0 + l1 v), of log beta~ and log beta."""
    return (0.25 * (high + low)).tolist(), (0.25 * (high - low)).tolist()
