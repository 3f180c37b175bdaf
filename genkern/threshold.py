"""Dynamic thresholding of the predicted data.

    y' = clamp(y, -s, s) / s,      s = min(max(1, quantile(|y|, ratio)), max_value)

s is a number a sample, so that data in [-1, 1] stay there without saturating where guidance leads y far beyond.
Saharia et al., arXiv:2205.11487, section 2.3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from . import check
from .rows import Out, Row
from .stat import quantile_row

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class DynamicThreshold:
    """clip= of sample() and of the DDIM steps: the predicted data clamped to [-s, s] and divided by s, s of each
    sample's own numbers.

    Args:
        ratio: which quantile of |y| is s, 0 to 1.
        max_value: the most that s may be, >= 1; infinite for none, as in the paper. 1 is clip=1.0, which diffusers'
            `thresholding` does by default (its dynamic_thresholding_ratio is ratio, its sample_max_value max_value).

    Raises:
        ValueError: a number outside its range. TypeError: no number.

    Source: arXiv:2205.11487, section 2.3.
    """

    ratio: float = 0.995
    max_value: float = math.inf

    def __post_init__(self) -> None:
        check.number("ratio", self.ratio, 0.0, 1.0)
        if self.max_value != math.inf:
            check.number("max_value", self.max_value, 1.0)

    def bound(self, quantile: Tensor) -> Tensor:
        """s from the quantiles of |y|; NaN stays NaN."""
        return quantile.clamp(1.0, None if self.max_value == math.inf else self.max_value)

    def applied(self, y: Tensor) -> Tensor:
        """y', differentiably, of the same bits with a gradient and without.  [B, ...]."""
        from .functions import differentiated
        from .reference import stat

        if differentiated((y,)):
            quantile = stat.quantile(y, self.ratio)
        else:
            quantile = quantile_row(Row((Out(x=1.0),)), self.ratio, x=y)
        s = self.bound(quantile).reshape(-1, *[1] * (y.ndim - 1))
        return y.clamp(-s, s) / s
