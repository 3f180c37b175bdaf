"""What genkern is measured against in PyTorch: each op as a textbook writes it, and as a careful person does.

    textbook    the formula, a new tensor for every operation, in the tensors' own dtype
    careful     coefficients folded on the host, out= and in-place operations, as few passes as eager PyTorch allows

Both compute what the op of the same name computes. torch.compile is given the textbook's functions. Coefficients are
numbers, or tensors that broadcast over a sample (`per_sample`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Coef = Any  # a number, or a tensor of shape [B, 1, ...]


class Normals:
    """Where the baselines' noise comes from: torch's generator; or given numbers, so that results can be compared."""

    def __init__(self, given: Tensor | None = None) -> None:
        self.given = given

    def like(self, x: Tensor) -> Tensor:
        """New normals of x's shape and dtype."""
        return torch.randn_like(x) if self.given is None else self.given.clone()

    def into(self, out: Tensor, std: float = 1.0) -> Tensor:
        """std z, written to out."""
        return out.normal_(0.0, std) if self.given is None else torch.mul(self.given, std, out=out)


def per_sample(coef: Tensor, like: Tensor) -> Tensor:
    """Coefficients [B] in a shape that broadcasts over samples, in like's dtype."""
    return coef.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def ddim_scales(at: float, st: float, as_: float, ss: float, eta: float) -> tuple[float, float]:
    """(sqrt(sigma_s^2 - d^2), d) of (13.13)."""
    d = eta * (ss / st) * math.sqrt(1.0 - (at / as_) ** 2)
    return math.sqrt(max(ss * ss - d * d, 0.0)), d


