"""The four methods: loss() and sample() of each."""

from .consistency import Consistency
from .diffusion import Diffusion
from .flow_matching import FlowMatching
from .rectified_flow import RectifiedFlow

__all__ = ["Consistency", "Diffusion", "FlowMatching", "RectifiedFlow"]
