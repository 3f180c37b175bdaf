"""Stochastic steps with their log-density, in two modes, as reinforcement learning of samplers needs them.

    x_s = mu + s z,      log p(x_s | x_t) = -|r|^2 / 2 - n log(s sqrt(2 pi)),      r = (x_s - mu) / s

with n the elements of a sample. Without x_s a step samples: it returns x_s and log p. Given x_s it scores: it returns
the same x_s and log p, differentiable in the network's output. Both take r from the stored x_s in one reduce pass whose
sums have a fixed order in every sample, so that a sample scored again by the same numbers has the same bits, in any
batch: a ratio of probabilities starts at exactly 1. x_s itself is held constant in log p, in both modes.

Black et al., arXiv:2305.13301 (DDPO); Liu et al., arXiv:2505.05470 (Flow-GRPO).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import check, ops
from .ddim import PREDICTIONS, coefficients
from .fused import apply_row, reduce_row
from .noise import Noise
from .rows import Out, Row
from .threshold import DynamicThreshold

Coef = Any  # a number, or a tensor of shape [B] or of one element

REDUCTIONS = ("sum", "mean")
_PATH = ("alpha_t", "sigma_t", "alpha_s", "sigma_s", "eta")
_NAMES = ("x_t", "model_output", "uncond", "noise")


def ddim(
    x_t: Tensor, model_output: Tensor, alpha_t: Coef, sigma_t: Coef, alpha_s: Coef, sigma_s: Coef, *, eta: Coef = 1.0,
    x_s: Tensor | None = None, noise: Noise | Tensor | None = None, prediction: str = "epsilon", clip: Any = None,
    uncond: Tensor | None = None, guidance_scale: Coef | None = None, reduction: str = "sum",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A step of DDIM or DDPM from t to s, as ops.ddim_step, and its log-density:

        mu = alpha_s y + sqrt(sigma_s^2 - d^2) epsilon
        s  = d = eta (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2)

    Args:
        x_t: state at t.  [B, ...].
        model_output: the network's output at t.  [B, ...], of x_t's dtype or a lower precision.
        alpha_t, sigma_t, alpha_s, sigma_s: scales of the path at t and s.  float, or [B].
        eta: > 0; 1 has the DDPM's posterior variance.  float, or [B].
        x_s: the state at s to score.  [B, ...], x_t's dtype; None: sample it.
        noise: of the sampling mode: a Noise, a tensor, or None: a fresh Noise.
        prediction, clip, uncond, guidance_scale: as of ops.ddim_step; the prediction also "score".
        reduction: "sum", or "mean": log p / n.

    Returns:
        (x_s, log p): [B, ...] and [B], float32 (float64 for float64). log p is differentiable (once) in x_t,
        model_output, uncond and the coefficients, not in x_s.

    Raises:
        ValueError: as ops.ddim_step; a step without noise, which has no density; noise beside x_s.
        TypeError: no torch tensors; an x_s of another dtype than x_t's.

    Source: (13.13); arXiv:2305.13301.
    """
    _check(x_t, model_output, x_s, noise, reduction)
    check.choice("prediction", prediction, PREDICTIONS)
    values = (alpha_t, sigma_t, alpha_s, sigma_s, eta)
    path = [check.coefficient(name, value, x_t, 0.0) for name, value in zip(_PATH, values, strict=True)]
    threshold = clip if isinstance(clip, DynamicThreshold) else None
    limits = None if threshold is not None else check.clip_range(clip)
    guidance = ops._guidance(uncond, guidance_scale, x_t)
    use_pred = limits is not None or threshold is not None
    a, b, y, x, m, d = coefficients(prediction, path, use_pred)
    _check_std("eta", "expected > 0 on a step toward the data that leaves noise", d)
    pred = (a, b) if limits is not None else None
    h: tuple[Any, ...] = ()
    c_h: tuple[Any, ...] = ()
    if threshold is not None:  # the thresholded data are a term of their own
        of_data = Row((Out(x=a, m=b),), guidance=guidance)
        h = (threshold.applied(apply_row(of_data, x=x_t, m=model_output, m_uncond=uncond, names=_NAMES)[0]),)
        c_h, y = (y,), 0.0
    c_y = y if pred is not None else 0.0
    if x_s is None and (prediction == "score" or threshold is not None):
        row = Row((Out(y=c_y, x=x, m=m, h=c_h, z=d),), pred, limits, guidance)
        with torch.no_grad():
            x_s = apply_row(row, x=x_t, m=model_output, m_uncond=uncond, h=h, noise=noise, names=_NAMES)[0]
    elif x_s is None:
        with torch.no_grad():
            x_s = ops.ddim_step(
                x_t, model_output, *path[:4], eta=path[4], noise=noise, prediction=prediction, clip=clip, uncond=uncond,
                guidance_scale=guidance,
            )  # fmt: skip
    out = Out(y=-c_y / d if pred is not None else 0.0, x=-x / d, m=-m / d, h=(1.0 / d, *[-c / d for c in c_h]))
    row = Row((out,), pred, limits, guidance)
    return x_s, _log_prob(row, x_t, model_output, uncond, x_s, d, reduction, h)


