"""Diffusion: the loss (13.5), its schedules and its arguments. Samplers are in test_samplers and test_convergence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import genkern as gk
from genkern.noise import Noise, Purpose

F64 = torch.float64
SHAPE = (6, 3, 5)


class Net(nn.Module):
    """A little network of x and t."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.mix = nn.Linear(5, 5, dtype=dtype)

    def forward(self, x, t, y=None):
        scale = (1 + 0.1 * torch.sin(t.to(F64))).to(x.dtype).reshape(-1, 1, 1)
        return torch.tanh(self.mix(x)) * scale + (0 if y is None else y.reshape(-1, 1, 1))


def gradient(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def textbook(diffusion, model, x, t, z, prediction, rho, **cond):
    """(13.5) written out, a loss a sample."""
    a = torch.tensor(diffusion.alphas_cumprod, dtype=F64, device=x.device)[t].reshape(-1, 1, 1)
    x_t = a.sqrt() * x + (1 - a).sqrt() * z
    target = {"epsilon": z, "sample": x, "v": a.sqrt() * z - (1 - a).sqrt() * x}[prediction]
    return rho(model(x_t, t, **cond) - target)


RHO = {
    "l2": lambda r: r.square().mean((1, 2)),
    "l1": lambda r: r.abs().mean((1, 2)),
    "pseudo_huber": lambda r: (r.square().sum((1, 2)) + (0.00054**2 * 15)).sqrt() - 0.00054 * math.sqrt(15),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("kind", RHO)
def test_loss_and_gradient_are_those_of_the_written_out_formula(prediction, kind, device):
    diffusion, model = gk.Diffusion(prediction=prediction), Net().to(device)
    x = torch.randn(SHAPE, dtype=F64, device=device)
    noise = Noise(5, stream=3)
    t = torch.tensor([0, 10, 200, 500, 998, 999], device=device)
    weight = torch.linspace(0.5, 2.0, 6, dtype=F64, device=device)
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64, device=device)
    got = diffusion.loss(model, x, t=t, noise=noise, weight=weight, kind=kind)
    expected = (weight * textbook(diffusion, model, x, t, z, prediction, RHO[kind])).mean()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, model), gradient(expected, model))


def test_loss_in_bfloat16_is_near_that_in_float64():
    diffusion, model = gk.Diffusion(), Net(torch.bfloat16)
    x, noise = torch.randn(SHAPE), Noise(5)
    t = torch.tensor([0, 10, 200, 500, 998, 999])
    wide = Net()
    wide.load_state_dict(model.state_dict())
    got = diffusion.loss(model, x, t=t, noise=noise)
    assert got.dtype == torch.float32
    expected = diffusion.loss(wide, x.double(), t=t, noise=noise)
    assert float(got.detach()) == pytest.approx(float(expected.detach()), rel=0.02)
    for g, e in zip(gradient(got, model), gradient(expected, wide), strict=True):
        assert (g.double() - e).norm() <= 0.05 * e.norm()


def test_given_noise_takes_the_place_of_the_drawn():
    diffusion, model, x, noise = gk.Diffusion(), Net(), torch.randn(SHAPE, dtype=F64), Noise(8)
    t = torch.arange(6) * 100
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64)
    drawn, given = (diffusion.loss(model, x, t=t, noise=n) for n in (noise, z))
    torch.testing.assert_close(given, drawn)


def test_times_are_uniform_and_follow_the_sample_ids():
    diffusion = gk.Diffusion(timesteps=10, schedule="squared_cosine")
    seen = []

    def model(x, t):
        seen.append(t)
        return x

    x = torch.zeros(20_000, 1)
    diffusion.loss(model, x, noise=Noise(1))
    counts = torch.bincount(seen[0], minlength=10)
    chi2 = float(((counts - 2000.0) ** 2 / 2000.0).sum())
    assert chi2 < 27.9  # 99.9% of chi-squared with 9 degrees of freedom
    diffusion.loss(model, x[:3], noise=Noise(1, sample_ids=[7, 0, 19_999]))
    assert torch.equal(seen[1], seen[0][[7, 0, 19_999]])
    diffusion.loss(model, x, noise=Noise(1, stream=1))
    assert not torch.equal(seen[2], seen[0])


def test_loss_of_a_batch_is_the_mean_over_its_parts():
    diffusion, model, x = gk.Diffusion(), Net(), torch.randn(SHAPE, dtype=F64)
    whole = diffusion.loss(model, x, noise=Noise(4))
    parts = [
        diffusion.loss(model, x[low:high], noise=Noise(4, sample_ids=range(low, high)), reduction="sum")
        for low, high in ((0, 2), (2, 6))
    ]
    torch.testing.assert_close(whole, sum(parts) / 6)


