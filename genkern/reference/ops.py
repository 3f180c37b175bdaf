"""The named ops, each as its formula is written. Arguments, shapes and sources: genkern.ops, under the same names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise import Noise
from .noise import randn

Coef = Any  # a number, or a tensor of shape [B] or of one element


def add_noise(
    x: Tensor, alpha: Coef, sigma: Coef, *, noise: Noise | Tensor | None = None, return_noise: bool = False
) -> Any:
    """alpha x + sigma z."""
    z = _z(noise, x)
    x_t = (_by_sample(alpha, x) * x + _by_sample(sigma, x) * z).to(x.dtype)
    return (x_t, z.to(x.dtype)) if return_noise else x_t


def ddim_step(
    x_t: Tensor, model_output: Tensor, alpha_t: Coef, sigma_t: Coef, alpha_s: Coef, sigma_s: Coef, *, eta: Coef = 0.0,
    noise: Noise | Tensor | None = None, prediction: str = "epsilon", clip: Any = None, uncond: Tensor | None = None,
    guidance_scale: Coef | None = None, return_pred: bool = False,
) -> Any:  # fmt: skip
    """alpha_s y + sqrt(sigma_s^2 - d^2) epsilon + d z, d = eta (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2)."""
    alpha_t, sigma_t, alpha_s, sigma_s = (_by_sample(c, x_t) for c in (alpha_t, sigma_t, alpha_s, sigma_s))
    draws = isinstance(eta, Tensor) or eta != 0.0
    eta = _by_sample(eta, x_t)
    m = _guided(model_output, uncond, guidance_scale)
    if prediction == "epsilon":
        epsilon = m
        y = (x_t - sigma_t * epsilon) / alpha_t
    elif prediction == "v":
        epsilon = alpha_t * m + sigma_t * x_t
        y = alpha_t * x_t - sigma_t * m
    else:
        y = m
        epsilon = (x_t - alpha_t * y) / sigma_t
    if clip is not None:
        lo, hi = clip if isinstance(clip, (tuple, list)) else (-clip, clip)
        y = y.clamp(lo, hi)
    if draws:
        d = eta * (sigma_s / sigma_t) * (1.0 - alpha_t**2 / alpha_s**2).clamp(min=0.0).sqrt()
        x_s = alpha_s * y + (sigma_s**2 - d**2).clamp(min=0.0).sqrt() * epsilon + d * _z(noise, x_t)
    else:
        x_s = alpha_s * y + sigma_s * epsilon
    x_s = x_s.to(x_t.dtype)
    return (x_s, y.to(x_t.dtype)) if return_pred else x_s


def euler_step(
    x: Tensor, v: Tensor, dt: Coef, *, uncond: Tensor | None = None, guidance_scale: Coef | None = None
) -> Tensor:
    """x + dt v."""
    return (x + _by_sample(dt, x) * _guided(v, uncond, guidance_scale)).to(x.dtype)


def heun_step(x: Tensor, v: Tensor, v_next: Tensor, dt: Coef) -> Tensor:
    """x + dt/2 (v + v_next)."""
    return (x + _by_sample(dt, x) / 2.0 * (v + v_next)).to(x.dtype)


def consistency_skip(
    x: Tensor, network_output: Tensor, c_skip: Coef, c_out: Coef, *, uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
) -> Tensor:  # fmt: skip
    """c_skip x + c_out F."""
    network_output = _guided(network_output, uncond, guidance_scale)
    return (_by_sample(c_skip, x) * x + _by_sample(c_out, x) * network_output).to(x.dtype)


def path_loss(
    model_output: Tensor, x: Tensor | None = None, *, x_coef: Coef = 0.0, noise_coef: Coef = 0.0,
    noise: Noise | Tensor | None = None, m_coef: Coef = 1.0, h: Sequence[Tensor] = (), h_coefs: Sequence[Coef] = (),
    weight: Coef | None = None, mask: Tensor | None = None, kind: str = "l2", c: float | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The loss of r = m_coef F - (x_coef x + noise_coef z + sum_k h_coefs[k] h_k), reduced over samples and batch."""
    if mask is not None:  # left out: also of the coefficients' derivatives, where an element is NaN
        model_output, h = torch.where(mask != 0, model_output, 0.0), [torch.where(mask != 0, t, 0.0) for t in h]
        x = None if x is None else torch.where(mask != 0, x, 0.0)
        noise = torch.where(mask != 0, noise, 0.0) if isinstance(noise, Tensor) else noise
    wide = torch.promote_types(model_output.dtype, torch.float32)
    r = _by_sample(m_coef, model_output) * model_output.to(wide)
    if x is not None:
        r = r - _by_sample(x_coef, r) * x
    if noise is not None and (isinstance(noise_coef, Tensor) or noise_coef != 0.0):
        r = r - _by_sample(noise_coef, r) * _z(noise, r)
    for h_k, coef in zip(h, h_coefs or [1.0] * len(h), strict=True):
        r = r - _by_sample(coef, r) * h_k
    weights = torch.ones_like(r) if mask is None else mask.to(r.dtype).expand(r.shape)
    r = torch.where(weights != 0, r, 0.0)[:, None].flatten(1)
    weights = weights[:, None].flatten(1)
    count = weights.sum(1)
    if kind == "l2":
        loss = (weights * r.square()).sum(1) / count.where(count != 0, 1.0)
    elif kind == "l1":
        loss = (weights * r.abs()).sum(1) / count.where(count != 0, 1.0)
    else:
        c = 0.00054 * max(r.shape[1], 1) ** 0.5 if c is None else c
        loss = ((weights * r.square()).sum(1) + c * c).sqrt() - c
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    return loss.sum() / max(len(loss), 1) if reduction == "mean" else loss.sum()


def _by_sample(coef: Coef, like: Tensor) -> Tensor:
    """A coefficient, at least float32, in a shape that broadcasts over samples."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.as_tensor(coef, dtype=wide, device=like.device).reshape(-1, *[1] * (like.ndim - 1))


def _guided(m: Tensor, uncond: Tensor | None, scale: Coef | None) -> Tensor:
    return m if uncond is None else uncond + _by_sample(scale, m) * (m - uncond)


def _z(noise: Noise | Tensor | None, like: Tensor) -> Tensor:
    if isinstance(noise, Tensor):
        return noise
    wide = torch.promote_types(like.dtype, torch.float32)
    return randn(tuple(like.shape), noise=noise or Noise.fresh(), device=like.device, dtype=wide)
