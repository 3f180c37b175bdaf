"""What training needs beside the losses."""

from .checkpoint import Checkpoint
from .ema import EMA
from .emas import EMASet, PowerDecay
from .guard import Guard
from .pairs import fit_pairs
from .posthoc import reconstruct
from .trainer import fit

__all__ = ["EMA", "Checkpoint", "EMASet", "Guard", "PowerDecay", "fit", "fit_pairs", "reconstruct"]
