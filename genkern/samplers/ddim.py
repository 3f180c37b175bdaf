"""DDIM: the non-Markovian family, eq. (13.13).

    x_s = alpha_s y + sqrt(sigma_s^2 - d^2) eps + d z,      y = (x_t - sigma_t eps) / alpha_t,
    d   = eta (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2).

eta = 0 is the implicit model: no noise is drawn. eta = 1 is the DDPM. One network call a step, order 1. With y clamped,
eps is that of the clamped y, as (13.10) has it: q(x_s | x_t, y). The last step is the case t = 1 of (13.10): from y to
N(y, final_sigma^2). Song, Meng, Ermon, arXiv:2010.02502.
"""

from __future__ import annotations

import math

import numpy as np

from .. import check
from ..rows import ROUNDING, Out
from .nonmarkovian import as_floats, backward
from .parameterization import OnPath
from .table import Stage, stage


class DDIM:
    """Eq. (13.13) on a Gaussian path.

    Args:
        eta: >= 0; above 1 only as far as sigma_s^2 - d^2 stays >= 0.
        final_sigma: standard deviation of the noise that the step to sigma = 0 adds, >= 0: the seed's sigma_1 in
            (13.10). The DDPM's own is 0.

    Raises:
        ValueError: eta or final_sigma is negative; an eta for which sigma_s^2 < d^2 (when the stages are made).
    """

    order = 1

    def __init__(self, eta: float = 0.0, final_sigma: float = 0.0) -> None:
        self.eta = check.number("eta", eta, 0.0)
        self.final_sigma = check.number("final_sigma", final_sigma, 0.0)

    def stages(self, network: OnPath, grid: np.ndarray) -> list[Stage]:
        table = []
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            out = self._out(network, t, s)
            table.append(stage(network, t, out, pred=network.data(t), step=k, time=s))
        return table

    def _out(self, network: OnPath, t: float, s: float) -> Out:
        path = network.path
        alpha_t, sigma_t, alpha_s, sigma_s = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
        if sigma_s == 0.0:
            return Out(y=alpha_s, z=self.final_sigma)
        d = self.eta * sigma_s / sigma_t * math.sqrt(max(1.0 - (alpha_t / alpha_s) ** 2, 0.0))
        rest = sigma_s**2 - d**2
        if rest < -ROUNDING * sigma_s**2:
            raise ValueError(
                f"eta: expected at most {self.eta * sigma_s / d:.6g}, so that sigma_s^2 - d^2 >= 0 on the step from "
                f"t = {t:g} to {s:g}, got {self.eta:g}"
            )
        return as_floats(backward(alpha_t, sigma_t, alpha_s, sigma_s, d))
