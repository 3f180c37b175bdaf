"""Conditional flow matching on a general Gaussian path, eqs. (13.20)-(13.23).

    x_t = mu_t(x1) + sigma_t(x1) z,     L = E_{t, x1, z} |v(x_t, t) - (mu_t'(x1) + sigma_t'(x1) z)|^2

mu and sigma are any functions of t and of the data, or tensors. Where they are alpha(t) x1 and sigma(t), this is
FlowMatching, which needs no tensors for mu and mu'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import check, paths
from ..flows.conditional import ConditionalPath, Moment, Moments
from ..fused import apply_row
from ..rows import Out, Row
from ._training import Batch
from .flow import Flow

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._training import LossOptions, Times


class ConditionalFlowMatching(Flow):
    """Flow matching on p_t(x | x1) = N(mu_t(x1), sigma_t(x1)^2 I). The network is called as model(x, t, **cond).

    sample() and log_prob() start from N(0, I), as mu_0 = 0 and sigma_0 = 1 have it; another p_0 is given as x0=. They
    solve the ODE alone: options that read data off a state (guide, init, mask, apg, along) are refused.

    Args:
        mu, sigma: as of flows.ConditionalPath, whose derivatives by t it finds.

    Raises:
        TypeError: mu or sigma is not callable.

    Source: (13.20)-(13.23); Lipman et al., arXiv:2210.02747.
    """

    def __init__(self, mu: Moment, sigma: Moment) -> None:
        self.conditional, self.path = ConditionalPath(mu, sigma), paths.VelocityOnly()

    def loss(
        self, model: Any, x: Tensor, *, t: Any = None, times: Times = None, **options: Unpack[LossOptions]
    ) -> Tensor:
        """Eq. (13.23), with one fused pass before the network and one after it.

        Args:
            model: called as model(x_t, t, **cond).
            x: data, the seed's x_1.  [B, ...], floating.
            t, times: as of FlowMatching.loss; drawn times are below 1, where sigma' may be infinite.
            options: LossOptions; noise as a tensor is z.

        Returns:
            The loss, float32 (float64 for float64), as of FlowMatching.loss.

        Raises:
            ValueError, TypeError: an argument is not what it may be; mu or sigma gives another shape.
        """
        batch = Batch(model, x, options)
        drawn = t is None and not isinstance(times, Tensor)
        t = batch.times(t, times)
        if drawn:
            t = t.clamp(max=1.0 - torch.finfo(t.dtype).eps / 2)
        return _loss(batch, t, self.conditional.at(t, batch.x))

    @staticmethod
    def loss_at(model: Any, t: Any, at: Moments, **options: Unpack[LossOptions]) -> Tensor:
        """The same at given times, with mu, sigma and their derivatives there given as tensors.

        Args:
            model, options: as of loss().
            t: a number, or [B], in [0, 1].
            at: mu and d_mu [B, ...], floating; sigma and d_sigma [B], finite.

        Returns, Raises: as loss().
        """
        batch = Batch(model, at.mu, options)
        for name in ("sigma", "d_sigma"):
            check.coefficient(name, getattr(at, name), batch.x, 0.0 if name == "sigma" else -float("inf"))
        if at.d_mu.shape != at.mu.shape or at.d_mu.device != at.mu.device:
            raise ValueError(f"d_mu: expected shape {tuple(at.mu.shape)} like mu, got {tuple(at.d_mu.shape)}")
        return _loss(batch, batch.given_time("t", t, 0.0, 1.0), at)


def _loss(batch: Batch, t: Tensor, at: Moments) -> Tensor:
    dtype = torch.promote_types(at.mu.dtype, batch.x.dtype)
    noising = Row((Out(x=1.0, z=at.sigma),))
    (x_t,) = apply_row(noising, x=at.mu.to(dtype), noise=batch.z, dtypes=(batch.model_dtype,))
    m = batch.call(x_t, t)
    return batch.loss(m, at.d_mu.to(dtype), t, x_coef=1.0, noise_coef=at.d_sigma, noise=batch.z)
