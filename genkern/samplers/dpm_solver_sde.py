"""SDE-DPM-Solver++: DPM-Solver++ for the reverse-time SDE, with new noise in every step.

    x_s = (sigma_s / sigma_t) e^{-h} x + alpha_s (1 - e^{-2h}) (y_0 + d / 2) + sigma_s sqrt(1 - e^{-2h}) z,

h = lambda_s - lambda_t (log_snr.py); order 1 has d = 0 (on a variance-preserving path the DDPM's step, (13.13)),
order 2 has d = (h / h_1)(y_0 - y_1) from the prediction before. The orders hold for the mean and the variance.
Lu et al., arXiv:2211.01095, SDE-DPM-Solver++(1) and (2M).
"""

from __future__ import annotations

import math

import numpy as np

from .. import check
from ..rows import Out
from .dpm_solver import multistep, orders
from .log_snr import Step, ratio, steps
from .parameterization import OnPath
from .table import Stage


class DPMSolverSDE:
    """SDE-DPM-Solver++ of order 1 or 2, multistep.

    Args:
        order: 1 or 2.
        lower_order_final: with fewer than 15 steps, end with order 1.

    Raises:
        ValueError: another order.
    """

    def __init__(self, order: int = 2, lower_order_final: bool = True) -> None:
        self.order = check.integer("order", order, 1, 2)
        self.lower_order_final = bool(lower_order_final)

    def stages(self, network: OnPath, grid: np.ndarray) -> list[Stage]:
        walk = steps(network.path, grid)
        return multistep(network, walk, orders(walk, self.order, self.lower_order_final), self._out)

    @staticmethod
    def _out(order: int, step: Step, before: list[Step]) -> Out:
        new = -math.expm1(-2.0 * step.h)
        gain, half = step.alpha_s * new, 0.0
        if order == 2:
            half = 0.5 * ratio(step.h, before[0].h) * gain
        return Out(
            y=gain + half,
            x=step.decay * math.exp(-step.h),
            h=(-half,) if order == 2 else (),
            z=step.sigma_s * math.sqrt(new),
        )
