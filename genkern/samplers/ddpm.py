"""DDPM: eq. (13.13) with the seed's sigma_t, that is eta = 1: the ancestral sampler of the Markov chain (13.3).

    x_{t-1} ~ N(mean, sigma_t^2),   sigma_t^2 = (1 - abar_{t-1}) / (1 - abar_t) (1 - abar_t / abar_{t-1})

One network call and one draw of noise a step. Ho, Jain, Abbeel, arXiv:2006.11239.
"""

from __future__ import annotations

from .ddim import DDIM


class DDPM(DDIM):
    """DDIM with eta = 1."""

    def __init__(self, final_sigma: float = 0.0) -> None:
        super().__init__(eta=1.0, final_sigma=final_sigma)
