"""The samplers beside diffusers' schedulers: the same network, start and noise, everything in float64.

diffusers builds its tables in float32 and computes some steps in it. Here its modules are run with `float32` meaning
float64, so that what is compared is the formulas and the grids, not the roundings of tables. The network is told
the same times: some schedulers cut a time between two timesteps off, which diffusion.sample() rounds. Where a scheduler
keeps x / alpha, the start is divided, and the result is at alpha = 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import genkern as gk
from genkern.samplers import DDPM, DPMSolver

F64 = torch.float64
SHAPE = (4, 3, 5)
STEPS = 10
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One sampler: its names here and there, and the options of both."""

    sampler: Any
    scheduler: str
    options: dict[str, Any]  # of Diffusion.sample
    config: dict[str, Any]  # of the scheduler
    step: dict[str, Any] = dataclasses.field(default_factory=dict)  # of scheduler.step
    scaled: bool = False  # whether the scheduler keeps x / alpha
    steps: int = STEPS
    predictions: tuple[str, ...] = tuple(PREDICTIONS)


DPM = {"final_sigmas_type": "zero", "timestep_spacing": "trailing"}
SDE = {**DPM, "algorithm_type": "sde-dpmsolver++"}
THRESHOLD = gk.DynamicThreshold(0.8, 1.5)
THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5}
CASES = {
    "ddim": Case("ddim", "DDIMScheduler", {"spacing": "leading"}, {"clip_sample": False}),
    "ddim, eta = 0.7": Case(
        "ddim", "DDIMScheduler", {"spacing": "leading", "eta": 0.7}, {"clip_sample": False}, {"eta": 0.7}
    ),
    "ddim, clipped": Case(
        "ddim", "DDIMScheduler", {"spacing": "leading", "clip": 0.8},
        {"clip_sample": True, "clip_sample_range": 0.8}, {"use_clipped_model_output": True},
    ),
    "ddim, thresholded": Case(
        "ddim", "DDIMScheduler", {"spacing": "leading", "clip": THRESHOLD},
        {"clip_sample": False, **THRESHOLDING}, {"use_clipped_model_output": True},
    ),
    "ddpm, thresholded": Case(
        "ddpm", "DDPMScheduler", {"spacing": "leading", "clip": THRESHOLD}, {"clip_sample": False, **THRESHOLDING}
    ),
    "dpmpp_2m, thresholded": Case(
        "dpmpp_2m", "DPMSolverMultistepScheduler", {"clip": THRESHOLD}, {**DPM, "solver_order": 2, **THRESHOLDING}
    ),
    "dpmpp_2m_sde, thresholded": Case(
        "dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"clip": THRESHOLD}, {**SDE, "solver_order": 2, **THRESHOLDING}
    ),
    "unipc, thresholded": Case(
        "unipc", "UniPCMultistepScheduler", {"clip": THRESHOLD},
        {**DPM, "solver_order": 2, "solver_type": "bh2", **THRESHOLDING},
    ),
    "ddpm": Case("ddpm", "DDPMScheduler", {"spacing": "leading"}, {"clip_sample": False}),
    "ddpm, fixed large": Case(
        DDPM(variance="fixed_large"), "DDPMScheduler", {"spacing": "leading"},
        {"clip_sample": False, "variance_type": "fixed_large"},
    ),
    "heun": Case("heun", "HeunDiscreteScheduler", {}, {"timestep_spacing": "trailing"}, scaled=True),
    "heun, karras": Case(
        "heun", "HeunDiscreteScheduler", {"spacing": "karras", "round_times": False},
        {"timestep_spacing": "linspace", "use_karras_sigmas": True}, scaled=True,
    ),
    "euler": Case("euler", "EulerDiscreteScheduler", {}, {"timestep_spacing": "trailing"}, scaled=True),
    "euler, karras": Case(
        "euler", "EulerDiscreteScheduler", {"spacing": "karras", "round_times": False},
        {"timestep_spacing": "linspace", "use_karras_sigmas": True}, scaled=True,
    ),
    "euler_ancestral": Case(
        "euler_ancestral", "EulerAncestralDiscreteScheduler", {}, {"timestep_spacing": "trailing"}, scaled=True,
        predictions=("epsilon", "v"),  # those that the scheduler has
    ),
    "dpmpp_1": Case("dpmpp_1", "DPMSolverMultistepScheduler", {}, {**DPM, "solver_order": 1}),
    "dpmpp_2m": Case("dpmpp_2m", "DPMSolverMultistepScheduler", {}, {**DPM, "solver_order": 2}),
    "dpmpp_2m, 20 steps": Case("dpmpp_2m", "DPMSolverMultistepScheduler", {}, {**DPM, "solver_order": 2}, steps=20),
    "dpmpp_2m, karras": Case(
        "dpmpp_2m", "DPMSolverMultistepScheduler", {"spacing": "karras"},
        {**DPM, "solver_order": 2, "use_karras_sigmas": True},
    ),
    "dpmpp_2m, exponential": Case(
        "dpmpp_2m", "DPMSolverMultistepScheduler", {"spacing": "exponential"},
        {**DPM, "solver_order": 2, "use_exponential_sigmas": True},
    ),
    "dpmpp_2m, beta": Case(
        "dpmpp_2m", "DPMSolverMultistepScheduler", {"spacing": "beta"},
        {**DPM, "solver_order": 2, "use_beta_sigmas": True},
    ),
    "dpmpp_3m, as published": Case(
        DPMSolver(3, as_published=True), "DPMSolverMultistepScheduler", {}, {**DPM, "solver_order": 3}
    ),
    "dpmpp_3m, as published, 20 steps": Case(
        DPMSolver(3, as_published=True), "DPMSolverMultistepScheduler", {}, {**DPM, "solver_order": 3}, steps=20
    ),
    "dpmpp_1_sde": Case("dpmpp_1_sde", "DPMSolverMultistepScheduler", {}, {**SDE, "solver_order": 1}),
    "dpmpp_2m_sde": Case("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {}, {**SDE, "solver_order": 2}),
    "unipc": Case("unipc", "UniPCMultistepScheduler", {}, {**DPM, "solver_order": 2, "solver_type": "bh2"}),
    "unipc, 20 steps": Case(
        "unipc", "UniPCMultistepScheduler", {}, {**DPM, "solver_order": 2, "solver_type": "bh2"}, steps=20
    ),
}  # fmt: skip


def difference(case: Case, prediction: str) -> float:
    """The largest difference of the results over their largest element."""
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(SHAPE, dtype=F64, generator=generator)
    noise = torch.randn((case.steps, *SHAPE), dtype=F64, generator=generator)
    diffusion, times = gk.Diffusion(prediction=prediction), []
    ours = diffusion.sample(
        lambda x, t: times.append(t) or network(x, t), noise=start, steps=case.steps, sampler=case.sampler,
        step_noise=noise, dtype=F64, **case.options,
    )  # fmt: skip
    theirs = peer(case, prediction, start, noise, times, diffusion)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def inversion(steps: int = STEPS) -> float:
    """The same of Diffusion.encode and DDIMInverseScheduler."""
    x = torch.randn(SHAPE, dtype=F64, generator=torch.Generator().manual_seed(7))
    ours = gk.Diffusion().encode(network, x, steps=steps, spacing="leading", dtype=F64)
    with double("DDIMInverseScheduler") as scheduler_class:
        scheduler = scheduler_class(**betas(), clip_sample=False, timestep_spacing="leading")
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(x.shape[0])), t, x).prev_sample
    return float((ours - x).abs().max() / x.abs().max())


