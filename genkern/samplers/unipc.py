"""UniPC: a multistep predictor, corrected with the network's output at the point it predicted; no further calls.

At a time t with predicted data y_0 there, y_1 and y_2 at the two times before, and steps h_1 (the one that led to t)
and h_2 (the one before) in lambda (log_snr.py), phi_k = phi_k(-h_1), B(h) = e^h - 1 ("bh2"):

    corrected at t     x^c = (sigma_t / sigma_1) x^c_1
                             + alpha_t h_1 phi_1 (y_1 + rho_1 (h_1 / h_2) (y_1 - y_2) + rho_2 (y_0 - y_1)),
                       rho_1 + rho_2 = phi_2 / phi_1,     -(h_2 / h_1) rho_1 + rho_2 = 2 phi_3 / phi_1
    predicted at s     x_s = (sigma_s / sigma_t) x^c + alpha_s h phi_1(-h) (y_0 + (h / h_1) (y_0 - y_1) / 2)

with x^c_1, sigma_1 the corrected state and the scale one time before. Order 1 has rho_1 = 0, rho_2 = 1/2, and no
difference in the predictor. Both are one row: it reads x^c_1, y_1 and y_2, and writes x_s, y_0 and x^c.
Zhao, Bai, Rao, Zhou, Lu, arXiv:2302.04867, section 3 and appendix (predicting data).
"""

from __future__ import annotations

import numpy as np

from .. import check
from ..rows import Out
from .log_snr import Step, phi, ratio, steps
from .parameterization import OnPath
from .table import Stage, stage

CORRECTED = 0  # the slot of x^c; the predictions alternate between slots 1 and 2


class UniPC:
    """UniPC of order 1 or 2 (bh2).

    Args:
        order: 1 or 2, of the predictor; the corrector adds one.
        lower_order_final: end with order 1.

    Raises:
        ValueError: another order.
    """

    def __init__(self, order: int = 2, lower_order_final: bool = True) -> None:
        self.order = check.integer("order", order, 1, 2)
        self.lower_order_final = bool(lower_order_final)

    def stages(self, network: OnPath, grid: np.ndarray) -> list[Stage]:
        walk = steps(network.path, grid)
        last = len(walk) - 1
        used = [min(self.order, k + 1) for k in range(len(walk))]
        if self.lower_order_final:
            used[last] = 1
        if walk[last].sigma_s == 0.0:
            used[last] = 1
        table = []
        for k, step in enumerate(walk):
            corrected = _corrected(k, walk, used)
            predicted = _predicted(used[k], step, walk[k - 1] if k else None)
            h = [predicted.x * c for c in corrected.h]
            if predicted.h:
                h[1] += predicted.h[0]
            out = Out(y=predicted.y + predicted.x * corrected.y, x=predicted.x * corrected.x, h=tuple(h))
            reads = (CORRECTED, 1 + (k - 1) % 2, 1 + k % 2)[: len(h)]
            keeps = ((CORRECTED, corrected), (1 + k % 2, Out(y=1.0)))
            table.append(
                stage(
                    network, step.t, out, pred=network.data(step.t), step=k, time=step.s, reads=reads,
                    keeps=keeps if k < last else (),
                )
            )  # fmt: skip
        return table


def _predicted(order: int, step: Step, before: Step | None) -> Out:
    """x is x^c, y is y_0, h[0] is y_1."""
    if order == 1 or before is None:
        return Out(y=step.gain, x=step.decay)
    half = 0.5 * ratio(step.h, before.h) * step.gain
    return Out(y=step.gain + half, x=step.decay, h=(-half,))


def _corrected(k: int, walk: list[Step], used: list[int]) -> Out:
    """x^c where step k starts: y is y_0, h are x^c_1, y_1 and y_2; x is the state, which the first step starts from."""
    if k == 0:
        return Out(x=1.0)
    step = walk[k - 1]
    if used[k - 1] == 1:
        return Out(y=0.5 * step.gain, h=(step.decay, 0.5 * step.gain))
    back = ratio(step.h, walk[k - 2].h)  # h_1 / h_2
    phi_1 = phi(1, -step.h)
    total, weighted = phi(2, -step.h) / phi_1, 2.0 * phi(3, -step.h) / phi_1
    slope = back * (total - weighted) * back / (1.0 + back)  # rho_1 h_1 / h_2
    rho_2 = total - (total - weighted) * back / (1.0 + back)
    return Out(y=step.gain * rho_2, h=(step.decay, step.gain * (1.0 + slope - rho_2), -step.gain * slope))
