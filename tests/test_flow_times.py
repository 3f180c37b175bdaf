"""Training times: inverse distribution functions against scipy, the same on every device, and their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import genkern as gk
from genkern import flows
from genkern.methods.times import Antithetic, LossSecondMoment, Stratified, Uniform
from genkern.noise import Noise, Purpose

stats = pytest.importorskip("scipy.stats")
integrate = pytest.importorskip("scipy.integrate")

F64 = torch.float64
U = torch.cat([torch.logspace(-9, -2, 40, dtype=F64), torch.linspace(0.01, 0.99, 99, dtype=F64)])
U = torch.cat([U, 1 - torch.logspace(-9, -2, 40, dtype=F64)])
BETAS = [(2.0, 5.0), (0.5, 0.5), (1.0, 1.0), (0.6, 3.0), (8.0, 1.5), (0.05, 0.2), (300.0, 200.0)]
TIMES = [
    flows.LogitNormal(), flows.LogitNormal(-0.5, 0.7), flows.LogitNormal(1.0, 2.0), flows.UShaped(),
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


@pytest.mark.parametrize("times", TIMES)
def test_times_are_in_the_unit_interval_and_the_same_on_every_device(times, device):
    noise = Noise(3).at(Purpose.TIMES)
    t = times(gk.ops.uniform((5000,), noise=noise, device=device, dtype=F64)).cpu()
    assert 0.0 <= float(t.min()) and float(t.max()) <= 1.0
    here = times(gk.ops.uniform((5000,), noise=noise, dtype=F64))
    torch.testing.assert_close(t, here, rtol=1e-13, atol=0)


LOSSES = [
    gk.FlowMatching().loss, gk.RectifiedFlow().loss, gk.Diffusion("continuous_vp").loss, gk.Diffusion(timesteps=50).loss
]  # fmt: skip


def told(loss, times, size=16, ids=None, dtype=torch.float32):
    """The times that the network is told."""
    seen = []
    loss(
        lambda x, t: seen.append(t) or x, torch.zeros(size, 2, dtype=dtype), times=times,
        noise=Noise(9, sample_ids=ids),
    )  # fmt: skip
    return seen[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sampler", [Uniform, Stratified, Antithetic])
def test_every_loss_draws_its_times_in_the_same_two_steps(loss, sampler):
    """u as the sampler has it, then F^{-1}(u), in discrete time floor(T F^{-1}(u))."""
    logit_normal, diffusion = flows.LogitNormal(0.3, 1.2), getattr(loss, "__self__", None)
    u, bare = (sampler().uniforms(Noise(9), 16, torch.device("cpu"), dtype) for dtype in (F64, torch.float32))
    discrete = isinstance(diffusion, gk.Diffusion) and diffusion.discrete

    def expected(t):
        return (50 * t).long() if discrete else t.float()

    assert torch.equal(told(loss, sampler(of=logit_normal)), expected(logit_normal(u)))
    assert torch.equal(told(loss, sampler.__name__.lower()), expected(bare))
    assert torch.equal(told(loss, sampler()), expected(bare))
    if sampler is Uniform:
        assert torch.equal(told(loss, logit_normal), expected(logit_normal(u)))
        assert torch.equal(told(loss, None), expected(bare))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("times", ["stratified", "antithetic", Stratified(of=flows.UShaped())])
def test_time_of_a_sample_goes_by_its_id_and_not_by_its_place(loss, times):
    ids = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(told(loss, times, ids=ids), told(loss, times)[ids])


def test_stratified_times_are_one_in_each_part_of_equal_probability():
    t = told(LOSSES[0], Stratified(of=flows.LogitNormal(0.3, 1.2)), 64, dtype=F64)
    start = float(gk.ops.uniform((1,), noise=Noise(9).at(Purpose.TIMES, 1), dtype=F64))
    places = np.floor((logit_normal(0.3, 1.2)(t.numpy()) - start) % 1.0 * 64)
    assert sorted(places) == list(range(64))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weight", [2.0, 2, torch.full((16,), 2.0), torch.tensor([2.0], dtype=F64)])
def test_weight_of_drawn_times_may_be_a_number_too(loss, weight):
    x = torch.randn(16, 3)
    plain, twice = (
        loss(lambda x, t: x, x, times=times, noise=Noise(1)) for times in (lambda u: u, lambda u: (u, weight))
    )
    torch.testing.assert_close(twice, 2.0 * plain)


@pytest.mark.parametrize("std", [5.0, 50.0])
def test_logit_normal_times_stay_where_the_density_has_an_inverse_in_float32(std):
    times = flows.LogitNormal(std=std)
    t = told(LOSSES[0], times, 20_000)
    assert 0.0 < float(t.min()) and float(t.max()) < 1.0
    assert (1.0 / times.density(t)).isfinite().all()
    gk.FlowMatching().loss(
        lambda x, t: x, torch.zeros(20_000, 1), times=times, weight=lambda t: 1.0 / times.density(t), noise=Noise(9)
    )


def test_logit_normal_density_is_zero_at_both_ends():
    assert torch.equal(flows.LogitNormal().density(torch.tensor([0.0, 1.0])), torch.zeros(2))


def test_u_shaped_times_of_the_largest_a_are_finite_and_have_their_density_in_float32():
    """In the lower half p(t) = a/2 e^{-a t} and t = -log(1 - 2u)/a, where e^{-a} is nothing beside 1."""
    times, u = flows.UShaped(700.0), torch.linspace(0.01, 0.4, 20, dtype=F64)
    t = times(u)
    torch.testing.assert_close(t, -torch.log1p(-2.0 * u) / 700.0, rtol=1e-9, atol=0)
    torch.testing.assert_close(times.density(t.float()), (350.0 * torch.exp(-700.0 * t)).float(), rtol=1e-4, atol=0)
    assert times(torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=F64)).isfinite().all()


@pytest.mark.parametrize("of", [0.5, flows.LogitNormal, LossSecondMoment(10), Uniform()])
@pytest.mark.parametrize("sampler", [Uniform, Stratified, Antithetic])
def test_what_is_no_distribution_is_refused_by_the_sampler_of_times(sampler, of):
    with pytest.raises(TypeError, match=r"of: expected a callable of numbers in \(0, 1\), got"):
        sampler(of=of)


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
    (lambda: flows.UShaped(1500.0), "a: expected a number from 0 to 700, got 1500.0"),
    (lambda: flows.Beta(0.0, 1.0), "alpha: expected a number > 0, got 0.0"),
    (lambda: gk.FlowMatching().loss(lambda x, t: x, torch.zeros(3, 2), t=0.5, times=flows.UShaped()),
     "times: expected None beside t"),
    (lambda: gk.FlowMatching().loss(lambda x, t: x, torch.zeros(3, 2), times=lambda u: u[:2]),
     r"times: expected a tensor of shape \(3,\) from the callable, got \(2,\)"),
    (lambda: gk.FlowMatching().loss(lambda x, t: x, torch.zeros(3, 2), times=lambda u: u + 1),
     "times: expected a number from 0 to 1"),
    (lambda: gk.FlowMatching().loss(lambda x, t: x, torch.zeros(3, 2), times="even"),
     "times: expected one of 'uniform', 'stratified', 'antithetic', got 'even'"),
    (lambda: gk.RectifiedFlow().loss(lambda x, t: x, torch.zeros(3, 2), times=LossSecondMoment(10)),
     r"times: expected another in a flow, got LossSecondMoment\(10\), which draws the timesteps of Diffusion"),
])  # fmt: skip
def test_bad_argument_of_times_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
