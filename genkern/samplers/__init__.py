"""Samplers: one loop, and a table of rows for each."""

from .consistency import Multistep
from .ddim import DDIM
from .ddpm import DDPM
from .euler import Euler
from .heun import Heun
from .loop import Options, run
from .parameterization import OnPath, Parameterization, Preconditioned
from .table import Sampler, Stage

__all__ = [
    "DDIM",
    "DDPM",
    "Euler",
    "Heun",
    "Multistep",
    "OnPath",
    "Options",
    "Parameterization",
    "Preconditioned",
    "Sampler",
    "Stage",
    "run",
]
