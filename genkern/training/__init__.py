"""What training needs beside the losses."""

from .ema import EMA

__all__ = ["EMA"]
