"""Agreement in float64 with diffusers: samplers, grids of times, schedules. docs/samplers.md has the table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")

import diffusers_oracle as oracle

import genkern as gk
from genkern import grids, paths

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
EACH = [(name, prediction) for name, case in oracle.CASES.items() for prediction in case.predictions]


@pytest.mark.parametrize("name, prediction", EACH)
def test_sampler_agrees_with_its_scheduler(name, prediction):
    assert oracle.difference(oracle.CASES[name], prediction) < 1e-12


def test_inversion_agrees_with_its_scheduler():
    assert oracle.inversion() < 1e-12


@pytest.mark.parametrize("spacing", grids.SPACINGS)
@pytest.mark.parametrize("steps", [7, 10, 50])
def test_spacing_agrees_with_that_of_ddim(spacing, steps):
    with oracle.double("DDIMScheduler") as scheduler_class:
        scheduler = scheduler_class(**oracle.betas(), timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
    assert grids.timesteps(steps, 1000, spacing).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
def test_noise_levels_agree_with_those_of_dpm_solver(kind):
    with oracle.double("DPMSolverMultistepScheduler") as scheduler_class:
        scheduler = scheduler_class(**oracle.betas(), **{f"use_{kind}_sigmas": True})
        scheduler.set_timesteps(12)
    path = gk.Diffusion().path
    found = grids.noise_levels(kind, 12, path.noise_level(0), path.noise_level(999))
    np.testing.assert_allclose(found, scheduler.sigmas[:-1].numpy(), rtol=1e-10)
    if kind == "karras":  # the others cut the times off to integers
        assert np.round(path.time_at(found)).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("ours, theirs", [
    ("linear", "linear"), ("scaled_linear", "scaled_linear"), ("squared_cosine", "squaredcos_cap_v2"),
    ("sigmoid", "sigmoid"),
])  # fmt: skip
@pytest.mark.parametrize("rescale", [False, True])
def test_schedule_agrees_with_that_of_ddpm(ours, theirs, rescale):
    options = {} if ours == "squared_cosine" else {"beta_start": 0.0003, "beta_end": 0.015}
    with oracle.double("DDPMScheduler") as scheduler_class:
        scheduler = scheduler_class(beta_schedule=theirs, rescale_betas_zero_snr=rescale, **options)
    found = gk.Diffusion(ours, prediction="v", rescale_zero_snr=rescale, **options).alphas_cumprod
    # sigmoid's betas are evaluated in float32 there: its linspace names no dtype
    rtol = 1e-4 if ours == "sigmoid" else 1e-7
    np.testing.assert_allclose(found, scheduler.alphas_cumprod.double().numpy(), rtol=rtol, atol=1e-12)


def test_rescaling_is_that_of_the_whole_table():
    abar = paths.alphas_cumprod_of(paths.betas("linear", 1000))
    with oracle.double("DDPMScheduler") as scheduler_class:
        import sys

        module = sys.modules[scheduler_class.__module__]
        betas = module.rescale_zero_terminal_snr(torch.as_tensor(paths.betas("linear", 1000)))
    np.testing.assert_allclose(paths.rescale_zero_snr(abar), np.cumprod(1 - betas.numpy()), rtol=1e-9, atol=1e-15)
