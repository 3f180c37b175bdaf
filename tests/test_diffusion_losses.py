"""The losses of Diffusion: weightings for every prediction, how times are drawn, offset noise and perturbed input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_diffusion import Net, gradient

import genkern as gk
from genkern.methods.times import Antithetic, LossSecondMoment, Stratified, Uniform
from genkern.methods.weightings import SNR, MinSNR, SoftMinSNR, over_k
from genkern.noise import Noise, Purpose

F64 = torch.float64
SHAPE = (6, 3, 5)
T = torch.tensor([0, 10, 200, 500, 998, 999])
WEIGHTS = {
    "snr": lambda s: s,
    "min_snr": lambda s: np.minimum(s, 5.0),
    "soft_min_snr": lambda s: 4.0 * s / (s + 4.0),
}


def terms(diffusion):
    """x, alpha, sigma and z of a batch, [B, 1, 1] the scales."""
    x = torch.randn(SHAPE, dtype=F64, generator=torch.Generator().manual_seed(1))
    a = torch.tensor(diffusion.alphas_cumprod, dtype=F64)[T].reshape(-1, 1, 1)
    return x, a.sqrt(), (1 - a).sqrt(), gk.ops.randn(SHAPE, noise=Noise(5).at(Purpose.TRAINING), dtype=F64)


def data_of(prediction, m, x_t, alpha, sigma):
    if prediction == "sample":
        return m
    if prediction == "v":
        return alpha * x_t - sigma * m
    return (x_t - sigma * (-sigma * m if prediction == "score" else m)) / alpha


# Weightings


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "score"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weighting_is_the_weight_of_the_error_of_the_data_whatever_is_predicted(prediction, name):
    diffusion, model = gk.Diffusion(prediction=prediction), Net()
    x, alpha, sigma, z = terms(diffusion)
    x_t = alpha * x + sigma * z
    y = data_of(prediction, model(x_t, T), x_t, alpha, sigma)
    w = torch.as_tensor(WEIGHTS[name](((alpha / sigma) ** 2).flatten().numpy()))
    expected = (w * (y - x).square().mean((1, 2))).mean()
    got = diffusion.loss(model, x, t=T, noise=Noise(5), weighting=name)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient(got, model), gradient(expected, model), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_min_snr_has_the_published_weights(prediction):
    """min(S, g) / S for the noise, min(S, g) / (S + 1) for v, min(S, g) for the data: arXiv:2303.09556."""
    diffusion = gk.Diffusion()
    alpha, sigma = (torch.tensor(f(np.arange(1000)), dtype=F64) for f in (diffusion.path.alpha, diffusion.path.sigma))
    s = (alpha / sigma) ** 2
    below = {"epsilon": s, "v": s + 1, "sample": torch.ones_like(s)}[prediction]
    for gamma in (1.0, 5.0, 20.0):
        found = MinSNR(gamma).of(alpha, sigma, prediction)
        torch.testing.assert_close(found, s.clamp(max=gamma) / below, rtol=1e-12, atol=0)


def test_a_given_weight_of_log_snr_and_a_named_one_agree():
    diffusion = gk.Diffusion(prediction="v")
    x, model = terms(diffusion)[0], Net()
    named = diffusion.loss(model, x, t=T, noise=Noise(5), weighting=MinSNR(3.0))
    given = diffusion.loss(model, x, t=T, noise=Noise(5), weighting=lambda log_snr: log_snr.exp().clamp(max=3.0))
    torch.testing.assert_close(given, named)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_gamma_by_timestep_weighs_the_error_of_the_noise(prediction):
    diffusion, model, gamma = gk.Diffusion(prediction=prediction), Net(), torch.rand(1000, dtype=F64)
    x, alpha, sigma, z = terms(diffusion)
    x_t = alpha * x + sigma * z
    eps = (x_t - alpha * data_of(prediction, model(x_t, T), x_t, alpha, sigma)) / sigma
    expected = gamma[T] * (eps - z).square().mean((1, 2))
    for given in (gamma, gamma.numpy(), gamma.tolist()):
        got = diffusion.loss(model, x, t=T, noise=Noise(5), weighting=given, reduction="none")
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("weighting", [SNR(), MinSNR(), SoftMinSNR()])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_weights_are_finite_at_the_ends_of_a_path_where_their_limits_are(weighting, prediction):
    alpha, sigma = torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    found = weighting.of(alpha, sigma, prediction)
    unbounded = prediction == "sample" and isinstance(weighting, SNR)
    assert found.isnan().sum() == 0
    assert found[0].isfinite()
    assert found[1].isfinite() or unbounded


def test_squared_errors_of_data_and_prediction_have_the_stated_ratio():
    alpha, sigma = 0.6, 0.8
    y, e, dy = 0.3, -0.7, 1e-3
    x_t = alpha * y + sigma * e
    of = {"epsilon": lambda y, e: e, "sample": lambda y, e: y, "v": lambda y, e: alpha * e - sigma * y}
    for prediction, target in of.items():
        m = target(y + dy, (x_t - alpha * (y + dy)) / sigma) - target(y, e)
        assert dy**2 / m**2 == pytest.approx(over_k(alpha, sigma, prediction), rel=1e-9)


def test_weighting_and_weight_multiply():
    diffusion, model = gk.Diffusion(), Net()
    x, weight = terms(diffusion)[0], torch.rand(6, dtype=F64)
    each = diffusion.loss(model, x, t=T, noise=Noise(5), weighting="min_snr", reduction="none")
    both = diffusion.loss(model, x, t=T, noise=Noise(5), weighting="min_snr", weight=weight)
    torch.testing.assert_close(both, (each * weight).mean())
    by_time = diffusion.loss(model, x, t=T, noise=Noise(5), weighting="min_snr", weight=lambda t: 2.0)
    torch.testing.assert_close(by_time, 2.0 * each.mean())


def test_weightings_hold_in_continuous_time():
    diffusion, t = gk.Diffusion("cosine_log_snr", prediction="v"), torch.linspace(0.05, 0.95, 6, dtype=F64)
    x, model = torch.randn(SHAPE, dtype=F64), Net()
    each = diffusion.loss(model, x, t=t, noise=Noise(5), reduction="none")
    got = diffusion.loss(model, x, t=t, noise=Noise(5), reduction="none", weighting="min_snr")
    s = diffusion.path.snr(t)
    torch.testing.assert_close(got, each * s.clamp(max=5.0) / (s + 1))


# Times


def drawn(sampler, size, noise, ids=None):
    return sampler.uniforms(noise.of_samples(ids), size, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("sampler", [Uniform(), Stratified(), Antithetic()])
def test_every_sample_alone_has_a_uniform_time(sampler):
    u = torch.stack([drawn(sampler, 4, Noise(1, stream=k)) for k in range(4000)])
    assert float(u.min()) > 0.0
    for column in u.T:
        counts = torch.histc(column, 10, 0.0, 1.0)
        assert float(((counts - 400.0) ** 2 / 400.0).sum()) < 33.7  # 99.99% of chi-squared with 9 degrees of freedom


def test_stratified_times_have_one_sample_in_every_interval():
    for stream in range(50):
        u = drawn(Stratified(), 16, Noise(3, stream=stream)).double()
        start = float(gk.ops.uniform((1,), noise=Noise(3, stream=stream, draw=(5 << 24) | 1)))
        places = ((u - start) % 1.0 * 16).floor().long()
        assert sorted(places.tolist()) == list(range(16))


def test_stratified_times_of_a_spread_batch_are_those_of_the_whole():
    whole = drawn(Stratified(8), 8, Noise(3))
    parts = [drawn(Stratified(8), 4, Noise(3), ids) for ids in (range(4), torch.arange(4, 8))]
    assert torch.equal(torch.cat(parts), whole)


def test_antithetic_times_come_in_pairs():
    u = drawn(Antithetic(), 10, Noise(3))
    torch.testing.assert_close(u[::2] + u[1::2], torch.ones(5))
    assert torch.equal(drawn(Antithetic(), 3, Noise(3), [5, 4, 8]), u[[5, 4, 8]])


@pytest.mark.parametrize("times", ["uniform", "stratified", "antithetic", Stratified(6)])
def test_drawn_times_reach_the_loss(times):
    diffusion, model, x, seen = gk.Diffusion(), Net(), torch.randn(SHAPE, dtype=F64), []
    got = diffusion.loss(lambda x, t: seen.append(t) or model(x, t), x, times=times, noise=Noise(2))
    assert torch.equal(diffusion.loss(model, x, t=seen[0], noise=Noise(2)), got)


def test_a_callers_own_sampler_of_times_is_asked():
    class Late:
        def uniforms(self, noise, size, device, dtype):
            return 0.9 + 0.1 * Uniform().uniforms(noise, size, device, dtype)

    seen = []
    gk.Diffusion().loss(lambda x, t: seen.append(t) or x, torch.zeros(500, 1), times=Late(), noise=Noise(1))
    assert 900 <= int(seen[0].min()) < 905 and 995 < int(seen[0].max()) < 1000


@pytest.mark.parametrize("sampler, at_most", [(Stratified(), 0.2), (Antithetic(), 0.5)])
def test_means_over_drawn_times_vary_less(sampler, at_most):
    def variance(of):
        return torch.stack([drawn(of, 16, Noise(0, stream=k)).square().mean() for k in range(300)]).var()

    assert variance(sampler) < at_most * variance(Uniform())


def test_importance_sampling_is_uniform_until_every_timestep_has_its_losses():
    sampler, u = LossSecondMoment(4, history=2), torch.rand(1000)
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    sampler.update(torch.arange(4), losses)
    t, weight = sampler.draw(u)
    assert torch.equal(t, (u.double() * 4).long())
    torch.testing.assert_close(weight, torch.ones(1000))
    sampler.update(torch.arange(4), 2 * losses)
    root = losses.double() * math.sqrt((1 + 4) / 2)
    expected = 0.999 * root / root.sum() + 0.001 / 4
    torch.testing.assert_close(sampler.probabilities(), expected)


def test_importance_weights_leave_the_expected_loss_as_it_is():
    sampler = LossSecondMoment(5, history=1)
    losses = torch.tensor([4.0, 0.1, 1.0, 0.5, 2.0], dtype=F64)
    sampler.update(torch.arange(5), losses)
    u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000  # an even grid: the expectation over u
    t, weight = sampler.draw(u)
    torch.testing.assert_close((weight * losses[t]).mean(), losses.mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.bincount(t).double() / 200_000, sampler.probabilities(), rtol=0, atol=1e-5)


def test_history_keeps_the_last_losses_of_each_timestep():
    sampler, history = LossSecondMoment(6, history=3), [[] for _ in range(6)]
    g = torch.Generator().manual_seed(0)
    for _ in range(30):
        t, losses = torch.randint(0, 6, (9,), generator=g), torch.rand(9, generator=g, dtype=F64)
        sampler.update(t, losses)
        for k, loss in zip(t.tolist(), losses.tolist(), strict=True):
            history[k].append(loss)
    assert sampler.counts.tolist() == [len(h) for h in history]
    for kept, h in zip(sampler.losses[:, :3].tolist(), history, strict=True):
        assert sorted(kept) == sorted(h[-3:])


def test_the_loss_draws_from_the_history_records_in_it_and_weighs():
    diffusion, model = gk.Diffusion(timesteps=4, schedule="squared_cosine"), Net()
    sampler, x = LossSecondMoment(4, history=1), torch.randn(SHAPE, dtype=F64)
    sampler.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    u = gk.ops.uniform((6,), noise=Noise(7).at(Purpose.TIMES), dtype=F64)
    t, weight = sampler.draw(u)
    each = diffusion.loss(model, x, t=t, noise=Noise(7), weighting="min_snr", reduction="none")
    for reduction, expected in (
        ("mean", (each * weight).mean()),
        ("sum", (each * weight).sum()),
        ("none", each * weight),
    ):
        copy = LossSecondMoment(4, history=1)
        copy.load_state_dict(sampler.state_dict())
        got = diffusion.loss(model, x, times=copy, noise=Noise(7), weighting="min_snr", reduction=reduction)
        torch.testing.assert_close(got, expected)
        slope = torch.autograd.grad(expected.sum(), list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(gradient(got.sum(), model), slope, rtol=1e-6, atol=1e-12)
    last = {int(k): float(v) for k, v in zip(t, each.detach(), strict=True)}
    for k, v in last.items():
        assert float(copy.losses[k, 0]) == pytest.approx(v, rel=1e-6)
    copy.recording = False
    before = copy.losses.clone()
    diffusion.loss(model, x, times=copy, noise=Noise(8))
    assert torch.equal(copy.losses, before)


def test_a_rare_timestep_is_drawn_as_often_as_its_probability_says():
    """From an even grid of the uniforms' own numbers, (w + 1/2) 2^-32, about where its interval ends."""
    sampler = LossSecondMoment(2, history=1, uniform=1e-7)
    sampler.update(torch.arange(2), torch.tensor([1.0, 1e-6], dtype=F64))
    p = sampler.probabilities()[1].item()
    u = sampler.uniforms(Noise(0), 4096, torch.device("cpu"), torch.float32)
    assert u.dtype == F64  # float32 has 2^-24 = 6e-8 between its numbers there
    grid = 1.0 - (torch.arange(20_000, dtype=F64) + 0.5) * 2.0**-32
    assert float((sampler.draw(grid)[0] == 1).sum()) * 2.0**-32 == pytest.approx(p, rel=1e-3)


