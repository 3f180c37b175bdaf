"""Samplers: one loop, and a table of rows for each."""

from ..threshold import DynamicThreshold
from .ab2 import AB2
from .along import Along
from .ancestral import EulerAncestral
from .callback import STOP
from .consistency import Multistep
from .ddim import DDIM
from .ddpm import DDPM
from .dopri5 import Dopri5
from .dpm_solver import DPMSolver
from .dpm_solver_sde import DPMSolverSDE
from .edm_heun import EDMHeun
from .euler import Euler
from .flow_refresh import CPS, Overshoot
from .flow_sde import EulerMaruyama
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
    "CPS",
    "DDIM",
    "DDIMInversion",
    "DDPM",
    "RK4",
    "Along",
    "DPMSolver",
    "DPMSolverSDE",
    "Dopri5",
    "DynamicThreshold",
    "EDMHeun",
    "Euler",
    "EulerAncestral",
    "EulerMaruyama",
    "Heun",
    "Midpoint",
    "Multistep",
    "NonMarkovian",
    "OnPath",
    "Options",
    "Overshoot",
    "Parameterization",
    "Preconditioned",
    "Sampler",
    "Stage",
    "UniPC",
    "interpolate",
    "run",
]
