"""The marginal field of a finite data set: what flow matching regresses on, exactly.

    p_t(x)  = sum_i q_i N(x; alpha x_i, sigma^2 I)                                                  (13.18)
    u_t(x)  = sum_i p_i(x) u_t(x | x_i),     p_i(x) = q_i N(x; alpha x_i, sigma^2 I) / p_t(x)       (13.19)

On a Gaussian path u_t(x | x_1) = alpha' x_1 + (sigma'/sigma)(x - alpha x_1) is linear in x_1, so u_t is the same at
the posterior mean y(x) = sum_i p_i x_i. With l_i = log q_i + (alpha <x, x_i> - alpha^2 |x_i|^2 / 2) / sigma^2, p_i is
their softmax: |x|^2 cancels. The data go by in chunks, each weighed against the largest l_i so far, in float64: near
the data sigma^2 is small beside the squares, and what is left of their difference is the answer. Memory is a chunk's,
[chunk, D] and [B, chunk], beside the data themselves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import check, paths


class MarginalField:
    """u_t(x) of data points, called as a velocity network: field(x, t).

    Args:
        data: x_i.  [N, ...], floating, N >= 1.
        path: a Gaussian path; default paths.CondOT(), which is that of (13.24).
        weights: q_i >= 0, of any sum.  [N]; default equal.
        chunk: data points at once, >= 1.

    Raises:
        ValueError: data of no points; weights of another shape, or without a positive sum; chunk < 1.

    Source: (13.18), (13.19).
    """

    def __init__(
        self, data: Tensor, path: paths.Path | None = None, weights: Tensor | None = None, chunk: int = 1024
    ) -> None:
        check.terms([("data", data)])
        if not data.numel():
            raise ValueError(f"data: expected at least one point, got shape {tuple(data.shape)}")
        self.points, self.path = data.detach(), paths.CondOT() if path is None else path
        self.chunk = check.integer("chunk", chunk, 1)
        if weights is None:
            self._log_q = torch.full((len(data),), -math.log(len(data)), dtype=torch.float64, device=data.device)
            return
        if not isinstance(weights, Tensor) or weights.shape != data.shape[:1]:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"weights: expected a tensor of shape ({len(data)},), got {got}")
        if not bool((weights >= 0).all() & weights.isfinite().all() & (weights.sum() > 0)):
            raise ValueError("weights: expected numbers >= 0 with a positive sum")
        q = weights.detach().to(data.device, torch.float64)
        self._log_q = (q / q.sum()).log()

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        """u_t(x), eq. (13.19).

        Args:
            x: states.  [B, ...] like the data, floating.
            t: a number, or [B]; with sigma > 0 (where it is 0, u_t is defined at no state but the data).

        Returns:
            u_t(x).  [B, ...], x's dtype; differentiable in x, whose divergence log_prob() of a flow takes.

        Raises:
            ValueError: a state's shape is not a data point's; t outside the path, or with sigma = 0 (looked at on the
                host).
        """
        time, alpha, sigma = self._times(x, t)
        y = self._posterior(x, alpha, sigma)[0].reshape(x.shape)
        d_alpha, d_sigma = (_wide(d, x) for d in (self.path.d_alpha(time), self.path.d_sigma(time)))
        alpha, sigma = _wide(alpha, x), _wide(sigma, x)
        return (d_alpha * y + d_sigma * ((x.double() - alpha * y) / sigma)).to(x.dtype)

    def data(self, x: Tensor, t: Any) -> Tensor:
        """The posterior mean of the data, E[x_1 | x_t = x] = sum_i p_i x_i. Arguments and result as of the field."""
        _, alpha, sigma = self._times(x, t)
        return self._posterior(x, alpha, sigma)[0].reshape(x.shape).to(x.dtype)

    def log_density(self, x: Tensor, t: Any) -> Tensor:
        """log p_t(x), eq. (13.18).  [B], x's dtype. Arguments as of the field."""
        _, alpha, sigma = self._times(x, t)
        total = self._posterior(x, alpha, sigma)[1]
        dims = math.prod(x.shape[1:])
        square = x.double().reshape(x.shape[0], dims).square().sum(1)
        return (total - square / (2.0 * sigma**2) - dims * (sigma.log() + 0.5 * math.log(2.0 * math.pi))).to(x.dtype)

    def _times(self, x: Tensor, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        """t, alpha and sigma of every sample, [B] float64."""
        check.terms([("x", x)])
        if x.shape[1:] != self.points.shape[1:] or x.device != self.points.device:
            raise ValueError(
                f"x: expected states of shape {tuple(self.points.shape[1:])} on {self.points.device} like the data, "
                f"got {tuple(x.shape[1:])} on {x.device}"
            )
        time = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(x.shape[0])
        alpha, sigma = (
            torch.as_tensor(c, dtype=torch.float64, device=x.device).expand(x.shape[0])
            for c in (self.path.alpha(time), self.path.sigma(time))
        )
        if sigma.device.type == "cpu" and not bool((sigma > 0.0).all()):
            raise ValueError(f"t: expected times with sigma > 0, where the field is defined, got {time.tolist()}")
        return time, alpha, sigma

    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, D] and log sum_i exp l_i [B], float64."""
        flat, points = x.double().reshape(x.shape[0], -1), self.points.reshape(len(self.points), -1)
        by_x, by_square = (alpha / sigma**2)[:, None], (0.5 * (alpha / sigma) ** 2)[:, None]
        largest = torch.full((x.shape[0], 1), -math.inf, dtype=torch.float64, device=x.device)
        total, mean = torch.zeros_like(largest), torch.zeros_like(flat)
        for low in range(0, len(points), self.chunk):
            part = points[low : low + self.chunk].double()
            logits = by_x * (flat @ part.T) - by_square * part.square().sum(1) + self._log_q[low : low + self.chunk]
            # Finite, so that a chunk without weight before all others is no inf - inf.
            above = torch.maximum(largest, logits.amax(1, keepdim=True)).clamp(min=-1e300).detach()  # drops out
            p, kept = (logits - above).exp(), (largest - above).exp()
            total, mean, largest = kept * total + p.sum(1, keepdim=True), kept * mean + p @ part, above
        return mean / total, (largest + total.log())[:, 0]


def _wide(c: Any, x: Tensor) -> Any:
    """A coefficient [B] beside a state [B, ...]."""
    return c.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(c, Tensor) else c