def test_timesteps_of_importance_are_drawn_more_finely_than_float32_is():
    """Between two float32 numbers, 2^-24 apart above 1/2, the draws are uniform too: the moments of their places."""
    u = LossSecondMoment(4).uniforms(Noise(7), 40_000, torch.device("cpu"), torch.float32)
    assert ((u > 0) & (u < 1)).all()
    assert float(u.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(u)))
    place = (u[u > 0.5] * 2.0**24).frac()
    error = 4 / math.sqrt(len(place))
    assert float(place.mean()) == pytest.approx(1 / 2, abs=error / math.sqrt(12))
    assert float(place.var()) == pytest.approx(1 / 12, abs=error / math.sqrt(180))


def test_importance_leaves_the_loss_its_dtype():
    diffusion = gk.Diffusion("squared_cosine", 4)
    loss = diffusion.loss(lambda x, t: x, torch.randn(SHAPE), times=LossSecondMoment(4))
    assert loss.dtype == torch.float32


def test_a_loss_without_gradients_leaves_the_history():
    diffusion, sampler = gk.Diffusion("squared_cosine", 4), LossSecondMoment(4)
    with torch.no_grad():
        diffusion.loss(lambda x, t: x, torch.randn(SHAPE), times=sampler)
    assert not sampler.counts.any()
    diffusion.loss(lambda x, t: x, torch.randn(SHAPE), times=sampler)
    assert sampler.counts.sum() == SHAPE[0]


