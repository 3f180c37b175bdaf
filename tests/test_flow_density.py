"""Log-likelihoods of flows, (13.14)-(13.16): closed forms, torchdiffeq, divergences, dequantisation."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import gaussian, mixture
from torch import nn

import genkern as gk
from genkern import flows
from genkern.flows.divergence import draw
from genkern.noise import Noise

F64 = torch.float64
FLOW = gk.RectifiedFlow()


class Velocity:
    """The marginal velocity of a mixture on x_t = t x1 + (1 - t) x0, by a posterior mean that autograd can follow."""

    def __init__(self, data, shape=None):
        self.data, self.shape = data, shape

    def __call__(self, x, t):
        flat, time = x.flatten(1), float(t[0])
        if time == 0.0:
            v = (self.data.weights[:, None] * self.data.means).sum(0).to(x.dtype) - flat
            return v.reshape(x.shape)
        y = self.data.data(flat.to(F64), time, 1.0 - time)
        score = self.data.score(flat.to(F64), time, 1.0 - time)
        return (y + (1.0 - time) * score).reshape(x.shape).to(x.dtype)


def log_mixture(data, x):
    square = (x[:, None] - data.means).square().sum(-1)
    logs = (
        data.weights.log() - square / (2 * data.stds**2) - x.shape[1] * (data.stds.log() + 0.5 * math.log(2 * math.pi))
    )
    return logs.logsumexp(1)


class Linear(nn.Module):
    """v(x, t) = (1 + t) A x + b, whose flow is Gaussian with covariance M M^T, M = exp(1.5 A)."""

    def __init__(self, size, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(0.3 * torch.randn(size, size, dtype=F64, generator=g))

    def forward(self, x, t):
        flat = x.flatten(1) @ self.a.T
        return ((1 + t.to(x.dtype))[:, None] * flat).reshape(x.shape)

    def log_prob(self, x):
        m = torch.linalg.matrix_exp(1.5 * self.a)
        size = len(self.a)
        return torch.distributions.MultivariateNormal(torch.zeros(size, dtype=F64), m @ m.T).log_prob(x.flatten(1))


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 1, 2), (3,)])
def test_log_likelihood_of_gaussian_data_is_the_gaussians(shape):
    dim = math.prod(shape[1:])
    data, x = gaussian(1.5, 0.4, dim), 1.5 + 0.6 * torch.randn(shape, dtype=F64)

    def network(seen, t):
        return Velocity(data)(seen.reshape(len(seen), -1), t).reshape(seen.shape)

    got = FLOW.log_prob(network, x, steps=60, dtype=F64)
    torch.testing.assert_close(got, log_mixture(data, x.reshape(shape[0], -1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape, sampler, steps", [
    ((5, 6), "rk4", 20), ((5, 2, 3), "rk4", 20), ((5, 1, 2, 3), "rk4", 20), ((5, 6), "heun", 1200),
    ((5, 6), "midpoint", 1200),
])  # fmt: skip
def test_log_likelihood_of_a_linear_field_is_that_of_its_gaussian(shape, sampler, steps):
    model, x = Linear(6), torch.randn(shape, dtype=F64)
    got = FLOW.log_prob(model, x, steps=steps, sampler=sampler, dtype=F64, chunk=4)
    torch.testing.assert_close(got, model.log_prob(x).detach(), rtol=0, atol=1e-5)


def test_log_likelihood_of_a_mixture_is_its_density():
    data = mixture()
    x = data.sample(64, seed=3)
    got = FLOW.log_prob(Velocity(data), x, steps=100, dtype=F64)
    torch.testing.assert_close(got, log_mixture(data, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler, order", [("euler", 1), ("ab2", 2), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_log_likelihood_converges_with_the_order_of_the_solver(sampler, order):
    data = mixture()
    x = data.sample(16, seed=3)
    a, b, c = (FLOW.log_prob(Velocity(data), x, steps=n, sampler=sampler, dtype=F64) for n in (40, 80, 160))
    assert math.log2((a - b).norm() / (b - c).norm()) == pytest.approx(order, abs=0.25)


def test_state_and_integral_are_those_of_the_augmented_system():
    """The same rule on (x, log p) as one state, by torchdiffeq."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    x = torch.randn(3, 2, dtype=F64)

    def field(x, t):
        return torch.sin(x * (1 + t.to(x.dtype)[:, None])) + x.flip(1)

    def augmented(t, both):
        with torch.enable_grad():
            seen = both[:, :2].detach().requires_grad_()
            v = field(seen, t.expand(3))
            jacobian = torch.stack(
                [torch.autograd.grad(v[:, i].sum(), seen, retain_graph=True)[0] for i in range(2)], 1
            )
        return torch.cat([v.detach(), -jacobian.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)], 1)

    log_p0 = -0.5 * x.square().sum(1, keepdim=True) - math.log(2 * math.pi)
    times = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=F64)
    expected = odeint(augmented, torch.cat([x, log_p0], 1), times, method="midpoint")[-1]
    got, log_prob = FLOW.sample_with_log_prob(field, x0=x, times=times.tolist(), sampler="midpoint", dtype=F64)
    torch.testing.assert_close(got, expected[:, :2], rtol=0, atol=1e-13)
    torch.testing.assert_close(log_prob, expected[:, 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["euler", "ab2", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("guided", [False, True])
def test_samples_with_their_density_are_the_samples(sampler, guided, kernels):
    model = nn.Linear(4, 4)
    options = {"seed": 5, "steps": 4, "sampler": sampler}
    if guided:
        options |= {"cond": {"y": torch.ones(6)}, "uncond": {"y": torch.zeros(6)}}
        options["guidance_scale"] = torch.linspace(0.5, 3.0, 6)

    def network(x, t, y=None):
        found = model(x).sin() * (1 + t.reshape(-1, 1, 1))
        return found if y is None else found * (1 + y.reshape(-1, 1, 1))

    expected = FLOW.sample(network, (6, 2, 4), **options)
    x, log_prob = FLOW.sample_with_log_prob(network, (6, 2, 4), **options)
    assert torch.equal(x, expected)
    assert log_prob.dtype == torch.float32
    parts = FLOW.sample_with_log_prob(network, (6, 2, 4), batch_size=4, **options)
    torch.testing.assert_close((x, log_prob), parts)


def test_density_of_samples_is_the_density_found_for_them_as_data():
    data = mixture()
    x, while_sampling = FLOW.sample_with_log_prob(Velocity(data), (32, 2), steps=100, seed=1, dtype=F64)
    torch.testing.assert_close(while_sampling, log_mixture(data, x), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        FLOW.log_prob(Velocity(data), x, steps=100, dtype=F64), while_sampling, rtol=0, atol=1e-5
    )


def test_guided_field_has_the_density_of_the_combined_field():
    x, y, scale = torch.randn(5, 3, dtype=F64), torch.rand(5, dtype=F64), 2.5

    def network(x, t, y):
        return torch.sin(2 * x) * y[:, None]

    got = FLOW.log_prob(network, x, steps=10, cond={"y": y}, uncond={"y": y + 1}, guidance_scale=scale, dtype=F64)

    def combined(x, t):
        return torch.sin(2 * x) * (y + 1 - scale)[:, None]

    torch.testing.assert_close(got, FLOW.log_prob(combined, x, steps=10, dtype=F64))


def test_gradient_of_the_likelihood_is_that_of_the_closed_form():
    model, x = Linear(3), torch.randn(4, 3, dtype=F64)
    got = FLOW.log_prob(model, x, steps=20, dtype=F64, differentiable=True).sum()
    (found,) = torch.autograd.grad(got, model.a)
    (expected,) = torch.autograd.grad(model.log_prob(x).sum(), model.a)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ab2", "heun", "rk4"])
def test_gradient_of_the_likelihood_by_the_data_is_the_score(sampler):
    model, x = Linear(3), torch.randn(4, 3, dtype=F64, requires_grad=True)
    options = {"steps": 20 if sampler == "rk4" else 400, "sampler": sampler, "dtype": F64}
    (score,) = torch.autograd.grad(FLOW.log_prob(model, x, differentiable=True, batch_size=3, **options).sum(), x)
    (expected,) = torch.autograd.grad(model.log_prob(x).sum(), x)
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5)


def test_given_density_of_the_source_takes_the_normals_place():
    x = torch.rand(6, 2, dtype=F64)
    got = FLOW.log_prob(lambda x, t: -0.5 * x, x, steps=20, dtype=F64, source_log_prob=lambda x: x.new_zeros(len(x)))
    torch.testing.assert_close(got, torch.full((6,), 1.0, dtype=F64))


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
def test_exact_divergence_is_the_trace_of_the_jacobian(chunk, dtype):
    x = torch.randn(3, 2, 1, 4).to(dtype)

    def field(x):
        return x.roll(1, -1).sin() * x.square()

    v, found = flows.Exact(chunk)(field, x)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: field(one[None])[0]))(x)
    expected = jacobian.reshape(3, 8, 8).diagonal(dim1=1, dim2=2).sum(1)
    assert torch.equal(v, field(x))
    assert found.dtype == (F64 if dtype == F64 else torch.float32)
    tolerance = {"rtol": 0.02, "atol": 0.1} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(found, expected.to(found.dtype), **tolerance)


