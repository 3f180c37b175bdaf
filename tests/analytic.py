"""Closed forms on Gaussian mixtures, in float64: what a perfect network would say.

For data ~ sum_k w_k N(mu_k, s_k^2 I) and x = alpha data + sigma e, the marginal is sum_k w_k N(alpha mu_k, v_k I) with
v_k = alpha^2 s_k^2 + sigma^2, and with the posterior weights p_k(x) of the components

    E[data | x] = sum_k p_k (mu_k + alpha s_k^2 / v_k (x - alpha mu_k)),
    score(x)    = -sum_k p_k (x - alpha mu_k) / v_k,
    E[e | x]    = -sigma score(x),      velocity = alpha' E[data | x] + sigma' E[e | x].
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

F64 = torch.float64


@dataclasses.dataclass(frozen=True)
class Mixture:
    """means [K, D], standard deviations [K], weights [K], float64."""

    means: Tensor
    stds: Tensor
    weights: Tensor

    def _parts(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        offset = x[:, None, :] - alpha * self.means  # [B, K, D]
        v = alpha**2 * self.stds**2 + sigma**2  # [K]
        logits = self.weights.log() - offset.square().sum(-1) / (2 * v) - 0.5 * x.shape[1] * v.log()
        return logits.softmax(1)[..., None], offset, v[:, None]

    def data(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        p, offset, v = self._parts(x, alpha, sigma)
        return (p * (self.means + alpha * self.stds[:, None] ** 2 / v * offset)).sum(1)

    def score(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        p, offset, v = self._parts(x, alpha, sigma)
        return -(p * offset / v).sum(1)

    def noise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return -sigma * self.score(x, alpha, sigma)

    def sample(self, n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=g)
        return self.means[k] + self.stds[k, None] * torch.randn(n, self.means.shape[1], dtype=F64, generator=g)


def mixture() -> Mixture:
    """Three components in two dimensions, none of them small beside the steps of a sampler."""
    return Mixture(
        torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.2]], dtype=F64),
        torch.tensor([0.5, 0.4, 0.6], dtype=F64),
        torch.tensor([0.5, 0.3, 0.2], dtype=F64),
    )


def gaussian(mean: float, std: float, dim: int = 2) -> Mixture:
    """One component."""
    return Mixture(torch.full((1, dim), mean, dtype=F64), torch.tensor([std], dtype=F64), torch.ones(1, dtype=F64))


class PathNetwork:
    """The perfect network of a mixture on a path of genkern.paths: predicts epsilon, sample, v or velocity."""

    def __init__(self, data: Mixture, path: object, prediction: str) -> None:
        self.data, self.path, self.prediction, self.calls = data, path, prediction, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        assert (t == t[0]).all()
        alpha, sigma = (float(f(t[0].item())) for f in (self.path.alpha, self.path.sigma))
        y = self.data.data(x.to(F64), alpha, sigma)
        e = self.data.noise(x.to(F64), alpha, sigma)
        if self.prediction == "epsilon":
            m = e
        elif self.prediction == "sample":
            m = y
        elif self.prediction == "v":
            m = alpha * e - sigma * y
        else:
            m = self.path.d_alpha(t[0].item()) * y + self.path.d_sigma(t[0].item()) * e
        return m.to(x.dtype)


class DenoiserNetwork:
    """The perfect F of eq. (13.29) without shift: (D(x, s) - c_skip x) / c_out, told c_in x and ln(s) / 4."""

    def __init__(self, data: Mixture, sigma_data: float = 0.5) -> None:
        self.data, self.sd, self.calls = data, sigma_data, 0

    def __call__(self, x: Tensor, c_noise: Tensor) -> Tensor:
        self.calls += 1
        s = float((4.0 * c_noise[0].to(F64)).exp())
        r = (s * s + self.sd**2) ** 0.5
        state = x.to(F64) * r
        denoised = self.data.data(state, 1.0, s)
        return ((denoised - self.sd**2 / r**2 * state) / (s * self.sd / r)).to(x.dtype)
