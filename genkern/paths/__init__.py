"""Gaussian paths: x_t = alpha(t) x1 + sigma(t) x0, with x0 standard normal and x1 data.

    CondOT      alpha = t, sigma = 1 - (1 - sigma_min) t            eqs. (13.21)-(13.22); data at t = 1
    VE          alpha = 1, sigma = t                                section 13.4; data at t = 0
    DiscreteVP  alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t)      eq. (13.4); t = 0 .. T-1, data below 0
    LinearVP    log alpha^2 = -(the integral of beta(s) ds)         the same with continuous time; data at t = 0
    CosineVP    sigma / alpha = tan(a t + c)                        data at t = 0, up to a noise level
    Cosine, Polynomial, Custom, Reversed                            interpolants.py; data at t = 1
    VelocityOnly                                                    a velocity, without alpha and sigma

The seed's alpha of section 13.1 is the cumulative product, here alphas_cumprod. Schedules of betas are in schedules.py,
what all paths share (predictions and their conversion) in base.py.
"""

from .base import PREDICTIONS, Linear, Path
from .continuous import ContinuousVP, CosineVP, LinearVP
from .discrete import DiscreteVP
from .flows import VE, CondOT, VelocityOnly
from .interpolants import Cosine, Custom, Polynomial, Reversed
from .schedules import SCHEDULES, alphas_cumprod_of, betas, rescale_zero_snr, shift_noise_level

__all__ = [
    "PREDICTIONS",
    "SCHEDULES",
    "VE",
    "CondOT",
    "ContinuousVP",
    "Cosine",
    "CosineVP",
    "Custom",
    "DiscreteVP",
    "Linear",
    "LinearVP",
    "Path",
    "Polynomial",
    "Reversed",
    "VelocityOnly",
    "alphas_cumprod_of",
    "betas",
    "rescale_zero_snr",
    "shift_noise_level",
]
