"""Tools around flows: divergences and densities."""

from .dequantization import bits_per_dim, dequantize
from .divergence import Exact, Hutchinson

__all__ = ["Exact", "Hutchinson", "bits_per_dim", "dequantize"]
