"""Stochastic steps with their log-density: against torch.distributions, in both modes, in any batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

import genkern as gk
from genkern.noise import Noise

F64 = torch.float64
SHAPE = (5, 3, 4)
DIFFUSION = gk.Diffusion()
T, S = 600, 400
PREDICTIONS = ["epsilon", "v", "sample", "score"]


def scales(t):
    return float(DIFFUSION.path.alpha(t)), float(DIFFUSION.path.sigma(t))


def gauss(x, m, t, s, eta, prediction, clip=None):
    """Mean and standard deviation of eq. (13.13), as it is written, in float64; t and s lists, one a sample."""
    alphas, sigmas = (
        [torch.tensor([scales(k)[j] for k in times], dtype=F64).reshape(-1, 1, 1) for times in (t, s)] for j in range(2)
    )
    (a_t, a_s), (s_t, s_s) = alphas, sigmas
    y, e = {
        "epsilon": lambda: ((x - s_t * m) / a_t, m),
        "v": lambda: (a_t * x - s_t * m, a_t * m + s_t * x),
        "sample": lambda: (m, (x - a_t * m) / s_t),
        "score": lambda: ((x + s_t**2 * m) / a_t, -s_t * m),
    }[prediction]()
    if isinstance(clip, gk.DynamicThreshold):
        bound = torch.quantile(y.abs().flatten(1), clip.ratio, dim=1).clamp(1.0, clip.max_value).reshape(-1, 1, 1)
        y = torch.minimum(torch.maximum(y, -bound), bound) / bound
    elif clip is not None:
        y = y.clamp(-clip, clip)
    d = eta * s_s / s_t * (1.0 - a_t**2 / a_s**2).sqrt()
    return a_s * y + (s_s**2 - d**2).sqrt() * e, d


def tensors(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=g, dtype=F64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, 0.8, gk.DynamicThreshold(0.8, 2.5)])
@pytest.mark.parametrize("by_sample", [False, True])
def test_log_density_is_that_of_the_gaussian(prediction, clip, by_sample, path):
    x, m, _ = tensors(F64)
    t, s = ([600, 700, 500, 650, 999], [400, 300, 499, 10, 0]) if by_sample else ([T] * 5, [S] * 5)
    eta = torch.tensor([0.3, 1.0, 0.8, 0.5, 0.9], dtype=F64) if by_sample else 0.7
    ends = [torch.tensor([scales(k)[j] for k in times], dtype=F64) for times in (t, s) for j in range(2)]
    ends = ends if by_sample else [float(end[0]) for end in ends]
    mean, std = gauss(x, m, t, s, eta.reshape(-1, 1, 1) if by_sample else eta, prediction, clip)
    options = {"eta": eta, "prediction": prediction, "clip": clip}
    x_s, log_prob = gk.steps.ddim(x, m, *ends, noise=Noise(3), **options)
    torch.testing.assert_close(x_s, mean + std * gk.ops.randn(SHAPE, noise=Noise(3), dtype=F64), rtol=1e-6, atol=1e-6)
    wanted = Normal(mean, std).log_prob(x_s).flatten(1).sum(1)
    torch.testing.assert_close(log_prob, wanted)
    (same, mean_log) = gk.steps.ddim(x, m, *ends, x_s=x_s, reduction="mean", **options)
    assert same is x_s
    torch.testing.assert_close(mean_log, wanted / 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
def test_scoring_has_the_bits_of_sampling_in_any_batch(dtype, path, device):
    x, m, u = (t.to(device) for t in tensors(dtype))
    w = torch.linspace(0.5, 2.0, 5, device=device)
    ends = (*scales(T), *scales(S))
    options = {"eta": 0.8, "uncond": u}
    x_s, sampled = gk.steps.ddim(x, m, *ends, noise=Noise(1), guidance_scale=w, **options)
    assert x_s.dtype == dtype and sampled.dtype == (F64 if dtype == F64 else torch.float32)
    _, scored = gk.steps.ddim(x, m.clone().requires_grad_(), *ends, x_s=x_s, guidance_scale=w, **options)
    assert torch.equal(scored, sampled)
    for part in (slice(0, 2), slice(2, 5), slice(4, 5)):
        options = {"eta": 0.8, "uncond": u[part], "guidance_scale": w[part]}
        _, alone = gk.steps.ddim(x[part], m[part], *ends, x_s=x_s[part], **options)
        assert torch.equal(alone, sampled[part])


def test_large_samples_score_with_the_bits_of_sampling():
    x, m = torch.randn(3, 70_001), torch.randn(3, 70_001)
    x_s, sampled = gk.steps.ddim(x, m, *scales(T), *scales(S), noise=Noise(1))
    for b in range(3):
        _, alone = gk.steps.ddim(x[b : b + 1], m[b : b + 1], *scales(T), *scales(S), x_s=x_s[b : b + 1])
        assert torch.equal(alone, sampled[b : b + 1])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradient_is_that_of_the_gaussian_with_the_state_held_constant(prediction, path):
    x, m, _ = tensors(F64)
    ends = (*scales(T), *scales(S))
    for given in (True, False):
        one, two = m.clone().requires_grad_(), m.clone().requires_grad_()
        x_s, log_prob = gk.steps.ddim(x, one, *ends, noise=Noise(3), eta=0.7, prediction=prediction)
        if given:
            x_s, log_prob = gk.steps.ddim(x, one, *ends, x_s=x_s, eta=0.7, prediction=prediction)
        mean, std = gauss(x, two, [T] * 5, [S] * 5, 0.7, prediction)
        wanted = Normal(mean, std).log_prob(x_s.detach()).flatten(1).sum(1)
        weights = torch.linspace(-1.0, 2.0, 5, dtype=F64)
        (got,), (expected,) = (
            torch.autograd.grad((each * weights).sum(), each_m) for each, each_m in ((log_prob, one), (wanted, two))
        )
        assert not x_s.requires_grad
        torch.testing.assert_close(got, expected)


def test_flow_step_is_its_formula_and_its_density():
    x, v, u = tensors(F64)
    t, g = torch.tensor([0.1, 0.2, 0.5, 0.9, 0.99], dtype=F64), torch.linspace(0.1, 1.0, 5, dtype=F64)
    for time, coefficient in ((t, g), (0.3, 0.6)):
        t_, g_ = (c.reshape(-1, 1, 1) if isinstance(c, torch.Tensor) else c for c in (time, coefficient))
        velocity = u + 2.0 * (v - u)
        score = -(x - t_ * velocity) / (1.0 - t_)
        mean = x + 0.01 * (velocity + g_**2 / 2 * score)
        std = torch.as_tensor(g_ * 0.1, dtype=F64).expand(SHAPE)
        options = {"uncond": u, "guidance_scale": 2.0}
        x_s, log_prob = gk.steps.flow(x, v, time, 0.01, coefficient, noise=Noise(2), **options)
        z = gk.ops.randn(SHAPE, noise=Noise(2), dtype=F64)
        torch.testing.assert_close(x_s, mean + std * z)
        torch.testing.assert_close(log_prob, Normal(mean, std).log_prob(x_s).flatten(1).sum(1))
        _, scored = gk.steps.flow(x, v, time, 0.01, coefficient, x_s=x_s, **options)
        assert torch.equal(scored, log_prob)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("g", [0.3, 1.5])
def test_flow_step_keeps_the_marginals(t, g):
    """On data N(0, s^2) x_t ~ N(0, q), q = t^2 s^2 + (1 - t)^2, and a step of dt has q(t + dt) up to dt^2."""
    s, errors = 0.7, []

    def q(t):
        return t**2 * s**2 + (1.0 - t) ** 2

    for dt in (1e-2, 5e-3):
        x = torch.ones(1, 1, dtype=F64)
        v = (t * s**2 - (1.0 - t)) / q(t) * x
        zero = torch.zeros(1, 1, dtype=F64)
        mean = float(gk.steps.flow(x, v, t, dt, g, noise=zero)[0])
        std = float(gk.steps.flow(x, v, t, dt, g, noise=torch.ones(1, 1, dtype=F64))[0]) - mean
        errors.append(abs(mean**2 * q(t) + std**2 - q(t + dt)))
    assert errors[1] < 0.3 * errors[0] < 0.3 * 0.1


def test_step_of_diffusion_takes_times():
    x, m, _ = tensors(torch.float32)
    x_s, log_prob = DIFFUSION.step(x, m, T, S, noise=Noise(4))
    wanted = gk.steps.ddim(x, m, *scales(T), *scales(S), noise=Noise(4))
    assert torch.equal(x_s, wanted[0]) and torch.equal(log_prob, wanted[1])
    t, s = torch.full((5,), T), torch.full((5,), S)
    torch.testing.assert_close(DIFFUSION.step(x, m, t, s, x_s=x_s)[1], log_prob, rtol=1e-4, atol=1e-3)
    continuous = gk.Diffusion("continuous_vp", prediction="v")
    assert continuous.step(x, m, 0.6, 0.4, x_s=x, eta=0.5)[1].isfinite().all()


def test_step_of_a_network_that_predicts_the_score_is_that_of_its_epsilon():
    x, m, u = tensors(F64)
    of_score, options = gk.Diffusion(prediction="score"), {"noise": Noise(4), "guidance_scale": 2.0}
    for t, s in ((T, S), (torch.full((5,), T), torch.full((5,), S))):
        sigma = scales(T)[1]
        found = of_score.step(x, -m / sigma, t, s, uncond=-u / sigma, **options)
        wanted = DIFFUSION.step(x, m, t, s, uncond=u, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # of float32 sigma where t is a tensor
        scored = of_score.step(x, -m / sigma, t, s, uncond=-u / sigma, x_s=found[0], guidance_scale=2.0)[1]
        assert torch.equal(scored, found[1])


def test_thresholded_samples_are_scored_again_with_a_ratio_of_one():
    x, m, u = tensors(torch.float32)
    options = {"clip": gk.DynamicThreshold(0.7), "uncond": u, "guidance_scale": 3.0}
    x_s, sampled = DIFFUSION.step(x, m, T, S, noise=Noise(1), **options)
    _, scored = DIFFUSION.step(x, m.clone().requires_grad_(), T, S, x_s=x_s, **options)
    assert torch.equal(scored, sampled)


def test_a_sampled_loop_is_scored_again_with_a_ratio_of_one():
    model = torch.nn.Linear(4, 4)
    x, states, total = torch.randn(SHAPE), [], []
    times = [999, 700, 400, 100]
    with torch.no_grad():
        for k, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            x_s, log_prob = DIFFUSION.step(x, model(x), t, s, noise=Noise(k))
            states.append((x, x_s, t, s))
            total.append(log_prob)
            x = x_s
    scored = [DIFFUSION.step(x, model(x), t, s, x_s=x_s)[1] for x, x_s, t, s in states]
    ratio = (torch.stack(scored) - torch.stack(total)).exp()
    assert torch.equal(ratio, torch.ones_like(ratio))
    (grad,) = torch.autograd.grad(ratio.sum(), model.weight)
    assert grad.isfinite().all() and grad.abs().max() > 0.0


X, M, _ = tensors(torch.float32)
ENDS = (*scales(T), *scales(S))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: gk.steps.ddim(X, M, *ENDS, eta=0.0), ValueError, "eta: expected > 0 .* no density"),
        (lambda: gk.steps.ddim(X, M, *ENDS[:2], 1.0, 0.0), ValueError, "eta: expected > 0 .* leaves noise"),
        (lambda: gk.steps.ddim(X, M, *ENDS, eta=torch.tensor([0.0, 1, 1, 1, 1])), ValueError, "eta: .* in a sample"),
        (lambda: gk.steps.ddim(X, M, *ENDS, x_s=X.double()), TypeError, "x_s: expected torch.float32 like the state"),
        (lambda: gk.steps.ddim(X, M, *ENDS, x_s=X[:2]), ValueError, r"x_s: expected shape \(5, 3, 4\) like x_t"),
        (lambda: gk.steps.ddim(X, M, *ENDS, x_s=X, noise=Noise(0)), ValueError, "noise: expected None beside x_s"),
        (lambda: gk.steps.ddim(X, None, *ENDS), TypeError, "model_output: expected a torch tensor, got NoneType"),
        (lambda: gk.steps.ddim(X, M, *ENDS, reduction="max"), ValueError, "reduction: expected one of 'sum', 'mean'"),
        (lambda: gk.steps.ddim(X, M, *ENDS, prediction="flow"), ValueError, "prediction: expected one of"),
        (lambda: gk.steps.flow(X, M, 1.0, 0.1, 1.0), ValueError, "t: expected < 1"),
        (lambda: gk.steps.flow(X, M, 0.5, 0.0, 1.0), ValueError, "g, dt: expected > 0"),
        (lambda: gk.steps.flow(X, M, 0.5, 0.1, -1.0), ValueError, "g: expected a finite number >= 0, got -1.0"),
        (lambda: DIFFUSION.step(X, M, S, T), ValueError, "eta: expected 0 where alpha_t > alpha_s"),
    ],
)
def test_bad_step_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_normaliser_of_one_element():
    x = torch.zeros(1, 1, dtype=F64)
    _, log_prob = gk.steps.flow(x, x, 0.0, 1.0, 2.0, x_s=x)
    assert float(log_prob) == pytest.approx(-math.log(2.0 * math.sqrt(2.0 * math.pi)))


def test_scoring_is_compiled_without_a_break():
    x_s, sampled = gk.steps.ddim(X, M, *ENDS, noise=Noise(0))

    def score(output, x_s):
        return gk.steps.ddim(X, output, *ENDS, x_s=x_s)[1]

    one, two = M.clone().requires_grad_(), M.clone().requires_grad_()
    eager, compiled = score(one, x_s), torch.compile(score, backend="aot_eager", fullgraph=True)(two, x_s)
    assert torch.equal(eager, sampled) and torch.equal(compiled, sampled)
    (wanted,), (got,) = (torch.autograd.grad(v.sum(), w) for v, w in ((eager, one), (compiled, two)))
    assert torch.equal(got, wanted)
