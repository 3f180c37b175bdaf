"""The variational objective (13.2), (13.11)-(13.12) and L_gamma (13.5) against closed forms on Gaussian data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import distributions as D

import genkern as gk
from genkern.noise import Noise

F64 = torch.float64
STD = 0.7  # of the data
# Second moments 1, first 0, all products of x and z 0: an expectation of quadratic forms is the mean over these four.
X = STD * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=F64)
Z = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=F64)


class Posterior:
    """The perfect network of N(0, STD^2): what x_t says of the data and the noise is linear in it."""

    def __init__(self, diffusion):
        self.a, self.prediction = torch.tensor(diffusion.alphas_cumprod, dtype=F64), diffusion.prediction

    def __call__(self, x, t):
        a = self.a[t].reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        total = a * STD**2 + 1 - a
        y, e = a.sqrt() * STD**2 / total * x, (1 - a).sqrt() / total * x
        return {"epsilon": e, "sample": y, "v": a.sqrt() * e - (1 - a).sqrt() * y, "score": -e / (1 - a).sqrt()}[
            self.prediction
        ]


def stds(diffusion, kind):
    """Three vectors of sigma, the seed's sigma_1 .. sigma_T."""
    a = np.append(1.0, diffusion.alphas_cumprod)
    if kind == "ddpm":
        return diffusion.posterior_std()
    if kind == "eta":
        return diffusion.posterior_std(0.4, sigma_1=0.1)
    std = np.sqrt(1 - a[:-1]) * np.linspace(0.9, 0.2, diffusion.timesteps)
    std[0] = 0.15
    return std


def exact(diffusion, std):
    """J_sigma for one element: KL of two Gaussians over (x_0, .., x_T), and the entropy of x_0. With torch's own KL."""
    a, n = np.append(1.0, diffusion.alphas_cumprod), diffusion.timesteps
    variance = a * STD**2 + 1 - a

    # x_{t-1} = g x_t + (rest) and x_T: linear in independent normals, so a covariance L L^T.
    def covariance(parents):
        rows = np.zeros((n + 1, n + 1 + 1))
        for t, (weights, noise) in parents:
            for other, w in weights.items():
                rows[t] += w * rows[other]
            rows[t, t] += noise
        return torch.tensor(rows @ rows.T, dtype=F64)

    q = [(0, ({}, STD)), (n, ({0: math.sqrt(a[n])}, math.sqrt(1 - a[n])))]
    p = [(n, ({}, 1.0))]
    for t in range(n, 1, -1):
        e = math.sqrt(1 - a[t - 1] - std[t - 1] ** 2) / math.sqrt(1 - a[t])
        c = math.sqrt(a[t - 1]) - e * math.sqrt(a[t])
        q.append((t - 1, ({0: c, t: e}, std[t - 1])))
        p.append((t - 1, ({t: e + c * math.sqrt(a[t]) * STD**2 / variance[t]}, std[t - 1])))
    p.append((0, ({1: math.sqrt(a[1]) * STD**2 / variance[1]}, std[0])))
    zero = torch.zeros(n + 1, dtype=F64)
    joint = (D.MultivariateNormal(zero, covariance_matrix=covariance(parents)) for parents in (q, p))
    return float(D.kl_divergence(*joint)) + 0.5 * math.log(2 * math.pi * math.e * STD**2)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "score"])
@pytest.mark.parametrize("kind", ["ddpm", "eta", "any"])
def test_objective_of_gaussian_data_with_the_perfect_network_is_exact(prediction, kind):
    diffusion = gk.Diffusion("squared_cosine", 8, prediction)
    std = stds(diffusion, kind)
    found = diffusion.vlb(Posterior(diffusion), X, posterior_std=std, noise=Z)
    assert found.steps.shape == (4, 8)
    assert float(found.total.mean()) == pytest.approx(exact(diffusion, std), rel=1e-9)
    assert float(found.bits_per_dim.mean()) == pytest.approx(exact(diffusion, std) / math.log(2), rel=1e-9)


