"""The marginal field (13.18)-(13.19), theorem 1 and theorem 2 of section 13.2, measured."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import Mixture, PathNetwork
from torch.utils._python_dispatch import TorchDispatchMode

import genkern as gk
from genkern import flows, paths
from genkern.noise import Noise, Purpose

F64 = torch.float64
POINTS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0], [1.5, 1.5], [-2.0, -1.0]], dtype=F64)
Q = torch.tensor([0.4, 0.1, 0.2, 0.25, 0.05], dtype=F64)


def points_as_mixture():
    return Mixture(POINTS, torch.zeros(5, dtype=F64), Q)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.97, 1.0])
def test_field_is_that_of_a_mixture_of_points(t, chunk):
    path = paths.CondOT(0.05)
    field = flows.MarginalField(POINTS, path, 3.0 * Q, chunk=chunk)
    x = torch.cat([torch.randn(20, 2, dtype=F64), POINTS + 0.01])
    expected = PathNetwork(points_as_mixture(), path, "velocity")(x, torch.full((25,), t, dtype=F64))
    torch.testing.assert_close(field(x, t), expected)
    torch.testing.assert_close(field.data(x, t), points_as_mixture().data(x, path.alpha(t), path.sigma(t)))


def test_field_takes_a_time_for_every_state_and_states_of_any_rank():
    data, x, t = torch.randn(9, 2, 3, dtype=F64), torch.randn(4, 2, 3, dtype=F64), torch.rand(4, dtype=F64)
    field = flows.MarginalField(data, chunk=4)
    got = field(x, t)
    for b in range(4):
        s = float(1 - t[b])
        p = (-(x[b] - t[b] * data).square().sum((1, 2)) / (2 * s * s)).softmax(0)
        torch.testing.assert_close(got[b], ((p[:, None, None] * data).sum(0) - x[b]) / s)


def test_density_of_the_marginal_path_is_the_mixtures():
    x, t = torch.randn(6, 2, dtype=F64), 0.7
    field = flows.MarginalField(POINTS, weights=Q, chunk=2)
    square = (x[:, None] - t * POINTS).square().sum(-1)
    expected = (Q.log() - square / (2 * 0.3**2) - 2 * math.log(0.3 * math.sqrt(2 * math.pi))).logsumexp(1)
    torch.testing.assert_close(field.log_density(x, t), expected)


def test_field_is_finite_and_exact_close_to_the_data_in_many_dimensions():
    """At sigma = 1e-4 in 3072 dimensions the posterior is one point: u = (x_1 - x) / (1 - t)."""
    data = torch.randn(40, 3072)
    x = data[:7] * 0.9999 + 1e-4 * torch.randn(7, 3072)
    t = torch.full((7,), 0.9999, dtype=F64)
    got = flows.MarginalField(data, chunk=16)(x, t)
    expected = (data[:7].double() - x.double()) / (1 - t)[:, None]
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_likelihood_of_the_field_is_the_marginal_density():
    path = paths.CondOT(0.2)
    field, flow = flows.MarginalField(POINTS, path, Q, chunk=2), gk.FlowMatching(path)
    x = points_as_mixture().sample(12, seed=3).to(F64) + 0.2 * torch.randn(12, 2, dtype=F64)
    got = flow.log_prob(field, x, steps=150, sampler="rk4", dtype=F64)
    torch.testing.assert_close(got, field.log_density(x, 1.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [2, 100])
def test_score_of_the_marginal_density_is_its_gradient(chunk):
    """grad log p_t = (alpha y - x) / sigma^2, y the posterior mean (13.19)."""
    path, x = paths.CondOT(0.2), torch.randn(7, 2, dtype=F64, requires_grad=True)
    field = flows.MarginalField(POINTS, path, Q, chunk=chunk)
    (got,) = torch.autograd.grad(field.log_density(x, 0.4).sum(), x)
    alpha, sigma = path.alpha(0.4), path.sigma(0.4)
    torch.testing.assert_close(got, ((alpha * field.data(x, 0.4) - x) / sigma**2).detach())


def test_points_without_weight_leave_the_field_as_it_is():
    q = torch.tensor([0.0, 0.0, 0.2, 0.25, 0.05], dtype=F64)
    x = torch.randn(8, 2, dtype=F64)
    got = flows.MarginalField(POINTS, weights=q, chunk=1)(x, 0.5)
    torch.testing.assert_close(got, flows.MarginalField(POINTS[2:], weights=q[2:])(x, 0.5))


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operation has made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and not func.is_view:
            self.bytes = max(self.bytes, found.numel() * found.element_size())
        return found


def test_memory_is_a_chunks_and_not_the_datas():
    data, x = torch.randn(5000, 64), torch.randn(4, 64)
    field = flows.MarginalField(data, chunk=128)
    with Largest() as seen:
        field(x, 0.5)
    assert seen.bytes <= 128 * 64 * 8


def test_theorem_1_the_field_moves_the_noise_to_the_data():
    """Euler's last step leads to the posterior mean, which is a data point; each is reached as often as q says."""
    n, flow = 6000, gk.RectifiedFlow()
    field = flows.MarginalField(POINTS, weights=Q)
    x = flow.sample(field, (n, 2), steps=100, seed=4, dtype=F64)
    distance = torch.cdist(x, POINTS)
    assert float(distance.min(1).values.max()) < 1e-3
    counts = torch.bincount(distance.argmin(1), minlength=5) / n
    bound = 4 * (Q * (1 - Q) / n).sqrt() + 0.003  # four standard errors, and the steps' own error
    assert ((counts - Q).abs() < bound).all()


