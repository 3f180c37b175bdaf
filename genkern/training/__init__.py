"""What training needs beside the losses."""

from .ema import EMA
from .emas import EMASet, PowerDecay
from .pairs import fit_pairs
from .trainer import fit

__all__ = ["EMA", "EMASet", "PowerDecay", "fit", "fit_pairs"]