def flow(
    x: Tensor, v: Tensor, t: Coef, dt: Coef, g: Coef, *, x_s: Tensor | None = None, noise: Noise | Tensor | None = None,
    uncond: Tensor | None = None, guidance_scale: Coef | None = None, reduction: str = "sum",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """An Euler-Maruyama step of the SDE that has a flow's marginals, from t to t + dt, and its log-density:

        dx = (v + g^2 / 2 score) dt + g dw,      score = -(x - t v) / (1 - t)
        mu = x + dt (v - g^2 / 2 (x - t v) / (1 - t)),      s = g sqrt(dt)

    on the path x_t = t x1 + (1 - t) x0 of FlowMatching and RectifiedFlow, with noise at t = 0.

    Args:
        x: state at t.  [B, ...].
        v: velocity at (x, t).  [B, ...], of x's dtype or a lower precision.
        t: time, in [0, 1).  float, or [B].
        dt: step, > 0, toward the data.  float, or [B].
        g: diffusion coefficient, > 0; Flow-GRPO's is a sqrt((1 - t) / t).  float, or [B].
        x_s, noise, reduction: as of ddim(); x_s at t + dt.
        uncond, guidance_scale: as of ops.euler_step.

    Returns:
        (x_s, log p): [B, ...] and [B], as of ddim().

    Raises:
        ValueError, TypeError: as of ddim(); a number outside its range.

    Source: arXiv:2505.05470, with time reversed; Song et al., arXiv:2011.13456.
    """
    _check(x, v, x_s, noise, reduction)
    t = check.coefficient("t", t, x, 0.0, 1.0)
    dt, g = check.coefficient("dt", dt, x, 0.0), check.coefficient("g", g, x, 0.0)
    guidance = ops._guidance(uncond, guidance_scale, x)
    t, dt, g = (value.double() if isinstance(value, Tensor) else value for value in (t, dt, g))
    _check_std("t", "expected < 1", 1.0 - t)
    s = g * dt**0.5
    _check_std("g, dt", "expected > 0", s)
    half = g * g / (2.0 * (1.0 - t))
    c_x, c_v = 1.0 - dt * half, dt * (1.0 + half * t)
    return _linear(x, v, c_x, c_v, s, x_s, noise, uncond, guidance, reduction)


def linear(
    x_t: Tensor, model_output: Tensor, c_x: Coef, c_m: Coef, std: Coef, *, x_s: Tensor | None = None,
    noise: Noise | Tensor | None = None, uncond: Tensor | None = None, guidance_scale: Coef | None = None,
    reduction: str = "sum",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A step by its coefficients, and its log-density:  mu = c_x x_t + c_m model_output,  s = std.

    Args:
        x_t: state at t.  [B, ...].
        model_output: the network's output at t.  [B, ...], of x_t's dtype or a lower precision.
        c_x, c_m: float, or [B].
        std: > 0.  float, or [B].
        x_s, noise, reduction: as of ddim().
        uncond, guidance_scale: as of ops.euler_step.

    Returns:
        (x_s, log p): [B, ...] and [B], as of ddim().

    Raises:
        ValueError, TypeError: as of ddim().

    Source: arXiv:2305.13301.
    """
    _check(x_t, model_output, x_s, noise, reduction)
    c_x, c_m = check.coefficient("c_x", c_x, x_t), check.coefficient("c_m", c_m, x_t)
    std = check.coefficient("std", std, x_t, 0.0)
    guidance = ops._guidance(uncond, guidance_scale, x_t)
    _check_std("std", "expected > 0", std)
    return _linear(x_t, model_output, c_x, c_m, std, x_s, noise, uncond, guidance, reduction)


def _linear(
    x: Tensor, m: Tensor, c_x: Coef, c_m: Coef, std: Coef, x_s: Tensor | None, noise: Noise | Tensor | None,
    uncond: Tensor | None, guidance: Coef | None, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x_s is None:
        with torch.no_grad():
            row = Row((Out(x=c_x, m=c_m, z=std),), guidance=guidance)
            names = ("x_t", "model_output", "uncond", "noise")
            x_s = apply_row(row, x=x, m=m, m_uncond=uncond, noise=noise, names=names)[0]
    row = Row((Out(x=-c_x / std, m=-c_m / std, h=(1.0 / std,)),), guidance=guidance)
    return x_s, _log_prob(row, x, m, uncond, x_s, std, reduction)


def _log_prob(
    row: Row, x: Tensor, m: Tensor, uncond: Tensor | None, x_s: Tensor, std: Coef, reduction: str,
    h: tuple[Tensor, ...] = (),
) -> Tensor:  # fmt: skip
    names = (*_NAMES, "x_s")
    _, sums = reduce_row(row, x=x, m=m, m_uncond=uncond, h=(x_s.detach(), *h), scratch=True, names=names)
    n = math.prod(x.shape[1:])
    log = std.log().to(sums.dtype) if isinstance(std, Tensor) else math.log(std)
    found = -0.5 * sums[:, 0] - n * (log + 0.5 * math.log(2.0 * math.pi))
    return found if reduction == "sum" else found / max(n, 1)


def _check(x: Any, m: Any, x_s: Any, noise: Any, reduction: str) -> None:
    for name, value in (("x", x), ("model_output", m), ("x_s", x if x_s is None else x_s)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch tensor, got {type(value).__name__}")
    check.choice("reduction", reduction, REDUCTIONS)
    if x_s is None:
        return
    if noise is not None:
        raise ValueError(f"noise: expected None beside x_s, which is scored, got {type(noise).__name__}")
    if x_s.dtype != x.dtype:
        raise TypeError(f"x_s: expected {x.dtype} like the state, got {x_s.dtype}")


def _check_std(name: str, wanted: str, value: Any) -> None:
    """ValueError: a number that is not > 0, where it is looked at."""
    if isinstance(value, Tensor):
        value = value.detach()
        if check.visible(value) and not bool((value > 0.0).all()):
            raise ValueError(f"{name}: {wanted}: a step without noise has no density; got one that is not, in a sample")
    elif not value > 0.0:
        raise ValueError(f"{name}: {wanted}: a step without noise has no density")