@pytest.mark.parametrize("t", [0.3, 0.6, 0.9])
def test_theorem_1_the_field_generates_the_marginal_path(t):
    """The law of phi_t(x_0) along a line has the mixture's distribution function, by Kolmogorov and Smirnov."""
    stats = pytest.importorskip("scipy.stats")
    field = flows.MarginalField(POINTS, weights=Q)
    x = gk.RectifiedFlow().sample(field, (3000, 2), times=[k * t / 60 for k in range(61)], seed=5, sampler="heun")
    line = torch.tensor([0.6, 0.8])
    normal = torch.distributions.Normal(t * POINTS.float() @ line, 1 - t)
    u = (normal.cdf((x @ line)[:, None]) * Q).sum(1)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01


def copies(n, seed=0):
    """A network of two layers with its own parameters for each sample: its gradients are the per-sample ones."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(8, 3), (2, 8)]
    return [torch.randn(s, dtype=F64, generator=g).expand(n, *s).clone().requires_grad_() for s in shapes]


def network(weights):
    def call(x, t):
        seen = torch.cat([x, t[:, None].to(x.dtype)], 1)
        hidden = torch.tanh(torch.einsum("bhd,bd->bh", weights[0], seen))
        return torch.einsum("bdh,bh->bd", weights[1], hidden)

    return call


def test_theorem_2_both_objectives_have_one_gradient_in_expectation():
    """Over draws of (t, x_1, x_0), float64: the mean difference of the gradients of (13.20) and (13.17), parameter by
    parameter, is within 4.5 standard errors of 0 (one false alarm in 3000 for 40 parameters); the gradients are not 0,
    and a single draw's differ."""
    n, flow, noise = 60_000, gk.FlowMatching(sigma_min=0.1), Noise(8)
    index = torch.multinomial(Q, n, replacement=True, generator=torch.Generator().manual_seed(1))
    x1, weights = POINTS[index], copies(n)
    model = network(weights)

    def gradients(losses):
        return torch.cat([g.flatten(1) for g in torch.autograd.grad(losses.sum(), weights)], 1)

    conditional = gradients(flow.loss(model, x1, noise=noise, reduction="none"))
    t = gk.ops.uniform((n,), noise=noise.at(Purpose.TIMES), dtype=F64)
    x0 = gk.ops.randn((n, 2), noise=noise.at(Purpose.TRAINING), dtype=F64)
    x = t[:, None] * x1 + (1 - 0.9 * t)[:, None] * x0
    u = flows.MarginalField(POINTS, flow.path, Q)(x, t)
    marginal = gradients((model(x, t) - u).square().mean(1))

    difference, root = conditional - marginal, math.sqrt(n)
    assert (difference.mean(0).abs() < 4.5 * difference.std(0) / root).all()
    assert float((marginal.mean(0).abs() / (marginal.std(0) / root)).max()) > 20
    assert float(difference.std(0).min()) > 1e-3


@pytest.mark.parametrize("make, words", [
    (lambda: flows.MarginalField(torch.zeros(0, 2)), r"data: expected at least one point, got shape \(0, 2\)"),
    (lambda: flows.MarginalField(POINTS, weights=Q[:2]), r"weights: expected a tensor of shape \(5,\), got \(2,\)"),
    (lambda: flows.MarginalField(POINTS, weights=-Q), "weights: expected numbers >= 0 with a positive sum"),
    (lambda: flows.MarginalField(POINTS, chunk=0), "chunk: expected an integer >= 1, got 0"),
    (lambda: flows.MarginalField(POINTS)(torch.zeros(3, 4), 0.5), r"x: expected states of shape \(2,\)"),
    (lambda: flows.MarginalField(POINTS)(torch.zeros(3, 2), 1.0), "t: expected times with sigma > 0"),
])  # fmt: skip
def test_bad_argument_of_the_field_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
