"""What the tests of consistency models share: a small network, the formulas of section 13.4 written out, and the exact
function on Gaussian data."""

from __future__ import annotations

import math

import torch
from torch import nn

F64 = torch.float64
SHAPE = (6, 2)
EPS, T, SD = 0.002, 80.0, 0.5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 2, dtype=F64)

    def forward(self, x, t, y=None):
        return torch.tanh(self.mix(x)) * (1 + 0.2 * t.to(x.dtype)[:, None]) + (0 if y is None else y[:, None])


def gradient(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def f_of(network, x, s, eps=EPS):
    """Eq. (13.29) written out, s [B]."""
    s = s[:, None]
    skip = SD**2 / ((s - eps) ** 2 + SD**2)
    out = (s - eps) * SD / (s**2 + SD**2).sqrt()
    return skip * x + out * network(x / (s**2 + SD**2).sqrt(), s[:, 0].log() / 4)


def slope(network, x, s):
    """Eq. (13.27) from the teacher's denoiser."""
    return (x - f_of(network, x, s, 0.0)) / s[:, None]


class ExactFunction:
    """F of the consistency function of N(0, std^2): x sqrt((std^2 + eps^2) / (std^2 + t^2))."""

    def __init__(self, std):
        self.std = std

    def __call__(self, x, c_noise):
        s = (4 * c_noise).exp().to(x.dtype)[:, None]
        state = x * (s**2 + SD**2).sqrt()
        f = state * ((self.std**2 + EPS**2) / (self.std**2 + s**2)).sqrt()
        skip = SD**2 / ((s - EPS) ** 2 + SD**2)
        return (f - skip * state) / ((s - EPS) * SD / (s**2 + SD**2).sqrt()).clamp_min(1e-12)


RHO = {
    "l2": lambda r: r.square().mean(1),
    "l1": lambda r: r.abs().mean(1),
    "pseudo_huber": lambda r: (r.square().sum(1) + 0.00054**2 * 2).sqrt() - 0.00054 * math.sqrt(2),
}
