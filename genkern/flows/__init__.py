"""Around flows: couplings and pairs on disk, training times, the marginal field, measures, divergences,
dequantisation."""

from .couplings import Independent, Optimal, Sinkhorn
from .dequantization import bits_per_dim, dequantize
from .divergence import Exact, Hutchinson
from .marginal import MarginalField
from .measures import COSTS, curvature, straightness, transport_cost
from .pair_store import Pairs, PairStore
from .times import Beta, LogitNormal, Steps, Times, UShaped

__all__ = [
    "COSTS",
    "Beta",
    "Exact",
    "Hutchinson",
    "Independent",
    "LogitNormal",
    "MarginalField",
    "Optimal",
    "PairStore",
    "Pairs",
    "Sinkhorn",
    "Steps",
    "Times",
    "UShaped",
    "bits_per_dim",
    "curvature",
    "dequantize",
    "straightness",
    "transport_cost",
]
