"""Samplers: one loop, and a table of rows for each."""

from .ancestral import EulerAncestral
from .callback import STOP
from .consistency import Multistep
from .ddim import DDIM
from .ddpm import DDPM
from .dpm_solver import DPMSolver
from .dpm_solver_sde import DPMSolverSDE
from .euler import Euler
from .guidance import APG
from .heun import Heun
from .inversion import DDIMInversion
from .loop import Options, run
from .parameterization import OnPath, Parameterization, Preconditioned
from .table import Sampler, Stage
from .unipc import UniPC

__all__ = [
    "STOP",
    "APG",
    "DDIM",
    "DDIMInversion",
    "DDPM",
    "DPMSolver",
    "DPMSolverSDE",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Multistep",
    "OnPath",
    "Options",
    "Parameterization",
    "Preconditioned",
    "Sampler",
    "Stage",
    "UniPC",
    "run",
]
