"""General conditional paths (13.21), their fields (13.22), and the loss on them (13.23)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import genkern as gk
from genkern import flows, paths
from genkern.noise import Noise, Purpose

F64 = torch.float64
SHAPE = (7, 2, 3)


def data(seed=0, shape=SHAPE, dtype=F64):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(c, x):
    return c.reshape(-1, *[1] * (x.ndim - 1))


def curved(sigma_min=0.1):
    """A mean on a curve of each sample's own, and a deviation that depends on the data's size."""
    return flows.ConditionalPath(
        lambda t, x: wide(t**2, x) * x + wide(torch.sin(math.pi * t), x) * x.cos(),
        lambda t, x: 1 - (1 - sigma_min / (1 + x.flatten(1).square().sum(1))) * t,
    )


def curved_moments(t, x, sigma_min=0.1):
    """The same by hand."""
    s = 1 - sigma_min / (1 + x.flatten(1).square().sum(1))
    return flows.Moments(
        wide(t**2, x) * x + wide((math.pi * t).sin(), x) * x.cos(), 1 - s * t,
        wide(2 * t, x) * x + wide(math.pi * (math.pi * t).cos(), x) * x.cos(), -s,
    )  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 3, dtype=F64)

    def forward(self, x, t):
        return torch.tanh(self.mix(x)) * (1 + wide(t, x))


def test_derivatives_are_those_by_hand(device):
    x, t = data().to(device), torch.linspace(0.05, 0.95, 7, dtype=F64, device=device)
    for found, expected in zip(curved().at(t, x), curved_moments(t, x), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_mean_that_does_not_move_has_derivative_zero():
    path = flows.ConditionalPath(lambda t, x: x, lambda t, x: torch.ones_like(t))
    found = path.at(torch.rand(7, dtype=F64), data())
    assert float(found.d_mu.abs().max()) == float(found.d_sigma.abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_field_is_its_formula_and_moves_the_path(dtype, device):
    """u at psi_t(z) = mu + sigma z is d psi_t / dt = mu' + sigma' z."""
    x, z, t = data(0, dtype=dtype), data(1, dtype=dtype), torch.linspace(0.05, 0.95, 7, dtype=dtype)
    x, z, t = (v.to(device) for v in (x, z, t))
    at = curved_moments(t, x)
    on_path = at.mu + wide(at.sigma, x) * z
    found = flows.conditional_field(on_path, at)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(found, at.d_mu + wide(at.d_sigma, x) * z, **close)
    expected = wide(at.d_sigma / at.sigma, x) * (z - at.mu) + at.d_mu
    torch.testing.assert_close(flows.conditional_field(z, at), expected, **close)


def test_field_generates_the_path():
    """Its flow takes N(mu_0, sigma_0^2) to N(mu_t, sigma_t^2): psi_t(z) = mu_t + sigma_t z, theorem 3 of the paper."""
    x1, z = data(0, (5, 3)), data(1, (5, 3))
    path = curved()
    start, end = (path.at(torch.full((5,), t, dtype=F64), x1) for t in (0.0, 1.0))

    def field(x, t):
        return flows.conditional_field(x, path.at(t.to(F64), x1))

    found = gk.FlowMatching().sample(field, x0=start.mu + start.sigma[:, None] * z, steps=100, sampler="rk4", dtype=F64)
    torch.testing.assert_close(found, end.mu + end.sigma[:, None] * z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("named", [paths.CondOT(0.1), paths.Cosine(), paths.Polynomial(3.0)])
def test_field_of_a_path_with_alpha_and_sigma_is_that_of_the_path(named):
    """(13.22) of the module paths: u = (sigma'/sigma)(x - alpha x1) + alpha' x1."""
    path = flows.ConditionalPath(lambda t, x: wide(alpha(t), x) * x, lambda t, x: sigma(t))
    alpha, sigma = named.alpha, named.sigma
    x1, x, t = data(0), data(1), torch.linspace(0.1, 0.9, 7, dtype=F64)
    rate = wide(named.d_sigma(t) / sigma(t), x)
    expected = rate * (x - wide(alpha(t), x) * x1) + wide(torch.as_tensor(named.d_alpha(t), dtype=F64), x) * x1
    torch.testing.assert_close(flows.conditional_field(x, path.at(t, x1)), expected)


def test_loss_and_gradient_are_those_of_the_written_out_formula(device):
    model, noise, x = Net().to(device), Noise(3), data().to(device)
    flow = gk.ConditionalFlowMatching(curved().mu, curved().sigma)
    t = gk.ops.uniform((7,), noise=noise.at(Purpose.TIMES), dtype=F64, device=device)
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64, device=device)
    at = curved_moments(t, x)
    target = at.d_mu + wide(at.d_sigma, x) * z
    expected = (model(at.mu + wide(at.sigma, x) * z, t) - target).square().mean()
    for got in (flow.loss(model, x, noise=noise), flow.loss_at(model, t, at, noise=noise)):
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(loss, model.mix.weight, retain_graph=True)[0] for loss in (got, expected)]
        torch.testing.assert_close(*grads)


def test_on_the_optimal_transport_path_it_is_flow_matching():
    model, noise, x = Net(), Noise(3), data()
    flow = gk.ConditionalFlowMatching(lambda t, x: wide(t, x) * x, lambda t, x: 1 - 0.9 * t)
    expected = gk.FlowMatching(sigma_min=0.1).loss(model, x, noise=noise)
    torch.testing.assert_close(flow.loss(model, x, noise=noise), expected)


def test_half_precision_data_has_a_loss_and_a_gradient():
    model, x = nn.Linear(3, 3), data(dtype=torch.bfloat16)
    loss = gk.ConditionalFlowMatching(curved().mu, curved().sigma).loss(
        lambda x, t: model(x), x, model_dtype=torch.float32
    )
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(model.weight.grad).all()


def test_sampling_solves_the_ode_and_refuses_what_reads_data():
    flow = gk.ConditionalFlowMatching(curved().mu, curved().sigma)

    def v(x, t):
        return torch.cos(x)

    torch.testing.assert_close(flow.sample(v, (4, 2), seed=1), gk.RectifiedFlow().sample(v, (4, 2), seed=1))
    torch.testing.assert_close(flow.log_prob(v, torch.ones(4, 2)), gk.RectifiedFlow().log_prob(v, torch.ones(4, 2)))
    x = torch.zeros(4, 2)
    refused = [
        {"guide": lambda x, t, y: y.sum()}, {"init": x, "strength": 0.5}, {"known": x, "mask": x},
        {"along": paths.Cosine()}, {"apg": gk.APG(), "cond": {}, "uncond": {}, "guidance_scale": 2.0},
    ]  # fmt: skip
    for options in refused:
        with pytest.raises(ValueError, match="path: this flow has a velocity, and no (alpha|sigma|noise level)"):
            flow.sample(v, (4, 2), steps=4, **options)


@pytest.mark.parametrize("make, error, words", [
    (lambda: flows.ConditionalPath(1.0, lambda t, x: t), TypeError, r"mu: expected a callable of \(t, x1\), got float"),
    (lambda: flows.ConditionalPath(lambda t, x: x, lambda t, x: x).at(torch.rand(7), data()), ValueError,
     r"sigma: expected shape \(7,\) from the function, got \(7, 2, 3\)"),
    (lambda: flows.ConditionalPath(lambda t, x: 1.0, lambda t, x: t).at(torch.rand(7), data()), TypeError,
     "mu: expected a tensor from the function, got float"),
    (lambda: flows.conditional_field(data(), curved_moments(torch.full((7,), 1.0, dtype=F64), data(), 0.0)), ValueError,
     "sigma: expected numbers > 0, where the field is defined"),
    (lambda: gk.ConditionalFlowMatching.loss_at(Net(), 0.5, curved_moments(torch.rand(7), data())._replace(
        d_mu=torch.zeros(7, 2))), ValueError, r"d_mu: expected shape \(7, 2, 3\) like mu, got \(7, 2\)"),
    (lambda: gk.ConditionalFlowMatching.loss_at(Net(), 0.5, curved_moments(torch.rand(7), data())._replace(
        sigma=torch.full((7,), -1.0))), ValueError, "sigma: expected a finite number >= 0, got -1.0"),
])  # fmt: skip
def test_a_bad_argument_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