class Network(nn.Module):
    """What image networks are made of, beside an op of genkern."""

    def __init__(self):
        super().__init__()
        self.into, self.norm, self.out = (
            nn.Conv2d(2, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 2, 3, padding=1),
        )

    def forward(self, x, t):
        h = nn.functional.silu(self.norm(self.into(x)))
        tokens = h.flatten(2).mT[:, None]
        h = h + nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mT.reshape(h.shape)
        return gk.ops.euler_step(x, self.out(h), 0.5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_exact_divergence_of_an_image_network_is_the_trace_of_its_jacobian(layout):
    model = Network().double()
    x = torch.randn(2, 2, 3, 4, dtype=F64).to(memory_format=layout)
    expected = torch.autograd.functional.jacobian(lambda x: model(x, None), x).reshape(2, 24, 2, 24)
    trace = torch.stack([expected[b, :, b].trace() for b in range(2)])
    for chunk in (1, 7, 32):
        torch.testing.assert_close(flows.Exact(chunk)(lambda x: model(x, None), x)[1], trace)


def test_inference_mode_changes_nothing():
    model, x = Linear(6), torch.randn(3, 6, dtype=F64)
    data, drawn = FLOW.log_prob(model, x, steps=2, dtype=F64), FLOW.sample_with_log_prob(model, (3, 6), steps=2, seed=0)
    with torch.inference_mode():
        assert torch.equal(FLOW.log_prob(model, x.clone(), steps=2, dtype=F64), data)
        again = FLOW.sample_with_log_prob(model, (3, 6), steps=2, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(again, drawn, strict=True))
        assert torch.equal(flows.Exact()(lambda x: x.sin(), x.clone())[1], x.cos().sum(1))


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_has_the_mean_and_the_variance_of_its_theory(kind):
    n, k, size = 500, 40, 5
    g = torch.Generator().manual_seed(1)
    j = torch.randn(size, size, dtype=F64, generator=g)
    j = j + j.T
    off = 0.0 if kind == "gaussian" else float(j.diagonal().square().sum())
    variance = 2 * (float(j.square().sum()) - off)
    z = draw((n, size), k, kind, noise=Noise(3), device=torch.device("cpu"), dtype=F64)
    singles = torch.stack(
        [flows.Hutchinson(one[None])(lambda x: x @ j, torch.zeros(n, size, dtype=F64))[1] for one in z]
    )
    assert float(singles.mean() - j.trace()) == pytest.approx(0.0, abs=4 * math.sqrt(variance / (n * k)))
    assert float(singles.var()) == pytest.approx(variance, rel=0.05)
    mean = flows.Hutchinson(z)(lambda x: x @ j, torch.zeros(n, size, dtype=F64))[1]
    torch.testing.assert_close(mean, singles.mean(0))


def test_one_rademacher_probe_is_exact_for_a_diagonal_jacobian():
    x = torch.randn(6, 2, 3, dtype=F64)

    def field(x, t):
        return x.sin()

    exact = FLOW.log_prob(field, x, steps=5, dtype=F64)
    torch.testing.assert_close(FLOW.log_prob(field, x, steps=5, dtype=F64, divergence="hutchinson", seed=0), exact)


def test_probes_of_a_sample_are_the_same_in_any_batch_and_device_dtype():
    full = draw((4, 3), 2, "rademacher", noise=Noise(1), device=torch.device("cpu"), dtype=F64)
    part = draw(
        (2, 3), 2, "rademacher", noise=Noise(1, sample_ids=[2, 3]), device=torch.device("cpu"), dtype=torch.float32
    )
    assert torch.equal(full[:, 2:].float(), part)
    assert set(full.unique().tolist()) == {-1.0, 1.0}
    model, x = Linear(6), torch.randn(6, 6, dtype=F64)
    options = {"steps": 3, "dtype": F64, "divergence": "hutchinson", "probes": 3, "probe": "gaussian", "seed": 2}
    torch.testing.assert_close(FLOW.log_prob(model, x, **options), FLOW.log_prob(model, x, batch_size=4, **options))


def test_a_field_without_a_gradient_has_no_divergence():
    x = torch.randn(3, 2)
    assert torch.equal(flows.Exact()(lambda x: torch.ones(3, 2), x)[1], torch.zeros(3))


def test_bits_per_dimension_of_a_uniform_density_are_those_of_the_levels():
    k = torch.randint(0, 16, (5, 2, 3))
    x = flows.dequantize(k, 16, -2.0, 3.0, noise=Noise(0), dtype=F64)
    assert torch.equal(((x + 2.0) / 5.0 * 16).floor().long(), k)
    log_prob = torch.full((5,), -6 * math.log(5.0), dtype=F64)
    torch.testing.assert_close(flows.bits_per_dim(log_prob, 6, 16, -2.0, 3.0), torch.full((5,), 4.0, dtype=F64))


def test_dequantised_bits_are_no_less_than_the_discrete_code_length():
    """Of p(x) = N(0, 1) on cells of width 1, whose integrals are the discrete probabilities."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0)
    k = torch.arange(8).repeat(16000)[:, None]
    x = flows.dequantize(k, 8, -4.0, 4.0, noise=Noise(1), dtype=F64)
    bits = flows.bits_per_dim(normal.log_prob(x)[:, 0], 1, 8, -4.0, 4.0).reshape(16000, 8).mean(0)
    edges = torch.arange(-4, 5, dtype=F64)
    exact = -(normal.cdf(edges[1:]) - normal.cdf(edges[:-1])).log2()
    assert (bits - exact > 0.0).all()
    # The gap is the divergence from the uniform to the density in its cell: E_u log2 of their ratio.
    mid = (edges[:-1, None] + (torch.arange(1000, dtype=F64) + 0.5) / 1000).flatten()
    gap = (-normal.log_prob(mid) / math.log(2.0)).reshape(8, 1000).mean(1) - exact
    torch.testing.assert_close(bits - exact, gap, rtol=0, atol=0.04)


@pytest.mark.parametrize("shape", [(3, 3, 2), (2, 5, 2), (3, 2), (3,), (0, 4, 2), (2, 4, 3)])
def test_probes_of_another_batch_are_refused(shape):
    with pytest.raises(ValueError, match=r"probes: expected shape \(K, 4, 2\) of x's \(4, 2\), got"):
        flows.Hutchinson(torch.ones(shape))(lambda x: x.sin(), torch.zeros(4, 2))


def test_images_scaled_to_one_and_half_precision_are_refused():
    with pytest.raises(ValueError, match="k: expected integers from 0 to 255, got numbers between them"):
        flows.dequantize(torch.rand(2, 3))
    with pytest.raises(ValueError, match="dtype: expected torch.float32 or torch.float64, got torch.float16"):
        flows.dequantize(torch.zeros(2, 3, dtype=torch.int64), dtype=torch.float16)
    assert flows.dequantize(torch.tensor([[3.0, 0.0]]), 4, noise=Noise(0)).shape == (1, 2)


def test_levels_that_are_none_are_refused():
    with pytest.raises(ValueError, match="k: expected a number from 0 to 15, got 0 to 16"):
        flows.dequantize(torch.arange(17), 16)
    with pytest.raises(ValueError, match="low, high: expected low < high"):
        flows.bits_per_dim(torch.zeros(2), 3, low=1.0, high=1.0)


@pytest.mark.parametrize("options, error, words", [
    ({"divergence": "trace"}, ValueError, "divergence: expected one of 'exact', 'hutchinson', got 'trace'"),
    ({"probes": 2}, ValueError, "probes, probe: expected none with divergence='exact'"),
    ({"divergence": "hutchinson", "probes": 0}, ValueError, "probes: expected an integer >= 1, got 0"),
    ({"divergence": "hutchinson", "probe": "sobol"}, ValueError, "probe: expected one of 'rademacher', 'gaussian'"),
    ({"divergence": "hutchinson", "chunk": 2}, ValueError, "chunk: expected none"),
    ({"dtype": torch.float16}, ValueError, "dtype: expected torch.float32 or torch.float64"),
    ({"source_log_prob": 1.0}, TypeError, "source_log_prob: expected a callable, got float"),
    ({"source_log_prob": lambda x: x}, ValueError, r"source_log_prob: expected a tensor of shape \(3,\), got \(3, 2\)"),
    ({"guidance_scale": 2.0}, ValueError, "guidance_scale, uncond: expected both or neither"),
    ({"noise": torch.zeros(3, 2)}, TypeError, "noise: expected a Noise, got Tensor"),
    ({"times": [0.0, 1.0]}, ValueError, "times: expected decreasing times with direction='backward'"),
    ({"sampler": gk.samplers.DDIM(), "times": [0.9, 0.5]}, ValueError, "sampler: expected a solver of dx/dt"),
    ({"clip": 1.0}, TypeError, r"log_prob\(\) got an unexpected keyword argument 'clip'"),
])  # fmt: skip
def test_bad_argument_of_log_prob_is_named(options, error, words):
    with pytest.raises(error, match=words):
        FLOW.log_prob(lambda x, t: x, torch.zeros(3, 2), **{"steps": None if "times" in options else 2, **options})
