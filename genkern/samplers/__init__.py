"""Samplers: one loop, and a table of rows for each."""

from .ab2 import AB2
from .along import Along
from .ancestral import EulerAncestral
from .callback import STOP
from .consistency import Multistep
from .ddim import DDIM
from .ddpm import DDPM
from .dpm_solver import DPMSolver
from .dpm_solver_sde import DPMSolverSDE
from .edm_heun import EDMHeun
from .euler import Euler
from .guidance import APG
from .heun import Heun
from .interpolation import interpolate
from .inversion import DDIMInversion
from .loop import Options, run
from .midpoint import Midpoint
from .nonmarkovian import NonMarkovian
from .parameterization import OnPath, Parameterization, Preconditioned
from .rk4 import RK4
from .table import Sampler, Stage
from .unipc import UniPC

__all__ = [
    "STOP",
    "AB2",
    "APG",
    "DDIM",
    "DDIMInversion",
    "DDPM",
    "RK4",
    "Along",
    "DPMSolver",
    "DPMSolverSDE",
    "EDMHeun",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Midpoint",
    "Multistep",
    "NonMarkovian",
    "OnPath",
    "Options",
    "Parameterization",
    "Preconditioned",
    "Sampler",
    "Stage",
    "UniPC",
    "interpolate",
    "run",
]
