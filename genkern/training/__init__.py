"""What training needs beside the losses."""

from .ema import EMA
from .trainer import fit

__all__ = ["EMA", "fit"]