def test_gamma_of_the_host_is_copied_once_and_known_by_its_numbers():
    diffusion, model, gamma = gk.Diffusion("squared_cosine", 4), lambda x, t: 0.5 * x, np.array([1.0, 2.0, 3.0, 4.0])
    x, tables = torch.randn(SHAPE), diffusion._gammas

    def loss(given):
        return diffusion.loss(model, x, t=2, noise=Noise(1), weighting=given)

    first = loss(gamma)
    (kept,) = tables.values()
    assert loss(gamma.tolist()) == first
    assert [id(v) for v in tables.values()] == [id(kept)]
    gamma *= 2.0
    torch.testing.assert_close(loss(gamma), 2.0 * first)
    for k in range(30):
        loss(gamma + k)
    assert len(tables) < 12


# Added noise


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "score"])
def test_offset_noise_is_part_of_the_noise_and_perturbation_of_the_input_alone(prediction):
    diffusion, model = gk.Diffusion(prediction=prediction), Net()
    x, alpha, sigma, z = terms(diffusion)
    o, p = 0.1 * torch.randn(6, 3, 1, dtype=F64), 0.1 * torch.randn(SHAPE, dtype=F64)
    e = z + o
    m = model(alpha * x + sigma * (e + p), T)
    target = {"epsilon": e, "v": alpha * e - sigma * x, "sample": x, "score": -e}[prediction]
    expected = ((sigma * m if prediction == "score" else m) - target).square().mean()
    got = diffusion.loss(model, x, t=T, noise=Noise(5), offset_noise=o, input_perturbation=p)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient(got, model), gradient(expected, model), rtol=1e-6, atol=1e-9)