def test_every_term_is_its_divergence():
    """At given points, against torch.distributions."""
    diffusion = gk.Diffusion("squared_cosine", 5)
    x, z = torch.randn(3, 4, dtype=F64), torch.randn(5, 3, 4, dtype=F64)
    std, a = stds(diffusion, "any"), torch.tensor(np.append(1.0, diffusion.alphas_cumprod), dtype=F64)

    def model(x, t):
        return torch.sin(x + t.reshape(-1, 1))

    found = diffusion.vlb(model, x, posterior_std=std, noise=z)
    assert found.elements == 4
    last = D.Normal(a[5].sqrt() * x, (1 - a[5]).sqrt())
    torch.testing.assert_close(found.prior, D.kl_divergence(last, D.Normal(0.0, torch.tensor(1.0, dtype=F64))).sum(1))
    for t in range(1, 6):
        x_t = a[t].sqrt() * x + (1 - a[t]).sqrt() * z[t - 1]
        f = (x_t - (1 - a[t]).sqrt() * model(x_t, torch.full((3,), t - 1))) / a[t].sqrt()
        if t == 1:
            expected = -D.Normal(f, torch.tensor(std[0], dtype=F64)).log_prob(x).sum(1)
        else:
            e = math.sqrt(1 - a[t - 1] - std[t - 1] ** 2) / math.sqrt(1 - a[t])
            q, p = (
                D.Normal(a[t - 1].sqrt() * y + e * (x_t - a[t].sqrt() * y), torch.tensor(std[t - 1], dtype=F64))
                for y in (x, f)
            )
            expected = D.kl_divergence(q, p).sum(1)
        torch.testing.assert_close(found.steps[:, t - 1], expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("kind", ["ddpm", "eta", "any"])
def test_the_objective_is_l_gamma_and_a_constant(prediction, kind):
    """Theorem 1, with networks that have nothing in common; gamma written out as the theorem's proof has it."""
    diffusion = gk.Diffusion("squared_cosine", 8, prediction)
    s, a = stds(diffusion, kind), np.append(1.0, diffusion.alphas_cumprod)
    before, here = a[:-1], a[1:]
    change = np.sqrt(before) - np.sqrt(np.maximum(1 - before - s**2, 0)) * np.sqrt(here) / np.sqrt(1 - here)
    gamma = (1 - here) / (2 * s**2 * here) * change**2
    gamma[0] = (1 - here[0]) / (2 * here[0] * s[0] ** 2)
    np.testing.assert_allclose(diffusion.gamma(s), gamma, rtol=1e-9)
    x, noise = torch.randn(5, 6, dtype=F64), Noise(3)
    differences = []
    for model in (Posterior(diffusion), lambda x, t: x.sin(), lambda x, t: 0.0 * x):
        bound = diffusion.vlb(model, x, posterior_std=s, noise=noise)
        differences.append(bound.total - diffusion.l_gamma(model, x, gamma, noise=noise).sum(1))
    constant = (
        0.5 * a[-1] * x.square().sum(1) - 3 * (a[-1] + math.log1p(-a[-1])) + 3 * math.log(2 * math.pi * s[0] ** 2)
    )
    for difference in differences:
        torch.testing.assert_close(difference, constant, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "score"])
def test_l_gamma_is_equation_13_5(prediction):
    diffusion, gamma = gk.Diffusion("squared_cosine", 6, prediction), np.linspace(0.5, 2.0, 6)
    x, z = torch.randn(3, 4, dtype=F64), torch.randn(6, 3, 4, dtype=F64)
    model = Posterior(diffusion)
    found = diffusion.l_gamma(model, x, gamma, noise=z)
    reader = gk.Diffusion("squared_cosine", 6)
    epsilon = Posterior(reader)
    for t, a in enumerate(diffusion.alphas_cumprod):
        x_t = math.sqrt(a) * x + math.sqrt(1 - a) * z[t]
        expected = gamma[t] * (epsilon(x_t, torch.full((3,), t)) - z[t]).square().sum(1)
        torch.testing.assert_close(found[:, t], expected)
    ones = diffusion.l_gamma(model, x, noise=z)
    torch.testing.assert_close(ones * torch.tensor(gamma), found)


def test_the_objective_bounds_the_entropy_and_meets_it_as_steps_grow_finer():
    """Even steps in log SNR between the same ends: a gap of order 1 in the step."""
    entropy, gaps = 0.5 * math.log(2 * math.pi * math.e * STD**2), []
    for timesteps in (50, 200, 800):
        diffusion = gk.Diffusion(alphas_cumprod=1 / (1 + np.exp(np.linspace(-9.0, 12.0, timesteps))))
        a = diffusion.alphas_cumprod[0]
        sigma_1 = math.sqrt(STD**2 * (1 - a) / (a * STD**2 + 1 - a))  # of x_0 given x_1
        gaps.append(float(diffusion.vlb(Posterior(diffusion), X, sigma_1=sigma_1, noise=Z).total.mean()) - entropy)
    assert gaps[2] > 0.0
    assert [math.log2(a / b) / 2 for a, b in zip(gaps, gaps[1:], strict=False)] == pytest.approx([1.0, 1.0], abs=0.15)