class Textbook:
    """Every op as its formula is written."""

    @staticmethod
    def add_noise(x: Tensor, alpha: Coef, sigma: Coef, z: Tensor) -> Tensor:
        return alpha * x + sigma * z

    @staticmethod
    def ddim_step(
        x: Tensor, m: Tensor, path: tuple[float, float, float, float], *, eta: float = 0.0, z: Tensor | None = None,
        clip: float | None = None, uncond: Tensor | None = None, scale: float = 1.0, data: bool = False,
    ) -> Tensor:  # fmt: skip
        at, st, as_, ss = path
        if uncond is not None:
            m = uncond + scale * (m - uncond)
        epsilon, y = ((x - at * m) / st, m) if data else (m, (x - st * m) / at)
        if clip is not None:
            y = y.clamp(-clip, clip)
        kept, d = ddim_scales(*path, eta)
        x_s = as_ * y + kept * epsilon
        return x_s if z is None else x_s + d * z

    @staticmethod
    def euler_step(x: Tensor, v: Tensor, dt: float) -> Tensor:
        return x + dt * v

    @staticmethod
    def heun_step(x: Tensor, v: Tensor, v_next: Tensor, dt: float) -> Tensor:
        return x + dt / 2.0 * (v + v_next)

    @staticmethod
    def consistency_skip(x: Tensor, f: Tensor, c_skip: Coef, c_out: Coef) -> Tensor:
        return c_skip * x + c_out * f

    @staticmethod
    def learned_variance_step(
        x: Tensor, m: Tensor, v: Tensor, z: Tensor, c: tuple[float, float], log_scale: tuple[float, float]
    ) -> Tensor:
        return c[0] * x + c[1] * m + torch.exp(log_scale[0] + log_scale[1] * v) * z

    @staticmethod
    def inpainting_step(
        x: Tensor, m: Tensor, known: Tensor, keep: Tensor, z: Tensor, c: tuple[float, float],
        weights: tuple[float, float],
    ) -> Tensor:  # fmt: skip
        return torch.where(keep, weights[0] * known + weights[1] * z, c[0] * x + c[1] * m)

    @staticmethod
    def flow_loss(m: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(m, x - z)

    @staticmethod
    def flow_noising(x: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return t * x + (1.0 - t) * z, x - z


class Careful:
    """Every op in as few passes as eager PyTorch has, into a given output."""

    @staticmethod
    def add_noise(x: Tensor, alpha: float, sigma: float, normals: Normals, out: Tensor) -> Tensor:
        return normals.into(out, sigma).add_(x, alpha=alpha)

    @staticmethod
    def add_noise_per_sample(x: Tensor, alpha: Tensor, sigma: Tensor, normals: Normals, out: Tensor) -> Tensor:
        return normals.into(out).mul_(sigma).addcmul_(x, alpha)

    @staticmethod
    def add_noise_written(
        x: Tensor, alpha: float, sigma: float, normals: Normals, out: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor]:
        normals.into(z)
        return torch.mul(x, alpha, out=out).add_(z, alpha=sigma), z

    @staticmethod
    def ddim_step(
        x: Tensor, m: Tensor, path: tuple[float, float, float, float], out: Tensor, *, eta: float = 0.0,
        normals: Normals | None = None, clip: float | None = None, uncond: Tensor | None = None, scale: float = 1.0,
        data: bool = False,
    ) -> Tensor:  # fmt: skip
        at, st, as_, ss = path
        kept, d = ddim_scales(*path, eta)
        if data:
            return torch.mul(x, kept / st, out=out).add_(m, alpha=as_ - kept * at / st)
        if clip is not None:  # as_ clamp(y) is clamp(as_ y) between as_ times the bounds
            torch.mul(x, as_ / at, out=out).add_(m, alpha=-as_ * st / at).clamp_(-as_ * clip, as_ * clip)
            return out.add_(m, alpha=kept)
        of_x, of_m = as_ / at, kept - as_ * st / at
        if normals is not None:
            return normals.into(out, d).add_(x, alpha=of_x).add_(m, alpha=of_m)
        torch.mul(x, of_x, out=out)
        if uncond is not None:
            return out.add_(uncond, alpha=of_m * (1.0 - scale)).add_(m, alpha=of_m * scale)
        return out.add_(m, alpha=of_m)

    @staticmethod
    def euler_step(x: Tensor, v: Tensor, dt: float, out: Tensor) -> Tensor:
        return torch.add(x, v, alpha=dt, out=out)

    @staticmethod
    def heun_step(x: Tensor, v: Tensor, v_next: Tensor, dt: float, out: Tensor) -> Tensor:
        return torch.add(x, v, alpha=dt / 2.0, out=out).add_(v_next, alpha=dt / 2.0)

    @staticmethod
    def consistency_skip(x: Tensor, f: Tensor, c_skip: Coef, c_out: Coef, out: Tensor) -> Tensor:
        torch.mul(x, c_skip, out=out)
        return out.addcmul_(f, c_out) if isinstance(c_out, Tensor) else out.add_(f, alpha=c_out)

    @staticmethod
    def learned_variance_step(
        x: Tensor, m: Tensor, v: Tensor, normals: Normals, out: Tensor, c: tuple[float, float],
        log_scale: tuple[float, float],
    ) -> Tensor:  # fmt: skip
        scale = (log_scale[1] * v.to(out.dtype)).add_(log_scale[0]).exp_()
        return normals.into(out).mul_(scale).add_(x, alpha=c[0]).add_(m, alpha=c[1])

    @staticmethod
    def inpainting_step(
        x: Tensor, m: Tensor, known: Tensor, keep: Tensor, normals: Normals, scratch: Tensor, out: Tensor,
        c: tuple[float, float], weights: tuple[float, float],
    ) -> Tensor:  # fmt: skip
        noised = normals.into(scratch, weights[1]).add_(known, alpha=weights[0])
        torch.mul(x, c[0], out=out).add_(m, alpha=c[1])
        return torch.where(keep, noised, out, out=out)

    @staticmethod
    def flow_loss(m: Tensor, x: Tensor, z: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(m, torch.sub(x, z, out=target))

    @staticmethod
    def flow_noising(
        x: Tensor, normals: Normals, t: Tensor, z: Tensor, x_t: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        normals.into(z)
        torch.sub(x, z, out=target)
        return torch.addcmul(z, target, t, out=x_t), target  # z + t (x - z)
