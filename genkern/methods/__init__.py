"""The four methods: loss() and sample() of each; weightings and times: of the loss of Diffusion; curricula: of
Consistency's training."""

from . import curricula, times, weightings
from .consistency import Consistency
from .diffusion import Diffusion
from .flow_matching import FlowMatching
from .rectified_flow import RectifiedFlow

__all__ = ["Consistency", "Diffusion", "FlowMatching", "RectifiedFlow", "curricula", "times", "weightings"]