def peer(
    case: Case, prediction: str, start: Tensor, noise: Tensor, times: list[Tensor], diffusion: gk.Diffusion
) -> Tensor:
    """diffusers' loop, with its noise replaced by the given one, and the network told the given times."""

    def given(*_: Any, **__: Any) -> Tensor:
        return noise[k]

    with double(case.scheduler, given) as scheduler_class:
        scheduler = scheduler_class(**betas(), prediction_type=PREDICTIONS[prediction], **case.config)
        scheduler.set_timesteps(case.steps)
        x = start
        if case.scaled:
            x = start / diffusion.path.alpha(float(scheduler.timesteps[0]))
        for k, t in enumerate(scheduler.timesteps):
            m = network(scheduler.scale_model_input(x, t), times[k])
            x = scheduler.step(m, t, x, **case.step).prev_sample
    return x


def network(x: Tensor, t: Tensor) -> Tensor:
    """Smooth, of the size of noise, and no perfect network of anything."""
    return torch.sin(x.flip(-1) + t.reshape(-1, 1, 1).to(F64) * 0.002) + 0.3 * x


def betas() -> dict[str, Any]:
    return {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@contextlib.contextmanager
def double(name: str, noise: Any = None) -> Iterator[Any]:
    """A scheduler's class, its module's float32 meaning float64 and its randn_tensor the given noise."""
    module = sys.modules[getattr(importlib.import_module("diffusers"), name).__module__]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "torch", _Wide(torch, float64=F64)))
        stack.enter_context(mock.patch.object(module, "np", _Wide(np, float64=np.float64)))
        if noise is not None and hasattr(module, "randn_tensor"):
            stack.enter_context(mock.patch.object(module, "randn_tensor", noise))
        yield getattr(module, name)


class _Wide:
    """A module whose float32 is its float64."""

    def __init__(self, module: Any, float64: Any) -> None:
        self._module, self.float32 = module, float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
