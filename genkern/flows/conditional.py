"""Gaussian conditional paths in general, eq. (13.21), and their fields, eq. (13.22).

    p_t(x | x1) = N(x; mu_t(x1), sigma_t(x1)^2 I),     x_t = mu_t + sigma_t z                          (13.21)
    u_t(x | x1) = (sigma_t' / sigma_t) (x - mu_t) + mu_t'                                              (13.22)

with sigma_t one number a sample, ' the derivative by t at fixed x1. On x_t itself u_t = mu_t' + sigma_t' z, which needs
no division. Lipman et al., arXiv:2210.02747, theorem 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import check
from ..fused import apply_row
from ..rows import Out, Row

Moment = Callable[[Tensor, Tensor], Tensor]  # of (t [B], x1 [B, ...])


class Moments(NamedTuple):
    """A conditional path at the times of a batch.  mu, d_mu: [B, ...].  sigma (>= 0), d_sigma: [B]."""

    mu: Tensor
    sigma: Tensor
    d_mu: Tensor
    d_sigma: Tensor


class ConditionalPath:
    """mu_t(x1) and sigma_t(x1) as functions, whose derivatives by t torch.func.jvp finds, in one forward pass.

    Args:
        mu: mu(t, x1), t [B] and x1 [B, ...], giving [B, ...], each sample of its own t and x1 alone.
        sigma: sigma(t, x1) giving [B].

    Raises:
        TypeError: mu or sigma is not callable, or (when called) gives no tensor. ValueError: one of another shape.
    """

    def __init__(self, mu: Moment, sigma: Moment) -> None:
        for name, of in (("mu", mu), ("sigma", sigma)):
            if not callable(of):
                raise TypeError(f"{name}: expected a callable of (t, x1), got {type(of).__name__}")
        self.mu, self.sigma = mu, sigma

    def at(self, t: Tensor, x1: Tensor) -> Moments:
        """Both, and their derivatives.  t: [B], floating.  x1: [B, ...]."""
        tangent = torch.ones_like(t)
        mu, d_mu = self._derived("mu", self.mu, t, x1, tangent, x1.shape)
        sigma, d_sigma = self._derived("sigma", self.sigma, t, x1, tangent, t.shape)
        return Moments(mu, sigma, d_mu, d_sigma)

    @staticmethod
    def _derived(
        name: str, of: Moment, t: Tensor, x1: Tensor, tangent: Tensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        def checked(time: Tensor) -> Tensor:
            found = of(time, x1)
            if not isinstance(found, Tensor):
                raise TypeError(f"{name}: expected a tensor from the function, got {type(found).__name__}")
            if found.shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)} from the function, got {tuple(found.shape)}")
            return found

        found = torch.func.jvp(checked, (t,), (tangent,))
        return found[0], found[1]


def conditional_field(x: Tensor, at: Moments) -> Tensor:
    """u_t(x | x1) = (sigma'/sigma)(x - mu) + mu', eq. (13.22), one fused pass.

    Args:
        x: states.  [B, ...], floating.
        at: the path at their times; sigma > 0. mu and d_mu of x's dtype or a lower precision.

    Returns:
        u_t.  [B, ...], x's dtype.

    Raises:
        ValueError: shapes or devices differ; sigma <= 0, where no field is defined (looked at on the host).

    Source: (13.22); Lipman et al., arXiv:2210.02747, theorem 3.
    """
    check.terms([("x", x), ("mu", at.mu), ("d_mu", at.d_mu)])
    sigma, d_sigma = (check.coefficient(name, getattr(at, name), x) for name in ("sigma", "d_sigma"))
    if isinstance(sigma, Tensor) and sigma.device.type == "cpu" and not bool((sigma > 0.0).all()):
        raise ValueError(f"sigma: expected numbers > 0, where the field is defined, got {sigma.tolist()}")
    rate = d_sigma / sigma
    (found,) = apply_row(Row((Out(x=rate, h=(-rate, 1.0)),)), x=x, h=(at.mu, at.d_mu), names=_NAMES)
    return found


_NAMES = ("x", "m", "m_uncond", "noise", "mu", "d_mu", "h[2]")
