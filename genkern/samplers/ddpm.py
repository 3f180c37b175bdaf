"""DDPM: eq. (13.13) with the seed's sigma_t, that is eta = 1: the ancestral sampler of the Markov chain (13.3).

    x_{t-1} ~ N(mean, variance),    mean that of q(x_{t-1} | x_t, y), (13.7) with the DDPM's sigma_t

    fixed_small    sigma_t^2 = (1 - abar_{t-1}) / (1 - abar_t) (1 - abar_t / abar_{t-1}): the posterior's
    fixed_large    1 - abar_t / abar_{t-1}: the chain's own, beta_t

The first is the best of data that is one point, the second of data that is N(0, I). The step to clean data adds
final_sigma, whichever it is. One network call and one draw of noise a step. Ho, Jain, Abbeel, arXiv:2006.11239,
section 3.2.
"""

from __future__ import annotations

import math

from .. import check
from ..rows import Out
from .ddim import DDIM
from .parameterization import OnPath

VARIANCES = ("fixed_small", "fixed_large")


class DDPM(DDIM):
    """DDIM with eta = 1.

    Args:
        final_sigma: as of DDIM.
        variance: "fixed_small" or "fixed_large".

    Raises:
        ValueError: another variance, or final_sigma is negative.
    """

    def __init__(self, final_sigma: float = 0.0, variance: str = "fixed_small") -> None:
        super().__init__(eta=1.0, final_sigma=final_sigma)
        self.variance = check.choice("variance", variance, VARIANCES)

    def _out(self, network: OnPath, t: float, s: float) -> Out:
        out = super()._out(network, t, s)
        if self.variance == "fixed_large" and network.path.sigma(s) > 0.0:
            kept = network.path.alpha(t) / network.path.alpha(s)
            out.z = math.sqrt(max(1.0 - kept * kept, 0.0))
        return out
