"""Around flows: training times, divergences, dequantisation."""

from .dequantization import bits_per_dim, dequantize
from .divergence import Exact, Hutchinson
from .times import Beta, LogitNormal, Stratified, Times, Uniform, UShaped

__all__ = [
    "Beta",
    "Exact",
    "Hutchinson",
    "LogitNormal",
    "Stratified",
    "Times",
    "UShaped",
    "Uniform",
    "bits_per_dim",
    "dequantize",
]
