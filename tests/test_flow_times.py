"""Training times: inverse distribution functions against scipy, the same on every device, and their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import genkern as gk
from genkern import flows
from genkern.noise import Noise, Purpose

stats = pytest.importorskip("scipy.stats")
integrate = pytest.importorskip("scipy.integrate")

F64 = torch.float64
U = torch.cat([torch.logspace(-9, -2, 40, dtype=F64), torch.linspace(0.01, 0.99, 99, dtype=F64)])
U = torch.cat([U, 1 - torch.logspace(-9, -2, 40, dtype=F64)])
BETAS = [(2.0, 5.0), (0.5, 0.5), (1.0, 1.0), (0.6, 3.0), (8.0, 1.5), (0.05, 0.2), (300.0, 200.0)]
TIMES = [
    flows.Uniform(), flows.LogitNormal(), flows.LogitNormal(-0.5, 0.7), flows.LogitNormal(1.0, 2.0), flows.UShaped(),
    flows.UShaped(0.1), flows.UShaped(12.0), *[flows.Beta(a, b) for a, b in BETAS[:5]],
]  # fmt: skip


def logit_normal(mean, std):
    return lambda t: stats.norm.cdf(np.log(t / (1 - t)), mean, std)


@pytest.mark.parametrize("a, b", BETAS)
def test_beta_times_are_the_quantiles_of_scipy(a, b):
    times = flows.Beta(a, b)
    t = times(U).numpy()
    np.testing.assert_allclose(t, stats.beta.ppf(U.numpy(), a, b), rtol=1e-8, atol=1e-12)
    inside = (t > 1e-3) & (t < 1 - 1e-3)
    np.testing.assert_allclose(times.density(torch.from_numpy(t[inside])), stats.beta.pdf(t[inside], a, b), rtol=1e-9)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.7), (1.0, 2.0)])
def test_logit_normal_times_are_the_quantiles_of_scipy(mean, std):
    t = flows.LogitNormal(mean, std)(U).numpy()
    expected = 1 / (1 + np.exp(-stats.norm.ppf(U.numpy(), mean, std)))
    np.testing.assert_allclose(t, expected, rtol=1e-12)
    inside = (t > 1e-6) & (t < 1 - 1e-6)
    np.testing.assert_allclose(logit_normal(mean, std)(t[inside]), U.numpy()[inside], rtol=1e-6)


@pytest.mark.parametrize("a", [0.1, 4.0, 12.0])
def test_u_shaped_times_have_the_mirrored_exponential_density(a):
    times = flows.UShaped(a)
    t = times(U)
    shape = np.exp(a * t.numpy()) + np.exp(a * (1 - t.numpy()))
    norm = integrate.quad(lambda s: np.exp(a * s) + np.exp(a * (1 - s)), 0, 1)[0]
    np.testing.assert_allclose(times.density(t), shape / norm, rtol=1e-10)
    for u, s in zip(U[::9].tolist(), t[::9].tolist(), strict=True):
        assert integrate.quad(lambda r: float(times.density(torch.tensor(r, dtype=F64))), 0, s)[0] == pytest.approx(u)


@pytest.mark.parametrize("times", TIMES)
def test_density_is_one_over_the_slope_of_the_quantiles(times):
    u = torch.linspace(0.02, 0.98, 25, dtype=F64).requires_grad_()
    t = times(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    # Beta's cubic pieces carry the slope to their order, h^3 of pieces h = 0.023 long.
    torch.testing.assert_close(times.density(t.detach()) * slope, torch.ones_like(slope), rtol=1e-6, atol=0)


@pytest.mark.parametrize("times", TIMES)
def test_drawn_times_have_the_distribution(times):
    noise = Noise(11).at(Purpose.TIMES)
    t = times(gk.ops.uniform((4000,), noise=noise, dtype=F64))
    u = torch.linspace(0.0, 1.0, 2001, dtype=F64)[1:-1]
    cdf = np.interp(t.numpy(), times(u).numpy(), u.numpy())
    assert stats.kstest(cdf, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("times", [*TIMES, flows.Stratified(flows.LogitNormal())])
def test_times_are_in_the_unit_interval_and_the_same_on_every_device(times, device):
    noise = Noise(3).at(Purpose.TIMES)
    t = times(gk.ops.uniform((5000,), noise=noise, device=device, dtype=F64)).cpu()
    assert 0.0 <= float(t.min()) and float(t.max()) <= 1.0
    here = times(gk.ops.uniform((5000,), noise=noise, dtype=F64))
    torch.testing.assert_close(t, here, rtol=1e-13, atol=0)


def test_stratified_times_are_one_in_each_part():
    u = torch.rand(64, dtype=F64)
    t = flows.Stratified()(u)
    assert torch.equal((t * 64).floor(), torch.arange(64, dtype=F64))
    parts = logit_normal(0.3, 1.2)(flows.Stratified(flows.LogitNormal(0.3, 1.2))(u).numpy())
    np.testing.assert_array_equal(np.floor(parts * 64), np.arange(64))


@pytest.mark.parametrize("flow", [gk.FlowMatching(), gk.RectifiedFlow()])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_loss_draws_its_times_from_the_uniforms_of_the_noise(flow, dtype):
    seen, times, x = [], flows.LogitNormal(), torch.randn(6, 3, dtype=dtype)
    for ids in (None, [5, 4, 3, 2, 1, 0]):
        flow.loss(lambda x, t: seen.append(t) or x, x, times=times, noise=Noise(4, sample_ids=ids))
    u = gk.ops.uniform((6,), noise=Noise(4).at(Purpose.TIMES), dtype=F64)
    assert torch.equal(seen[0], times(u).to(dtype))
    assert torch.equal(seen[1], seen[0].flip(0))
    given = torch.rand(6)
    expected = flow.loss(lambda x, t: x, x, t=given, noise=Noise(4))
    assert torch.equal(flow.loss(lambda x, t: x, x, times=given, noise=Noise(4)), expected)


def test_weights_of_the_times_and_of_the_caller_are_multiplied():
    flow, x, w, v = gk.FlowMatching(), torch.randn(6, 3), torch.rand(6), torch.rand(6)
    losses = flow.loss(lambda x, t: x, x, noise=Noise(1), reduction="none")
    for weight in (v, lambda t: v, None, 2.0):
        got = flow.loss(lambda x, t: x, x, times=lambda u: (u, w), weight=weight, noise=Noise(1), reduction="none")
        factor = 1.0 if weight is None else v if not isinstance(weight, float) else weight
        torch.testing.assert_close(got, losses * w * factor)


@pytest.mark.parametrize("times", [flows.LogitNormal(0.3, 1.5), flows.UShaped(), flows.Beta(1.2, 0.8)])
def test_loss_weighed_by_one_over_the_density_is_that_of_uniform_times(times):
    """E (a t - b)^2 = a^2/3 - a b + b^2 for uniform t: the loss of the network a t at x = b, without noise."""
    n, a, b = 20_000, 2.0, 0.7
    x = torch.full((n, 1), b, dtype=F64)
    got = gk.RectifiedFlow().loss(
        lambda x, t: a * t[:, None], x, torch.zeros_like(x), times=times, noise=Noise(2), reduction="none",
        weight=lambda t: 1.0 / times.density(t),
    )  # fmt: skip
    assert float(got.mean()) == pytest.approx(a * a / 3 - a * b + b * b, abs=4 * float(got.std()) / n**0.5)


@pytest.mark.parametrize("make, words", [
    (lambda: flows.LogitNormal(std=0.0), "std: expected a number > 0, got 0.0"),
    (lambda: flows.UShaped(-1.0), "a: expected a number > 0, got -1.0"),
    (lambda: flows.Beta(0.0, 1.0), "alpha: expected a number > 0, got 0.0"),
    (lambda: gk.FlowMatching().loss(lambda x, t: x, torch.zeros(3, 2), t=0.5, times=flows.Uniform()),
     "times: expected None beside t"),
    (lambda: gk.FlowMatching().loss(lambda x, t: x, torch.zeros(3, 2), times=lambda u: u[:2]),
     r"times: expected a tensor of shape \(3,\) from the callable, got \(2,\)"),
    (lambda: gk.FlowMatching().loss(lambda x, t: x, torch.zeros(3, 2), times=lambda u: u + 1),
     "times: expected a number from 0 to 1"),
])  # fmt: skip
def test_bad_argument_of_times_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
