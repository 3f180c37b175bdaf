"""Around flows: couplings, training times, divergences, dequantisation."""

from .couplings import Independent, Optimal, Sinkhorn
from .dequantization import bits_per_dim, dequantize
from .divergence import Exact, Hutchinson
from .times import Beta, LogitNormal, Stratified, Times, Uniform, UShaped

__all__ = [
    "Beta",
    "Exact",
    "Hutchinson",
    "Independent",
    "LogitNormal",
    "Optimal",
    "Sinkhorn",
    "Stratified",
    "Times",
    "UShaped",
    "Uniform",
    "bits_per_dim",
    "dequantize",
]
