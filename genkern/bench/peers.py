"""Other libraries, where installed: their public call that does the same work as a case, with their own overheads.

Each function returns a callable, or raises Missing with the reason. Set-up that a training or sampling script does
once (a scheduler and its timesteps) stays outside what is timed; what it does at every call is inside.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .baselines import Normals
from .world import Case, Run

DDIM_STEPS, TIMESTEPS = 50, 1000


class Missing(Exception):
    """A library is not installed, or does not import."""


def load(module: str) -> Any:
    """A module of another library."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Missing(f"{package} is not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:  # an optional dependency of theirs, or a torch that is too new for them
        raise Missing(f"{package} does not import: {error}") from None


def add(case: Case, name: str, make: Any, *args: Any, note: str = "") -> None:
    """Adds a library to the contenders of a case, or the reason why it is not among them."""
    try:
        case.contenders[name] = make(*args)
        if note:
            case.notes[name] = note
    except Missing as reason:
        case.skipped[name] = str(reason)


def ddim_scheduler(clip: float | None = None) -> Any:
    """diffusers' DDIM on the linear schedule, set to DDIM_STEPS steps of trailing timesteps."""
    scheduler = load("diffusers").DDIMScheduler(
        num_train_timesteps=TIMESTEPS, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        clip_sample=clip is not None, clip_sample_range=clip or 1.0, set_alpha_to_one=True,
        timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(DDIM_STEPS)
    return scheduler


def diffusers_ddim(
    x: Tensor, m: Tensor, t: int, *, clip: float | None = None, eta: float = 0.0, normals: Normals | None = None,
    uncond: Tensor | None = None, scale: float = 1.0,
) -> Run:  # fmt: skip
    """DDIMScheduler.step, after the pipelines' guidance where there is some."""
    scheduler = ddim_scheduler(clip)
    noise = None if normals is None else normals.given  # None: it draws its own

    def run() -> Tensor:
        output = m if uncond is None else uncond + scale * (m - uncond)
        return scheduler.step(output, t, x, eta=eta, variance_noise=noise, return_dict=False)[0]

    return run


def diffusers_add_noise(x: Tensor, timesteps: Tensor, normals: Normals) -> Run:
    """DDPMScheduler.add_noise: looks its coefficients up by timestep."""
    scheduler = load("diffusers").DDPMScheduler(
        num_train_timesteps=TIMESTEPS, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )
    return lambda: scheduler.add_noise(x, normals.like(x), timesteps)


def diffusers_euler(x: Tensor, v: Tensor, steps: int, step: int) -> Run:
    """FlowMatchEulerDiscreteScheduler.step at a given step; its time runs from 1 to 0, so its output is -v."""
    scheduler = load("diffusers").FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)
    scheduler.set_timesteps(sigmas=[1.0 - k / steps for k in range(steps)], device=x.device)
    scheduler.set_begin_index(step)
    t, output = scheduler.timesteps[step], -v

    def run() -> Tensor:
        scheduler._step_index = None  # as at the first step of a loop: it takes the begin index
        return scheduler.step(output, t, x, return_dict=False)[0]

    return run


def k_diffusion_euler(x: Tensor, denoised: Tensor, sigma_t: float, sigma_s: float) -> Run:
    """k_diffusion.sampling.sample_euler over one step, whose network returns `denoised`."""
    sampling = load("k_diffusion.sampling")
    sigmas = torch.tensor([sigma_t, sigma_s], device=x.device)
    return lambda: sampling.sample_euler(lambda x, sigma: denoised, x, sigmas, disable=True)


def flow_matching_path(x: Tensor, t: Tensor, normals: Normals) -> Run:
    """flow_matching: x_t and its velocity on the conditional optimal-transport path."""
    path = load("flow_matching.path").CondOTProbPath()

    def run() -> tuple[Tensor, Tensor]:
        found = path.sample(x_0=normals.like(x), x_1=x, t=t)
        return found.x_t, found.dx_t

    return run


def torchcfm_path(x: Tensor, t: Tensor, normals: Normals) -> Run:
    """torchcfm: x_t and its velocity by ConditionalFlowMatcher(sigma=0)."""
    matcher = load("torchcfm").ConditionalFlowMatcher(sigma=0.0)

    def run() -> tuple[Tensor, Tensor]:
        _, x_t, target = matcher.sample_location_and_conditional_flow(normals.like(x), x, t=t)
        return x_t, target

    return run


def torchdiffeq_loop(network: Any, x0: Tensor, steps: int, method: str) -> Run:
    """torchdiffeq.odeint with a fixed grid."""
    odeint = load("torchdiffeq").odeint
    grid = torch.linspace(0.0, 1.0, steps + 1, device=x0.device)
    batch = x0.shape[0]
    return lambda: odeint(lambda t, x: network(x, t.expand(batch)), x0, grid, method=method)[-1]


def flow_matching_loop(network: Any, x0: Tensor, steps: int, method: str) -> Run:
    """flow_matching's ODESolver."""
    solver = load("flow_matching.solver").ODESolver(lambda x, t: network(x, t.expand(x.shape[0])))
    grid = torch.linspace(0.0, 1.0, steps + 1, device=x0.device)
    return lambda: solver.sample(x0, step_size=None, method=method, time_grid=grid)


def diffusers_euler_loop(negated: Any, x0: Tensor, times: Tensor) -> Run:
    """FlowMatchEulerDiscreteScheduler in a pipeline's loop. negated: the network, its output times -1."""
    scheduler = load("diffusers").FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)
    steps = times.shape[0]
    sigmas = [1.0 - k / steps for k in range(steps)]

    def run() -> Tensor:
        scheduler.set_timesteps(sigmas=sigmas, device=x0.device)
        x = x0
        for k, t in enumerate(scheduler.timesteps):
            x = scheduler.step(negated(x, times[k]), t, x, return_dict=False)[0]
        return x

    return run


def diffusers_ddim_loop(network: Any, x0: Tensor) -> Run:
    """DDIMScheduler in a pipeline's loop."""
    scheduler = ddim_scheduler()
    batch = x0.shape[0]

    def run() -> Tensor:
        scheduler.set_timesteps(DDIM_STEPS, device=x0.device)
        x = x0
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(batch)), t, x, return_dict=False)[0]
        return x

    return run
