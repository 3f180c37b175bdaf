"""Around flows: couplings and pairs on disk, training times, the marginal field, measures, divergences,
dequantisation."""

from .conditional import ConditionalPath, Moments, conditional_field
from .couplings import Independent, Optimal, Sinkhorn
from .dequantization import bits_per_dim, dequantize
from .divergence import Exact, Hutchinson
from .gathered import Gathered
from .marginal import MarginalField
from .measures import COSTS, curvature, straightness, transport_cost
from .pair_store import Pairs, PairStore
from .times import Beta, LogitNormal, Steps, Times, UShaped

__all__ = [
    "COSTS",
    "Beta",
    "ConditionalPath",
    "Exact",
    "Gathered",
    "Hutchinson",
    "Independent",
    "LogitNormal",
    "MarginalField",
    "Moments",
    "Optimal",
    "PairStore",
    "Pairs",
    "Sinkhorn",
    "Steps",
    "Times",
    "UShaped",
    "bits_per_dim",
    "conditional_field",
    "curvature",
    "dequantize",
    "straightness",
    "transport_cost",
]
