"""Each op against its formula in float64, on each device, dtype and path."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from op_cases import CASES, LOSSES, NOISE, SHAPE, Case, arrays, on, rounding, wide

import genkern as gk


def drawn(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same options with the noise itself: what is drawn is the noise contract's, and tested there."""
    if "noise" not in options:
        return options
    return {**options, "noise": gk.ops.randn(SHAPE, noise=NOISE, device=device, dtype=torch.float64)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_agrees_with_its_formula_in_float64(case: Case, device: torch.device, dtype: torch.dtype, path: str) -> None:
    given = arrays(case, device, dtype)
    case = dataclasses.replace(case, options=on(case.options, device))
    exact = dataclasses.replace(case, options=wide(drawn(case.options, device))).run(gk.reference, **wide(given))
    magnitude = case.scale * (1.0 + sum(t.double().abs() for t in given.values()))
    for result, expected in zip(case.run(gk.ops, **given), exact, strict=True):
        assert result.dtype == dtype and result.device.type == device.type
        assert ((result.double() - expected).abs() <= rounding(dtype, expected, magnitude)).all()


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("options", LOSSES)
def test_path_loss_agrees_with_its_formula_in_float64(
    options: dict[str, Any], mask: str | None, device: torch.device, dtype: torch.dtype, path: str
) -> None:
    m, x, h = (torch.randn(SHAPE, device=device).to(dtype) for _ in range(3))
    options = {**on(options, device), "h": (h,), "h_coefs": (0.25,)}
    if mask == "bool":
        options["mask"] = torch.rand(SHAPE[0], 1, *SHAPE[2:], device=device) > 0.3
    elif mask == "float":
        options["mask"] = torch.rand(SHAPE, device=device)
    found = gk.ops.path_loss(m, x, **options)
    doubled = {**wide(drawn(options, device)), "h": (h.double(),)}
    expected = gk.reference.path_loss(m.double(), x.double(), **doubled)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == accumulator and found.shape == expected.shape
    # Each r is off by a few roundings of terms below 10, and a sum of n terms by at most n more.
    n = m[0].numel()
    bound = torch.finfo(accumulator).eps * (40 + n) * (expected.abs() + 10.0)
    assert ((found.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_ddim_step_of_the_true_noise_lands_on_the_path(prediction: str, device: torch.device, path: str) -> None:
    y, z = torch.randn(2, *SHAPE, dtype=torch.float64, device=device)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (0.6, 0.8), (0.8, 0.6)
    x_t = alpha_t * y + sigma_t * z
    output = {"epsilon": z, "v": alpha_t * z - sigma_t * y, "sample": y}[prediction]
    x_s = gk.ops.ddim_step(x_t, output, alpha_t, sigma_t, alpha_s, sigma_s, prediction=prediction)
    torch.testing.assert_close(x_s, alpha_s * y + sigma_s * z, rtol=1e-12, atol=1e-12)


def test_ddim_step_at_eta_one_has_the_ddpm_posterior_variance(path: str) -> None:
    a_t, a_s = 0.36, 0.64  # the seed's alpha: cumulative products
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    z = torch.ones(2, 3, dtype=torch.float64)
    root = [value**0.5 for value in (a_t, 1 - a_t, a_s, 1 - a_s)]
    step = gk.ops.ddim_step(zeros, zeros, *root, eta=1.0, noise=z)
    # The DDPM's posterior standard deviation: sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s), after (13.13).
    torch.testing.assert_close(step, z * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) ** 0.5, rtol=1e-14, atol=0)


def test_the_clamp_bounds_the_prediction_and_leaves_epsilon_alone(path: str) -> None:
    x, m = torch.randn(2, *SHAPE, dtype=torch.float64)
    x_s, y = gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6, clip=0.5, return_pred=True)
    expected = ((x - 0.8 * m) / 0.6).clamp(-0.5, 0.5)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_s, 0.8 * expected + 0.6 * m, rtol=1e-12, atol=1e-12)


def test_eta_zero_draws_nothing_and_a_needed_noise_follows_manual_seed(path: str) -> None:
    x, m = torch.randn(2, *SHAPE)
    before = torch.get_rng_state()
    gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6)
    assert torch.equal(torch.get_rng_state(), before)

    def noisy() -> torch.Tensor:
        torch.manual_seed(5)
        return gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6, eta=1.0)

    first = noisy()
    assert torch.equal(first, noisy())
    assert not torch.equal(first, gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6, eta=1.0))


def test_the_noise_of_an_op_is_that_of_randn(device: torch.device, dtype: torch.dtype, path: str) -> None:
    x = torch.zeros(SHAPE, dtype=dtype, device=device)
    z = gk.ops.randn(SHAPE, noise=NOISE, device=device, dtype=dtype)
    noised, returned = gk.ops.add_noise(x, 1.0, 1.0, noise=NOISE, return_noise=True)
    assert torch.equal(noised, z) and torch.equal(returned, z)


def test_sample_ids_choose_the_noise_of_a_sample(path: str) -> None:
    z = gk.ops.randn((5, 7), noise=gk.Noise(seed=2))
    for ids in ([3, 0, 3], torch.tensor([3, 0, 3])):
        assert torch.equal(gk.ops.randn((3, 7), noise=gk.Noise(seed=2, sample_ids=ids)), z[[3, 0, 3]])


def test_a_seed_in_device_memory_draws_the_same(device: torch.device, path: str) -> None:
    seed = torch.tensor([-7], device=device)
    on_device = gk.Noise(seed=seed, stream=torch.tensor(9, device=device), draw=4)
    on_host = gk.Noise(seed=2**64 - 7, stream=9, draw=4)
    shape = (2, 9)
    assert torch.equal(
        gk.ops.randn(shape, noise=on_device, device=device), gk.ops.randn(shape, noise=on_host, device=device)
    )


def test_a_half_precision_network_output_and_a_float32_state(device: torch.device, path: str) -> None:
    x, m = torch.randn(SHAPE, device=device), torch.randn(SHAPE, device=device).bfloat16()
    found = gk.ops.euler_step(x, m, 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x + 0.5 * m.float(), rtol=1e-6, atol=1e-7)


def test_uniforms_are_in_the_open_interval_with_the_right_mean(device: torch.device, path: str) -> None:
    u = gk.ops.uniform((16, 4096), noise=gk.Noise(seed=1), device=device, dtype=torch.float64)
    assert 0.0 < float(u.min()) and float(u.max()) < 1.0
    assert abs(float(u.mean()) - 0.5) < 5.0 / (12 * u.numel()) ** 0.5  # five standard deviations


def test_path_loss_leaves_masked_nan_out(device: torch.device, path: str) -> None:
    m = torch.randn(SHAPE, device=device)
    mask = torch.rand(SHAPE, device=device) > 0.5
    mask[1] = False
    poisoned = m.masked_fill(~mask, float("nan"))
    loss = gk.ops.path_loss(poisoned, mask=mask, reduction="none")
    expected = torch.where(mask, m, 0.0).double().square().sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert loss[1] == 0.0


def test_path_loss_takes_targets_of_higher_precision_than_the_network(path: str) -> None:
    m, target = torch.randn(SHAPE).bfloat16(), torch.randn(SHAPE)
    expected = (m.double() - target.double()).square().mean()
    for loss in (
        gk.ops.path_loss(m, h=(target,)),
        gk.ops.path_loss(m, target, x_coef=1.0),
        gk.ops.path_loss(m, noise=target, noise_coef=1.0),
    ):
        assert abs(float(loss) - float(expected)) < 1e-5 * float(expected)
