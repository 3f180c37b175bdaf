"""The four methods: loss() and sample() of each; weightings and times: of the loss of Diffusion; curricula and
metrics: of Consistency's training."""

from . import curricula, metrics, times, weightings
from .consistency import Consistency
from .diffusion import Diffusion
from .flow_matching import FlowMatching
from .rectified_flow import RectifiedFlow
from .teachers import PathTeacher

__all__ = [
    "Consistency",
    "Diffusion",
    "FlowMatching",
    "PathTeacher",
    "RectifiedFlow",
    "curricula",
    "metrics",
    "times",
    "weightings",
]
