"""The four methods: loss() and sample() of each; times: of every loss; weightings: of the loss of Diffusion."""

from . import times, weightings
from .consistency import Consistency
from .diffusion import Diffusion
from .flow_matching import FlowMatching
from .rectified_flow import RectifiedFlow

__all__ = ["Consistency", "Diffusion", "FlowMatching", "RectifiedFlow", "times", "weightings"]
