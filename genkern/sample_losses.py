"""The losses of samples from reduce's sums, weighted and reduced over the batch:

    l = S / n                     S = sum mask rho(r), n = sum mask, of a mask
    l = sqrt(S + c^2) - c         pseudo-Huber, rho(r) = r^2
    l = S                         else
    L = scale w l                 a sample, or the sum or the mean of these over the batch

Of torch tensors and NumPy arrays; loss_function.py has the derivative by S.
"""

from __future__ import annotations

from typing import Any

Array = Any  # a torch tensor or a NumPy array


def reduced(losses: Array, reduction: str) -> Array:
    """Losses of samples, [B], as they are ("none"), or their "sum" or "mean"; of an empty batch both are 0."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" and losses.shape[0] else losses.sum()


def formula(
    sums: Array, c: float | None, masked: bool, weight: Array | None, scale: float, reduction: str
) -> tuple[Array, Array | None]:
    """L, and d: dL/dS is scale w / n with d = n, scale w / (2 sqrt(S + c^2)) with d the root, or scale w with None.

    Args:
        sums: of fused.reduce_row.  [B, 2].
        c: of the pseudo-Huber loss; None: another.
        masked: whether l is the mean over a mask.
        weight: w, [B] or [1], of the sums' dtype; None: 1.
        scale: a number.
        reduction: as in reduced().
    """
    total, divisor = sums[:, 0], None
    losses = total
    if c is not None:
        divisor = (total + c * c) ** 0.5
        losses = divisor - c
    elif masked:
        count = sums[:, 1]
        divisor = count + (count == 0)
        losses = total / divisor
    if weight is not None:
        losses = losses * weight
    losses = reduced(losses, reduction)
    # A loss is no view of the sums.
    return losses if scale == 1.0 and losses is not total else losses * scale, divisor
