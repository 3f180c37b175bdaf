"""Captured sampling loops: CUDA graphs of the loop in samplers/loop.py, and gk.Loop, which owns them."""

from .loop import Loop, captures_of

__all__ = ["Loop", "captures_of"]
