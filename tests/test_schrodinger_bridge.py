"""SB-CFM: the entropic plan and the bridge's field against the closed form between Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import genkern as gk
from genkern import flows
from genkern.noise import Noise, Purpose

F64 = torch.float64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 2, dtype=F64)

    def forward(self, x, t):
        return torch.tanh(self.mix(x)) * (1 + t[:, None])


def batch(n, seed=0, scale=0.6, mean=0.8):
    g = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, n, 2, dtype=F64, generator=g)
    return x0, mean + scale * x1, torch.rand(n, dtype=F64, generator=g)


def correlation(a, b, sigma):
    """Cov(X_0, X_1) of the bridge between N(0, a^2) and N(m, b^2): c^2 + sigma^2 c = a^2 b^2. Mallasto et al.,
    arXiv:2006.03416; Bunne et al., arXiv:2202.05722."""
    return 0.5 * (math.sqrt(4 * a * a * b * b + sigma**4) - sigma * sigma)


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_plan_between_gaussians_has_its_closed_form(sigma):
    n, total = 400, []
    for seed in range(3):
        x0, x1, _ = batch(n, seed)
        plan = flows.Sinkhorn(2 * sigma**2, 80, absolute=True).plan(x0, x1) / n
        total.append(((x0 - x0.mean(0)).T @ plan @ (x1 - x1.mean(0))).diagonal())
    assert float(torch.cat(total).mean()) == pytest.approx(correlation(1.0, 0.6, sigma), abs=0.04)


def test_epsilon_of_the_costs_is_epsilon_of_their_mean_in_its_units():
    x0, x1, u = batch(40)
    mean = float(flows.couplings.costs(x0, x1).mean())
    absolute, relative = flows.Sinkhorn(0.3 * mean, absolute=True), flows.Sinkhorn(0.3)
    torch.testing.assert_close(absolute.plan(x0, x1), relative.plan(x0, x1))
    assert torch.equal(absolute(x0, x1, {}, u), relative(x0, x1, {}, u))


def test_loss_and_gradient_are_those_of_the_written_out_formula(device):
    bridge, model, noise = gk.SchrodingerBridge(0.7), Net().to(device), Noise(3)
    x0, x1, _ = (v.to(device) for v in batch(16))
    t = gk.ops.uniform((16,), noise=noise.at(Purpose.TIMES), dtype=F64, device=device)
    u = gk.ops.uniform((16,), noise=noise.at(Purpose.TIMES, 2), dtype=F64, device=device)
    z = gk.ops.randn((16, 2), noise=noise.at(Purpose.TRAINING, 1), dtype=F64, device=device)
    source, w = x0[bridge.coupling(x0, x1, {}, u)], t[:, None]
    x_t = (1 - w) * source + w * x1 + 0.7 * (w * (1 - w)).sqrt() * z
    target = x1 - source + 0.7 * (1 - 2 * w) / (2 * (w * (1 - w)).sqrt()) * z
    expected = (model(x_t, t) - target).square().mean()
    got = bridge.loss(model, x1, x0, noise=noise)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(loss, model.mix.weight)[0] for loss in (got, expected)]
    torch.testing.assert_close(*grads)
    field = flows.conditional_field(x_t, bridge.moments(t, source, x1))
    torch.testing.assert_close(field, target)


@pytest.fixture(scope="module")
def coupled():
    """Sources and data, coupled by the bridge of sigma = 0.8 in batches of 400."""
    bridge, found = gk.SchrodingerBridge(0.8, iterations=60), []
    for seed in range(6):
        x0, x1, u = batch(400, seed)
        found.append((x0[bridge.coupling(x0, x1, {}, u)], x1))
    return bridge, *(torch.cat(part) for part in zip(*found, strict=True))


@pytest.mark.parametrize("t", [0.15, 0.5, 0.8])
def test_field_regressed_on_the_state_is_the_bridges_own(t, coupled):
    """Between Gaussians E[u | x_t] = m + (V'/2V)(x - t m), V = (1-t)^2 + t^2 b^2 + 2t(1-t) c + sigma^2 t (1-t)."""
    (bridge, x0, x1), b = coupled, 0.6
    c, square = correlation(1.0, b, bridge.sigma), bridge.sigma**2
    v = (1 - t) ** 2 + (t * b) ** 2 + 2 * t * (1 - t) * c + square * t * (1 - t)
    d_v = -2 * (1 - t) + 2 * t * b * b + 2 * (1 - 2 * t) * c + square * (1 - 2 * t)
    at = bridge.moments(torch.full((len(x1),), t, dtype=F64), x0, x1)
    x = at.mu + at.sigma[:, None] * torch.randn(x1.shape, dtype=F64)
    centred, field = x - x.mean(0), flows.conditional_field(x, at)
    spread = float(centred.square().mean())
    assert spread == pytest.approx(v, abs=0.05)
    assert float((centred * field).mean()) / spread == pytest.approx(d_v / (2 * v), abs=0.08)


def test_the_flow_of_the_bridges_field_is_between_the_marginals():
    sigma, m, b = 0.8, 0.8, 0.6
    c = correlation(1.0, b, sigma)

    def field(x, t):
        t = t.to(x.dtype)[:, None]
        v = (1 - t) ** 2 + (t * b) ** 2 + 2 * t * (1 - t) * c + sigma**2 * t * (1 - t)
        d_v = -2 * (1 - t) + 2 * t * b * b + 2 * (1 - 2 * t) * c + sigma**2 * (1 - 2 * t)
        return m + d_v / (2 * v) * (x - t * m)

    z = torch.randn(50, 2, dtype=F64)
    found = gk.SchrodingerBridge(sigma).sample(field, x0=z, steps=100, sampler="rk4", dtype=F64)
    torch.testing.assert_close(found, m + b * z, rtol=1e-5, atol=1e-5)


def test_without_noise_it_is_optimal_transport_flow_matching():
    model, (x0, x1, _) = Net(), batch(16)
    bridge, t = gk.SchrodingerBridge(1e-4), torch.linspace(0.2, 0.8, 16, dtype=F64)
    got = bridge.loss(model, x1, x0, t=t, coupling=flows.Optimal())
    expected = gk.RectifiedFlow().loss(model, x1, x0, t=t, coupling=flows.Optimal())
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)


def test_pairs_may_be_given_and_the_ends_are_kept_finite():
    model, (x0, x1, _), noise = Net(), batch(8), Noise(1)
    bridge = gk.SchrodingerBridge(0.5)
    for t in (0.0, 1.0):
        assert torch.isfinite(bridge.loss(model, x1, x0, t=t, coupling=None, noise=noise))
    drawn = bridge.loss(model, x1, noise=noise, coupling=None)
    z = gk.ops.randn((8, 2), noise=noise.at(Purpose.TRAINING), dtype=F64)
    torch.testing.assert_close(drawn, bridge.loss(model, x1, z, noise=noise, coupling=None))


@pytest.mark.parametrize("make, words", [
    (lambda: gk.SchrodingerBridge(0.0), "sigma: expected a number > 0, got 0.0"),
    (lambda: gk.SchrodingerBridge().loss(Net(), torch.zeros(3, 2), coupling="exact"), "coupling: expected one of 'ent"),
    (lambda: gk.SchrodingerBridge().loss(Net(), torch.zeros(3, 2), torch.zeros(3, 2), noise=torch.zeros(3, 2)),
     "noise: expected a Noise beside x0"),
    (lambda: gk.SchrodingerBridge().sample(lambda x, t: x, (3, 2), guide=lambda x, t, y: y.sum()),
     "path: this flow has"),
])  # fmt: skip
def test_a_bad_argument_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
