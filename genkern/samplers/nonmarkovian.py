"""The non-Markovian family, eqs. (13.6)-(13.8), (13.10): one step of it in each direction, and its sampler.

With data y, a time s below t, and d the seed's sigma_t, 0 <= d <= sigma_s,

    q(x_s | x_t, y) = N(alpha_s y + e (x_t - alpha_t y) / sigma_t, d^2),    e = sqrt(sigma_s^2 - d^2)          (13.7)
    q(x_t | x_s, y) = N(alpha_t y + (e sigma_t / sigma_s^2)(x_s - alpha_s y), (d sigma_t / sigma_s)^2)         (13.8)

The first keeps the marginals N(alpha y, sigma^2) for every d: from x_t of its marginal, e^2 + d^2 = sigma_s^2. The
second is Bayes' rule: its precision is 1 / sigma_t^2 + e^2 / (d sigma_t)^2 = (sigma_s / (d sigma_t))^2. With the DDPM's

    d = (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2),

it does not depend on y: x_t = (alpha_t / alpha_s) x_s + sqrt(1 - alpha_t^2 / alpha_s^2) z, the chain (13.3). Where s is
clean data, sigma_s = 0, it is (13.4). Song, Meng, Ermon, arXiv:2010.02502, section 3 and appendix B.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import check
from ..paths.schedules import numbers
from ..rows import ROUNDING, Out
from .parameterization import OnPath
from .table import Stage, stage


def backward(alpha_t: Any, sigma_t: Any, alpha_s: Any, sigma_s: Any, d: Any) -> Out:
    """(13.7): x_s by x = x_t, y and z; floats or arrays, 0 <= d <= sigma_s up to rounding."""
    e = np.sqrt(np.maximum(sigma_s**2 - d**2, 0.0))
    return Out(y=alpha_s - e * alpha_t / sigma_t, x=e / sigma_t, z=d)


def forward(alpha_t: Any, sigma_t: Any, alpha_s: Any, sigma_s: Any, d: Any) -> Out:
    """(13.8): x_t by x = x_s, y and z; floats or arrays, 0 <= d <= sigma_s up to rounding."""
    clean = np.asarray(sigma_s) == 0.0
    least = np.where(clean, 1.0, sigma_s)
    e = np.where(clean, 0.0, np.sqrt(np.maximum(1.0 - (d / least) ** 2, 0.0)) * sigma_t / least)
    return Out(y=alpha_t - e * alpha_s, x=e, z=np.where(clean, sigma_t, d * sigma_t / least))


def ddpm_std(alpha_t: Any, sigma_t: Any, alpha_s: Any, sigma_s: Any) -> Any:
    """The DDPM's d: floats or arrays."""
    return sigma_s / sigma_t * np.sqrt(np.maximum(1.0 - (alpha_t / alpha_s) ** 2, 0.0))


class NonMarkovian:
    """Steps with any sigma of the family.

    Args:
        posterior_std: the seed's sigma, a number a step of the grid in the order in which it is walked, >= 0 and at
            most sigma_s of the time that the step leads to. That of the step to clean data, sigma_1 of the case t = 1
            of (13.10), is any number >= 0.

    Raises:
        ValueError: a negative number; when the stages are made, another count than the steps', or one above sigma_s.
    """

    order = 1

    def __init__(self, posterior_std: Any) -> None:
        self.posterior_std = numbers("posterior_std", posterior_std)
        if self.posterior_std.ndim != 1:
            raise ValueError(f"posterior_std: expected one dimension, got shape {self.posterior_std.shape}")
        check.inside("posterior_std", self.posterior_std, 0.0, np.inf)

    def stages(self, network: OnPath, grid: np.ndarray) -> list[Stage]:
        if self.posterior_std.size != grid.size - 1:
            raise ValueError(
                f"posterior_std: expected {grid.size - 1} numbers, one a step, got {self.posterior_std.size}"
            )
        path, table = network.path, []
        for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            d, sigma_s = float(self.posterior_std[k]), path.sigma(s)
            if sigma_s == 0.0:
                out = Out(y=path.alpha(s), z=d)
            else:
                if d > sigma_s * (1.0 + ROUNDING):
                    raise ValueError(
                        f"posterior_std: expected at most sigma_s = {sigma_s:g} on the step from t = {t:g} to {s:g}, "
                        f"got {d:g}"
                    )
                out = as_floats(backward(path.alpha(t), path.sigma(t), path.alpha(s), sigma_s, d))
            table.append(stage(network, t, out, pred=network.data(t), step=k, time=s))
        return table


def as_floats(out: Out) -> Out:
    """The same of plain floats."""
    return Out(y=float(out.y), x=float(out.x), m=float(out.m), z=float(out.z))