def test_offset_noise_alone_is_other_noise():
    diffusion, model = gk.Diffusion(), Net()
    x, _, _, z = terms(diffusion)
    o = torch.randn(1, 3, 1, dtype=F64)
    torch.testing.assert_close(
        diffusion.loss(model, x, t=T, noise=Noise(5), offset_noise=o), diffusion.loss(model, x, t=T, noise=z + o)
    )


# Bad input


@pytest.mark.parametrize("options, error, words", [
    ({"t": 3, "times": "uniform"}, ValueError, "times: expected None beside t"),
    ({"times": "even"}, ValueError, "times: expected one of 'uniform', 'stratified', 'antithetic', got 'even'"),
    ({"times": 3}, TypeError, r"times: expected a name, a TimeSampler or a callable of numbers in \(0, 1\), got 3"),
    ({"times": Stratified}, TypeError, "times: expected a name, a TimeSampler or a callable"),
    ({"times": LossSecondMoment(10)}, ValueError, r"times: expected LossSecondMoment\(1000\), got .*10"),
    ({"weighting": "p2"}, ValueError, "weighting: expected one of 'uniform', 'snr', 'min_snr', 'soft_min_snr'"),
    ({"weighting": [1.0, 2.0]}, ValueError, r"weighting: expected shape \(1000,\), one a timestep, got \(2,\)"),
    ({"weighting": np.full(1000, -1.0)}, ValueError, "weighting: expected a finite number >= 0"),
    ({"weighting": {}}, TypeError, "weighting: expected numbers, one a timestep, got dict"),
    ({"weighting": lambda s: 1.0}, TypeError, r"weighting: expected a tensor of shape \(6,\) from the callable"),
    ({"offset_noise": 0.1}, TypeError, "offset_noise: expected a tensor, got float"),
    ({"offset_noise": torch.zeros(6, 3)}, ValueError, r"offset_noise: expected a shape that broadcasts to \(6, 3, 5\)"),
    ({"input_perturbation": torch.zeros(1, dtype=F64)}, TypeError, "input_perturbation: expected torch.float32 like x"),
])  # fmt: skip
def test_bad_argument_is_named_and_nothing_is_drawn(options, error, words):
    x, state = torch.zeros(SHAPE), torch.get_rng_state()
    if "weighting" in options and callable(options["weighting"]):
        state = None
    with pytest.raises(error, match=words):
        gk.Diffusion().loss(lambda x, t: x, x, **options)
    assert state is None or torch.equal(torch.get_rng_state(), state)


