"""A consistency model's training step around the networks, in plain PyTorch, with the defaults of the methods.

As they are written (Distillation, Tuning, Continuous: "eager", and compiled), and with coefficients merged, in as few
passes as eager PyTorch has (Merged...: "careful eager"). Section 13.4; arXiv:2406.14548; arXiv:2410.11081.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SD, EPSILON, TANGENT_C = 0.5, 0.002, 0.1

Found = tuple[Tensor, ...]


def scales(t: Tensor, epsilon: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """c_in, c_skip, c_out of (13.29)."""
    c_in = (t * t + SD * SD).rsqrt()
    return c_in, SD * SD / ((t - epsilon) ** 2 + SD * SD), (t - epsilon) * SD * c_in


class Distillation:
    """CD, as it is written; t, s [B, 1, ...] the lower and the upper times."""

    @staticmethod
    def start(x: Tensor, z: Tensor, s: Tensor) -> Found:
        x_s = x + s * z
        return x_s, scales(s)[0] * x_s

    @staticmethod
    def euler(x_s: Tensor, m: Tensor, t: Tensor, s: Tensor) -> Found:
        _, skip, out = scales(s)
        slope = (x_s - (skip * x_s + out * m)) / s
        x_hat = x_s + (t - s) * slope
        return x_hat, slope, scales(t)[0] * x_hat

    @staticmethod
    def heun(x_s: Tensor, x_hat: Tensor, slope: Tensor, m: Tensor, t: Tensor, s: Tensor) -> Found:
        _, skip, out = scales(t)
        x_hat = x_s + (t - s) * (slope + (x_hat - (skip * x_hat + out * m)) / t) / 2.0
        return x_hat, scales(t)[0] * x_hat

    @staticmethod
    def loss(m: Tensor, x_s: Tensor, goal: Tensor, x_hat: Tensor, t: Tensor, s: Tensor) -> Tensor:
        _, skip, out = scales(s, EPSILON)
        _, skip_t, out_t = scales(t, EPSILON)
        return torch.nn.functional.mse_loss(skip * x_s + out * m, (skip_t * x_hat + out_t * goal).detach())


class MergedDistillation:
    """CD, a product and a sum a term."""

    @staticmethod
    def start(x: Tensor, z: Tensor, s: Tensor) -> Found:
        x_s = torch.addcmul(x, z, s)
        return x_s, x_s * scales(s)[0]

    @staticmethod
    def euler(x_s: Tensor, m: Tensor, t: Tensor, s: Tensor) -> Found:
        _, skip, out = scales(s)
        ratio = (t - s) / s
        x_hat = (x_s * (1.0 + ratio * (1.0 - skip))).addcmul_(m, -ratio * out)
        return x_hat, x_hat, x_hat * scales(t)[0]

    @staticmethod
    def heun(x_s: Tensor, x_hat: Tensor, slope: Tensor, m: Tensor, t: Tensor, s: Tensor) -> Found:
        c_in, skip, out = scales(t)
        half = (t - s) / t / 2.0
        x_hat = (x_hat * (0.5 + half * (1.0 - skip))).addcmul_(m, -half * out).add_(x_s, alpha=0.5)
        return x_hat, x_hat * c_in

    @staticmethod
    def loss(m: Tensor, x_s: Tensor, goal: Tensor, x_hat: Tensor, t: Tensor, s: Tensor) -> Tensor:
        _, skip, out = scales(s, EPSILON)
        _, skip_t, out_t = scales(t, EPSILON)
        target = (x_hat * skip_t).addcmul_(goal, out_t).addcmul_(x_s, -skip)
        return torch.nn.functional.mse_loss(out * m, target)


class Tuning:
    """ECT, as it is written; t, r [B, 1, ...] the upper and the lower times."""

    @staticmethod
    def start(x: Tensor, z: Tensor, t: Tensor, r: Tensor) -> Found:
        x_t, x_r = x + t * z, x + r * z
        return x_t, x_r, scales(t)[0] * x_t, scales(r)[0] * x_r

    @staticmethod
    def loss(m: Tensor, goal: Tensor, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor) -> Tensor:
        _, skip, out = scales(t, EPSILON)
        _, skip_r, out_r = scales(r, EPSILON)
        residual = skip * x_t + out * m - (skip_r * x_r + out_r * goal).detach()
        c = 0.00054 * math.sqrt(math.prod(m.shape[1:]))
        huber = (residual.float().square().flatten(1).sum(1) + c * c).sqrt() - c
        return (huber / (t - r).flatten().float()).mean()


class MergedTuning(Tuning):
    """ECT, a product and a sum a term."""

    @staticmethod
    def start(x: Tensor, z: Tensor, t: Tensor, r: Tensor) -> Found:
        x_t, x_r = torch.addcmul(x, z, t), torch.addcmul(x, z, r)
        return x_t, x_r, x_t * scales(t)[0], x_r * scales(r)[0]

    @staticmethod
    def loss(m: Tensor, goal: Tensor, x_t: Tensor, x_r: Tensor, t: Tensor, r: Tensor) -> Tensor:
        _, skip, out = scales(t, EPSILON)
        _, skip_r, out_r = scales(r, EPSILON)
        target = (x_r * skip_r).addcmul_(goal, out_r).addcmul_(x_t, -skip)
        norm = torch.linalg.vector_norm(torch.addcmul(-target, m, out).flatten(1), dim=1, dtype=torch.float32)
        c = 0.00054 * math.sqrt(math.prod(m.shape[1:]))
        return ((torch.hypot(norm, torch.full_like(norm, c)) - c) / (t - r).flatten().float()).mean()


class Continuous:
    """sCM, as it is written; t [B, 1, ...]."""

    @staticmethod
    def start(x: Tensor, z: Tensor, t: Tensor) -> Found:
        cos, sin = t.cos(), t.sin()
        z = SD * z
        x_t, dx = cos * x + sin * z, cos * z - sin * x
        return x_t, dx, x_t / SD, cos * sin * dx / SD

    @staticmethod
    def tangent(x_t: Tensor, dx: Tensor, still: Tensor, turn: Tensor, t: Tensor) -> Tensor:
        cos, sin = t.cos(), t.sin()
        g = -cos * cos * (SD * still - dx) - (cos * sin * x_t + SD * turn)
        norm = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float32)
        return g / (norm + TANGENT_C).to(g.dtype).reshape(t.shape)

    @staticmethod
    def loss(m: Tensor, still: Tensor, g: Tensor) -> Tensor:
        return (m - still - g).square().mean()


class MergedContinuous(Continuous):
    """sCM, a product and a sum a term."""

    @staticmethod
    def start(x: Tensor, z: Tensor, t: Tensor) -> Found:
        cos, sin = t.cos(), t.sin()
        x_t, dx = (x * cos).addcmul_(z, SD * sin), (x * -sin).addcmul_(z, SD * cos)
        return x_t, dx, x_t / SD, dx * (cos * sin / SD)

    @staticmethod
    def tangent(x_t: Tensor, dx: Tensor, still: Tensor, turn: Tensor, t: Tensor) -> Tensor:
        cos, sin = t.cos(), t.sin()
        g = (dx * (cos * cos)).addcmul_(still, -SD * cos * cos).addcmul_(x_t, -cos * sin).sub_(turn, alpha=SD)
        norm = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float32)
        return g.div_((norm + TANGENT_C).to(g.dtype).reshape(t.shape)).add_(still)

    @staticmethod
    def loss(m: Tensor, still: Tensor, g: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(m, g)