def test_generator_and_torch_govern_the_loss():
    diffusion, model, x = gk.Diffusion(), Net(), torch.randn(SHAPE, dtype=F64)
    torch.manual_seed(3)
    first, second = diffusion.loss(model, x), diffusion.loss(model, x)
    torch.manual_seed(3)
    assert torch.equal(diffusion.loss(model, x), first)
    assert not torch.equal(first, second)
    drawn = [diffusion.loss(model, x, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_mask_weight_and_reduction():
    diffusion, model, x, noise = gk.Diffusion(), Net(), torch.randn(SHAPE, dtype=F64), Noise(4)
    t = torch.arange(6) * 100
    mask = torch.rand(SHAPE) > 0.4
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64)
    each = textbook(diffusion, model, x, t, z, "epsilon", lambda r: (r.square() * mask).sum((1, 2)) / mask.sum((1, 2)))
    got = diffusion.loss(model, x, t=t, noise=noise, mask=mask, reduction="none")
    torch.testing.assert_close(got, each)
    weighted = diffusion.loss(model, x, t=t, noise=noise, mask=mask, weight=lambda t: t / 100.0, reduction="sum")
    torch.testing.assert_close(weighted, (each * torch.arange(6)).sum())


def test_conditions_reach_the_network():
    diffusion, model, x, noise = gk.Diffusion(), Net(), torch.randn(SHAPE, dtype=F64), Noise(4)
    t, y = torch.arange(6) * 100, torch.randn(6, dtype=F64)
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64)
    expected = textbook(diffusion, model, x, t, z, "epsilon", RHO["l2"], y=y).mean()
    torch.testing.assert_close(diffusion.loss(model, x, t=t, noise=noise, cond={"y": y}), expected)


def test_one_time_for_all_samples():
    diffusion, model, x, noise = gk.Diffusion(), Net(), torch.randn(SHAPE, dtype=F64), Noise(4)
    got = diffusion.loss(model, x, t=40, noise=noise)
    torch.testing.assert_close(got, diffusion.loss(model, x, t=torch.full((6,), 40), noise=noise))


def test_given_schedules_are_taken():
    betas = np.linspace(0.01, 0.2, 30)
    by_betas, by_products = gk.Diffusion(betas=betas), gk.Diffusion(alphas_cumprod=np.cumprod(1 - betas))
    assert by_betas.timesteps == by_products.timesteps == 30
    np.testing.assert_allclose(by_betas.alphas_cumprod, by_products.alphas_cumprod)


def test_a_path_without_signal_at_its_end_is_sampled_with_v_and_refused_with_epsilon():
    abar = np.linspace(0.99, 0.0, 20)
    x = gk.Diffusion(alphas_cumprod=abar, prediction="v").sample(lambda x, t: 0.1 * x, (2, 3), steps=5, seed=0, eta=1.0)
    assert x.isfinite().all()
    for prediction in ("epsilon", "score"):
        with pytest.raises(ValueError, match=f"prediction: expected 'v' or 'sample' .* got '{prediction}'"):
            gk.Diffusion(alphas_cumprod=abar, prediction=prediction)


def test_final_alphas_cumprod_ends_above_clean_data():
    diffusion = gk.Diffusion(final_alphas_cumprod=0.99995)
    x, eps = torch.randn(2, *SHAPE, dtype=F64)
    got = diffusion.sample(lambda x, t: eps, noise=x, timesteps=[0], dtype=F64)
    a = diffusion.alphas_cumprod[0]
    f = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    torch.testing.assert_close(got, math.sqrt(0.99995) * f + math.sqrt(1 - 0.99995) * eps)


