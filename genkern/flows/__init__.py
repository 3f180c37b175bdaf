"""Around flows: couplings, training times, the marginal field, divergences, dequantisation."""

from .couplings import Independent, Optimal, Sinkhorn
from .dequantization import bits_per_dim, dequantize
from .divergence import Exact, Hutchinson
from .marginal import MarginalField
from .times import Beta, LogitNormal, Stratified, Times, Uniform, UShaped

__all__ = [
    "Beta",
    "Exact",
    "Hutchinson",
    "Independent",
    "LogitNormal",
    "MarginalField",
    "Optimal",
    "Sinkhorn",
    "Stratified",
    "Times",
    "UShaped",
    "Uniform",
    "bits_per_dim",
    "dequantize",
]
