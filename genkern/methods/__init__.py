"""The methods: loss() and sample() of each; times: of every loss; weightings: of the loss of Diffusion; curricula and
metrics: of Consistency's training."""

from . import curricula, metrics, times, weightings
from .conditional import ConditionalFlowMatching
from .consistency import Consistency
from .diffusion import Diffusion
from .flow_matching import FlowMatching
from .mean_flow import MeanFlow
from .rectified_flow import RectifiedFlow
from .schrodinger_bridge import SchrodingerBridge
from .teachers import PathTeacher
from .time_search import search_times
from .trigflow import TrigFlow
from .zero_shot import Blocks, Colours

__all__ = [
    "Blocks",
    "Colours",
    "ConditionalFlowMatching",
    "Consistency",
    "Diffusion",
    "FlowMatching",
    "MeanFlow",
    "PathTeacher",
    "RectifiedFlow",
    "SchrodingerBridge",
    "TrigFlow",
    "curricula",
    "metrics",
    "search_times",
    "times",
    "weightings",
]