@pytest.mark.parametrize("name, options, error, words", [
    ("t", {"t": 1000}, ValueError, "t: expected an integer from 0 to 999, got 1000"),
    ("t", {"t": 1.5}, TypeError, "t: expected an integer"),
    ("t", {"t": torch.full((6,), 1000)}, ValueError, "t: expected integers from 0 to 999"),
    ("t", {"t": torch.full((6,), -1)}, ValueError, "t: expected integers from 0 to 999"),
    ("t", {"t": torch.full((6,), 1, dtype=torch.int32)}, ValueError, "t: expected int64"),
    ("t", {"t": torch.zeros(5, dtype=torch.int64)}, ValueError, r"t: expected int64 of shape \(6,\)"),
    ("noise", {"noise": torch.zeros(6, 3)}, ValueError, r"noise: expected shape \(6, 3, 5\)"),
    ("noise", {"noise": 3}, TypeError, "noise: expected a Noise or a tensor, got int"),
    ("noise", {"noise": Noise(1), "generator": torch.Generator()}, ValueError, "at most one of"),
    ("weight", {"weight": torch.ones(5)}, ValueError, "weight: expected a number, one element, or shape"),
    ("weight", {"weight": math.nan}, ValueError, "weight: expected a finite number, got nan"),
    ("kind", {"kind": "l3"}, ValueError, "kind: expected one of"),
    ("reduction", {"reduction": "median"}, ValueError, "reduction: expected one of"),
    ("mask", {"mask": torch.ones(7, 3, 5)}, ValueError, "mask"),
    ("cond", {"cond": {"y": torch.zeros(2)}}, ValueError, r"cond\['y'\]: expected dimension 0 to be the batch"),
    ("other", {"wieght": 2.0}, TypeError, "unexpected keyword argument 'wieght'"),
])  # fmt: skip
def test_bad_argument_of_the_loss_is_named(name, options, error, words):
    with pytest.raises(error, match=words):
        gk.Diffusion().loss(lambda x, t, **c: x, torch.randn(SHAPE), **options)


@pytest.mark.parametrize("x, error, words", [
    (torch.zeros(SHAPE, dtype=torch.int64), TypeError, "x: expected float32, float16, .*, got torch.int64"),
    (torch.zeros(SHAPE, dtype=torch.complex64), TypeError, "x: expected float32"),
    (torch.tensor(1.0), ValueError, "x: expected dimension 0 to be the batch, got a 0-d tensor"),
    (np.zeros(3), TypeError, "x: expected a torch tensor, got ndarray"),
])  # fmt: skip
def test_bad_data_is_named(x, error, words):
    with pytest.raises(error, match=words):
        gk.Diffusion().loss(lambda x, t: x, x)


def test_model_that_returns_another_shape_is_named():
    with pytest.raises(ValueError, match=r"model: expected output of shape \(6, 3, 5\) like its input, got \(6, 3\)"):
        gk.Diffusion().loss(lambda x, t: x[..., 0], torch.randn(SHAPE))


@pytest.mark.parametrize("options, error, words", [
    ({"schedule": "cosine"}, ValueError, "schedule: expected one of 'linear', 'scaled_linear', 'sigmoid'"),
    ({"timesteps": 0}, ValueError, "timesteps: expected an integer >= 1, got 0"),
    ({"prediction": "velocity"}, ValueError, "prediction: expected one of .*, 'score', got 'velocity'"),
    ({"betas": [0.1], "beta_start": 0.5}, ValueError, "beta_start, beta_end: expected None beside betas"),
    ({"alphas_cumprod": [0.9], "beta_end": 0.5}, ValueError, "beta_start, beta_end: expected None beside betas"),
    ({"betas": [0.1], "alphas_cumprod": [0.9]}, ValueError, "betas: expected None beside alphas_cumprod"),
    ({"alphas_cumprod": [0.1, 0.9]}, ValueError, "alphas_cumprod: expected a decreasing sequence"),
])  # fmt: skip
def test_bad_argument_of_the_method_is_named(options, error, words):
    with pytest.raises(error, match=words):
        gk.Diffusion(**options)


@pytest.mark.parametrize("options, words", [
    ({"steps": 0}, "steps: expected an integer from 1 to 1000, got 0"),
    ({"steps": 1001}, "steps: expected an integer from 1 to 1000, got 1001"),
    ({"steps": 3, "timesteps": [1]}, "steps: expected None beside timesteps"),
    ({"timesteps": [1, 5]}, "timesteps: expected strictly decreasing"),
    ({"spacing": "even"}, "spacing: expected one of"),
    ({"sampler": "rk4"}, "sampler: expected one of 'ddim', 'ddpm', .* got 'rk4'"),
    ({"sampler": "ddpm", "eta": 0.5}, "eta: expected None or 1"),
    ({"clip": (1.0, -1.0)}, "clip: expected lo < hi"),
    ({"clip": 0.0}, "clip: expected lo < hi"),
    ({"final_sigma": -1.0}, "final_sigma: expected a finite number >= 0"),
])  # fmt: skip
def test_bad_argument_of_sample_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.Diffusion().sample(lambda x, t: x, SHAPE, **options)


def test_a_uniform_number_rounded_to_one_is_still_a_time_of_the_path(monkeypatch):
    monkeypatch.setattr(gk.ops, "uniform", lambda shape, **_: torch.ones(shape))
    seen = []
    gk.Diffusion().loss(lambda x, t: seen.append(t) or x, torch.zeros(SHAPE))
    assert seen[0].tolist() == [999] * 6