def test_importance_sampling_and_gamma_by_timestep_are_refused_in_continuous_time():
    diffusion, x = gk.Diffusion("continuous_vp"), torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="times: expected another in continuous time, got LossSecondMoment"):
        diffusion.loss(lambda x, t: x, x, times=LossSecondMoment(10))
    with pytest.raises(TypeError, match="weighting: .* in continuous time, got list"):
        diffusion.loss(lambda x, t: x, x, weighting=[1.0])


@pytest.mark.parametrize("make, words", [
    (lambda: MinSNR(0.0), "gamma: expected a number > 0, got 0.0"),
    (lambda: SoftMinSNR(-1.0), "gamma: expected a number > 0"),
    (lambda: Stratified(0), "strata: expected an integer >= 1, got 0"),
    (lambda: LossSecondMoment(0), "timesteps: expected an integer >= 1"),
    (lambda: LossSecondMoment(3, history=0), "history: expected an integer >= 1"),
    (lambda: LossSecondMoment(3, uniform=0.0), r"uniform: expected a number in \(0, 1\]"),
    (lambda: LossSecondMoment(3).update(torch.tensor([3]), torch.zeros(1)), "t: expected integers from 0 to 2"),
])  # fmt: skip
def test_bad_option_of_a_weighting_or_a_sampler_of_times_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