def test_drawn_noise_depends_neither_on_the_batches_of_the_network_nor_on_those_of_the_data():
    diffusion = gk.Diffusion("squared_cosine", 7)
    model, x = Posterior(diffusion), torch.randn(5, 3, dtype=F64)
    calls = []
    whole = diffusion.vlb(lambda x, t: calls.append(len(x)) or model(x, t), x, noise=Noise(4))
    assert calls == [35]
    for batch_size, expected in ((1, [5] * 7), (10, [10, 10, 10, 5]), (23, [20, 15])):
        calls.clear()
        found = diffusion.vlb(
            lambda x, t: calls.append(len(x)) or model(x, t), x, noise=Noise(4), batch_size=batch_size
        )
        assert calls == expected
        assert torch.equal(found.steps, whole.steps)
    parts = [diffusion.vlb(model, x[i], noise=Noise(4, sample_ids=i)).total for i in ([0, 3], [4, 1, 2])]
    torch.testing.assert_close(torch.cat(parts), whole.total[[0, 3, 4, 1, 2]])


def test_generator_and_torch_govern_the_noise():
    diffusion = gk.Diffusion("squared_cosine", 4)
    model, x = Posterior(diffusion), torch.randn(3, 2, dtype=F64)
    drawn = [diffusion.vlb(model, x, generator=torch.Generator().manual_seed(5)).total for _ in range(2)]
    assert torch.equal(*drawn)
    torch.manual_seed(3)
    first, second = (diffusion.vlb(model, x).total for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(diffusion.vlb(model, x).total, first)
    assert not torch.equal(first, second)


def test_mean_over_drawn_noise_is_the_exact_objective():
    diffusion = gk.Diffusion("squared_cosine", 8)
    x = STD * torch.randn(4000, 1, dtype=F64, generator=torch.Generator().manual_seed(5))
    found = diffusion.vlb(Posterior(diffusion), x, noise=Noise(1)).total
    error = 4 * float(found.std()) / math.sqrt(4000)
    assert float(found.mean()) == pytest.approx(exact(diffusion, diffusion.posterior_std()), abs=error)


def test_gradient_is_kept_when_asked_for_and_conditions_are_spread():
    diffusion = gk.Diffusion("squared_cosine", 4)
    weight, y = torch.tensor(0.3, requires_grad=True, dtype=F64), torch.arange(3, dtype=F64)
    x, z = torch.randn(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64)

    def model(x, t, y):
        return weight * x * y[:, None]

    options = {"cond": {"y": y}, "noise": z}
    assert not diffusion.vlb(model, x, **options).total.requires_grad
    terms = diffusion.l_gamma(model, x, differentiable=True, **options)
    expected = 0.0
    for a in diffusion.alphas_cumprod:
        x_t = math.sqrt(a) * x + math.sqrt(1 - a) * z
        expected = expected + (weight * x_t * y[:, None] - z).square().sum()
    torch.testing.assert_close(terms.sum(), expected)
    torch.testing.assert_close(*(torch.autograd.grad(of, weight)[0] for of in (terms.sum(), expected)))


def test_a_schedule_without_signal_at_its_end_has_an_objective_with_v():
    diffusion = gk.Diffusion("squared_cosine", 8, "v", rescale_zero_snr=True)
    found = diffusion.vlb(Posterior(diffusion), X, noise=Z)
    assert float(found.prior.abs().max()) == 0.0
    assert float(found.total.mean()) == pytest.approx(exact(diffusion, diffusion.posterior_std()), rel=1e-9)


@pytest.mark.parametrize("options, error, words", [
    ({"eta": 0.0}, ValueError, "posterior_std: expected > 0, as the objective is infinite at 0, got 0 at t = 0"),
    ({"sigma_1": 0.0}, ValueError, "posterior_std: expected > 0, .* got 0 at t = 0"),
    ({"posterior_std": [0.1] * 7}, ValueError, r"posterior_std: expected shape \(8,\), one a timestep, got \(7,\)"),
    ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
    ({"noise": torch.zeros(7, 4, 1)}, ValueError, r"noise: expected shape \(8, 4, 1\) or x's, got \(7, 4, 1\)"),
    ({"noise": torch.zeros(4, 2)}, ValueError, r"noise: expected shape \(4, 1\)"),
    ({"noise": 3}, TypeError, "noise: expected a Noise or a tensor"),
])  # fmt: skip
def test_bad_argument_is_named(options, error, words):
    with pytest.raises(error, match=words):
        gk.Diffusion("squared_cosine", 8).vlb(lambda x, t: x, X, **options)


def test_gamma_is_refused_where_it_is_infinite():
    with pytest.raises(ValueError, match="gamma: infinite at the last timestep"):
        gk.Diffusion("squared_cosine", 8, "v", rescale_zero_snr=True).gamma()
    with pytest.raises(ValueError, match=r"gamma: expected shape \(8,\)"):
        gk.Diffusion("squared_cosine", 8).l_gamma(lambda x, t: x, X, [1.0])


@pytest.mark.parametrize("step, name", [("posterior_step", "x_t"), ("forward_step", "x_s")])
def test_the_state_of_a_step_is_named_as_its_argument(step, name):
    with pytest.raises(TypeError, match=f"{name}: expected "):
        getattr(gk.Diffusion("squared_cosine", 8), step)(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1), 3)
