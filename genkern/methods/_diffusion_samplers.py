"""The samplers of Diffusion by their names, with the options that each of them has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import check
from ..samplers import DDIM, DDPM, DPMSolver, DPMSolverSDE, EDMHeun, EulerAncestral, UniPC
from ._flow_samplers import given_sampler

SOLVERS: dict[str, Callable[[], Any]] = {
    "euler": lambda: EulerAncestral(0.0),
    "heun": lambda: EDMHeun(),
    "dpmpp_1": lambda: DPMSolver(1),
    "dpmpp_2m": lambda: DPMSolver(2),
    "dpmpp_3m": lambda: DPMSolver(3),
    "dpmpp_1_sde": lambda: DPMSolverSDE(1),
    "dpmpp_2m_sde": lambda: DPMSolverSDE(2),
    "unipc": lambda: UniPC(2),
}
NAMES = ("ddim", "ddpm", "euler_ancestral", *SOLVERS)


def sampler_named(sampler: Any, eta: float | None, final_sigma: float, variance: str) -> Any:
    """A sampler by its name, or as given.

    Args:
        sampler: of NAMES, or a Sampler.
        eta: of "ddim" and "euler_ancestral"; 1 of "ddpm".
        final_sigma: of "ddim" and "ddpm".
        variance: of "ddpm"; with "learned_range" it is put in later.

    Raises:
        ValueError: an unknown name, or an option that the sampler does not have. TypeError: no name and no Sampler.
    """
    shown = repr(check.choice("sampler", sampler, NAMES)) if isinstance(sampler, str) else type(sampler).__name__
    if sampler not in ("ddim", "ddpm", "euler_ancestral") and eta is not None:
        raise ValueError(f"eta: expected None with sampler={shown}, got {eta}")
    if sampler not in ("ddim", "ddpm") and final_sigma != 0.0:
        raise ValueError(f"final_sigma: expected 0 with sampler={shown}, got {final_sigma}")
    if not isinstance(sampler, str):
        return given_sampler(sampler)
    if sampler == "ddim":
        return DDIM(0.0 if eta is None else eta, final_sigma)
    if sampler == "ddpm":
        if eta not in (None, 1.0):
            raise ValueError(f"eta: expected None or 1 with sampler='ddpm', got {eta}")
        return DDPM(final_sigma, "fixed_large" if variance == "fixed_large" else "fixed_small")
    if sampler == "euler_ancestral":
        return EulerAncestral(1.0 if eta is None else eta)
    return SOLVERS[sampler]()
