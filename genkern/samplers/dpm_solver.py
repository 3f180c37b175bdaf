"""DPM-Solver++ in its multistep form: exponential integration of the probability-flow ODE in the predicted data y.

    x_s = (sigma_s / sigma_t) x + alpha_s h (phi_1 y_0 + phi_2 D_1 + 2 phi_3 D_2),    phi_k = phi_k(-h)    (log_snr.py)

with h = lambda_s - lambda_t; y_0, y_1, y_2 the predictions at this step and the two before, whose steps were h_1, h_2:

    order 1     D_1 = D_2 = 0                                        the DDIM step
    order 2     phi_2 D_1 replaced by phi_1 d / 2,  d = (h / h_1)(y_0 - y_1)       "2M", the midpoint rule
    order 3     D_1 = d + D_2 h_1 / h,  D_2 = (d - d') h / (h_1 + h_2),  d' = (h / h_2)(y_1 - y_2)      "3M"

D_1 and D_2 are the first and half the second derivative of the polynomial through the three, times h and h^2. The
published algorithm, and diffusers and k-diffusion after it, have phi_3 D_2 without the 2, which is of order 2 alone;
`as_published` gives that one.

One network call a step; earlier predictions are kept, so that the first steps have a lower order. The step to
sigma = 0 has order 1: x_s = alpha_s y. Lu et al., arXiv:2211.01095, algorithm 2 (2M) and appendix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .. import check
from ..rows import Out
from .log_snr import Step, phi, ratio, steps
from .parameterization import OnPath
from .table import Stage, stage

FEW = 15  # steps, below which the last ones are of a lower order


class DPMSolver:
    """DPM-Solver++ of order 1, 2 or 3, multistep.

    Args:
        order: 1, 2 or 3.
        lower_order_final: with fewer than 15 steps, end with order 2 (of 3) and order 1, which is steadier.
        as_published: of order 3: half the weight of D_2, to reproduce the published algorithm's results.

    Raises:
        ValueError: another order.
    """

    def __init__(self, order: int = 2, lower_order_final: bool = True, as_published: bool = False) -> None:
        self.order = check.integer("order", order, 1, 3)
        self.lower_order_final = bool(lower_order_final)
        self._curvature = 1.0 if as_published else 2.0

    def stages(self, network: OnPath, grid: np.ndarray) -> list[Stage]:
        walk = steps(network.path, grid)
        return multistep(network, walk, orders(walk, self.order, self.lower_order_final), self._out)

    def _out(self, order: int, step: Step, before: list[Step]) -> Out:
        """y is y_0; h are y_1 and y_2. before: the steps before this one, the last first."""
        if order == 1:
            return Out(y=step.gain, x=step.decay)
        d = ratio(step.h, before[0].h)
        if order == 2:
            half = 0.5 * d * step.gain
            return Out(y=step.gain + half, x=step.decay, h=(-half,))
        e = ratio(step.h, before[1].h)
        # d = h/h_1, e = h/h_2: w = e / (d + e), h / (h_1 + h_2) = d e / (d + e)
        first, second = (step.alpha_s * step.h * c * phi(k, -step.h) for k, c in ((2, 1.0), (3, self._curvature)))
        change = (first * e + second * d * e) / (d + e)  # the weight of d - d'
        slope, earlier = (first + change) * d, change * e  # the weights of y_0 - y_1, and of -(y_1 - y_2)
        return Out(y=step.gain + slope, x=step.decay, h=(-slope - earlier, earlier))


def orders(walk: list[Step], order: int, lower_order_final: bool) -> list[int]:
    """The order of every step: as many predictions as are known, lower at the end, and 1 on the step to sigma = 0."""
    last = len(walk) - 1
    found = [min(order, k + 1) for k in range(len(walk))]
    if lower_order_final and len(walk) < FEW:
        found = [min(o, last - k + 1) for k, o in enumerate(found)]
    return [1 if step.sigma_s == 0.0 else o for o, step in zip(found, walk, strict=True)]


def multistep(
    network: OnPath, walk: list[Step], used: list[int], row: Callable[[int, Step, list[Step]], Out]
) -> list[Stage]:
    """One stage a step: y is kept where a later step reads it, in as many slots as predictions are read."""
    slots = max(max(used) - 1, 1)
    table = []
    for k, (step, order) in enumerate(zip(walk, used, strict=True)):
        out = row(order, step, walk[:k][::-1])
        wanted = any(k + back < len(used) and used[k + back] > back for back in range(1, slots + 1))
        table.append(
            stage(
                network, step.t, out, pred=network.data(step.t), step=k, time=step.s,
                reads=tuple((k - back) % slots for back in range(1, order)),
                keeps=((k % slots, Out(y=1.0)),) if wanted else (),
            )
        )  # fmt: skip
    return table
