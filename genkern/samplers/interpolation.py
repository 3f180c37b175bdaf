"""Between two initial states: along the great circle through them, on which Gaussian noise keeps its length.

    z(a) = sin((1 - a) psi) / sin(psi) z_0 + sin(a psi) / sin(psi) z_1,      cos(psi) = z_0 . z_1 / (|z_0| |z_1|)

a sample. Sampled from z(0) to z(1), a deterministic sampler or a consistency function interpolates its samples.

Shoemake 1985, "Animating rotation with quaternion curves"; Song, Dhariwal, Chen, Sutskever, arXiv:2303.01469,
appendix D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import check
from ..fused import apply_row
from ..rows import Out, Row

PARALLEL = 1e-6  # sin(psi) at or below this is 0: z_0 and z_1 point the same way, or opposite ways


def interpolate(z0: Tensor, z1: Tensor, at: int | Sequence[float]) -> Tensor:
    """States on the great circle from z0 to z1, one pass each.

    Args:
        z0, z1: states, as initial noise.  [B, ...], floating.
        at: a in [0, 1], or a number of states >= 2, evenly from 0 to 1.

    Returns:
        [K, B, ...]: the states at every a, of z0's dtype. At 0 and 1 they are z0 and z1. Where these are parallel,
        those on the line between them.

    Raises:
        ValueError, TypeError: an argument is not what it may be.
    """
    check.terms([("z0", z0), ("z1", z1)])
    if isinstance(at, int):
        places: list[float] = np.linspace(0.0, 1.0, check.integer("at", at, 2)).tolist()
    else:
        places = [check.number("at", a, 0.0, 1.0) for a in at]
    a, b = (z.detach().flatten(1).double() for z in (z0, z1))
    # The angle by its half's tangent, which is exact for small and for large angles alike.
    a, b = (torch.nn.functional.normalize(z, dim=1) for z in (a, b))
    psi = 2.0 * torch.atan2(torch.linalg.vector_norm(a - b, dim=1), torch.linalg.vector_norm(a + b, dim=1))
    sin = psi.sin()
    found: list[Tensor] = []
    for place in places:
        of: list[Any] = [torch.where(sin > PARALLEL, ((p * psi).sin() / sin), p) for p in (1.0 - place, place)]
        left, right = (c.to(torch.float64 if z0.dtype == torch.float64 else torch.float32) for c in of)
        found += apply_row(Row((Out(x=left, h=(right,)),)), x=z0, h=(z1,))
    return torch.stack(found)
