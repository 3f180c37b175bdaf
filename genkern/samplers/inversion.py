"""DDIM inversion: from data to the noise that DDIM (eta = 0) leads back to it, (13.13) in the other direction.

    x_t = alpha_t y + sigma_t e,     y = (x_s - sigma_s e) / alpha_s,     e = e_theta(x_s, t),     t one time above s.

The step back from x_t calls the network at (x_t, t); here x_t is not known yet, so it is called at (x_s, t), the one
approximation: encoding and decoding return to the input up to an error of order 1 in the steps. Any prediction is read
as e at time t. One network call a step. Song, Meng, Ermon, arXiv:2010.02502, section 4.3; Dhariwal, Nichol,
arXiv:2105.05233, appendix F.
"""

from __future__ import annotations

import numpy as np

from ..paths import Linear
from ..rows import Out
from .parameterization import OnPath
from .table import Stage, stage


class DDIMInversion:
    """From s up to t."""

    order = 1

    def stages(self, network: OnPath, grid: np.ndarray) -> list[Stage]:
        """grid: times from the data (or a state between) toward the noise."""
        path, table = network.path, []
        for k, (s, t) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            e, alpha_s, sigma_s = path.noise(network.prediction, t), path.alpha(s), path.sigma(s)
            pred = Linear((1.0 - sigma_s * e.x) / alpha_s, -sigma_s * e.m / alpha_s)
            out = Out(y=path.alpha(t), x=path.sigma(t) * e.x, m=path.sigma(t) * e.m)
            table.append(stage(network, t, out, pred=pred, step=k, time=t))
        return table
