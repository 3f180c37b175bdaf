"""The loss (13.5) of a batch whose times are known: one pass before the network, the network, one pass after it.

    x_t = alpha x + sigma (z + o + p),     r = m - target(x, z + o)

o is an offset of the noise, p a perturbation of the input alone: the target knows nothing of it. Guttenberg 2023,
"Diffusion with offset noise" (o); Ning et al., arXiv:2301.11706 (p).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import check
from ..fused import apply_row
from ..rows import Out, Row
from ._training import Batch


def residual_loss(
    batch: Batch, prediction: str, t: Tensor, alpha: Tensor, sigma: Tensor, offset: Tensor | None,
    perturbation: Tensor | None, found: Any,
) -> Tensor:  # fmt: skip
    """found(m, x, times, **target) of the prediction's residual: Batch.loss, or what takes its place.

    Args:
        batch: the data, noise and network.
        prediction: of "epsilon", "v", "sample" and "score".
        t, alpha, sigma: times that the network is told and the path's scales there.  [B] each.
        offset, perturbation: o and p.  [B, ...].
    """
    h = tuple(term for term in (offset, perturbation) if term is not None)
    noising = Row((Out(x=alpha, z=sigma, h=(sigma,) * len(h)),))
    (x_t,) = apply_row(noising, x=batch.x, noise=batch.z, h=h, dtypes=(batch.model_dtype,))
    m = batch.call(x_t, t)
    if prediction == "sample":
        return found(m, batch.x, t, x_coef=1.0)
    c_x, c_e = (-sigma, alpha) if prediction == "v" else (0.0, -1.0 if prediction == "score" else 1.0)
    target: dict[str, Any] = {"x_coef": c_x, "noise_coef": c_e, "noise": batch.z}
    if prediction == "score":
        target["m_coef"] = sigma
    if offset is not None:
        target |= {"h": (offset,), "h_coefs": (c_e,)}
    return found(m, batch.x, t, **target)


def added(batch: Batch, name: str, value: Any) -> Tensor | None:
    """A tensor that is added to the noise, expanded to the data's shape. ValueError, TypeError: it does not fit."""
    if value is None:
        return None
    x = batch.x
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    sizes = (1,) * (x.ndim - value.ndim) + tuple(value.shape)
    if value.ndim > x.ndim or any(a not in (1, b) for a, b in zip(sizes, x.shape, strict=True)):
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(x.shape)}, x's, got {tuple(value.shape)}")
    found = value.expand(x.shape)
    check.terms([("x", x), (name, found)])
    return found
