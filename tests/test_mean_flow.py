"""MeanFlow: its loss against the formula, and the exact average velocity on Gaussian data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import genkern as gk
from genkern.noise import Noise, Purpose

F64 = torch.float64
SHAPE = (6, 2)


class Net(nn.Module):
    """tanh(W x) (1 + 0.2 t) + 0.3 r, of which the derivative is written out."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 2, dtype=F64)

    def forward(self, x, t, r):
        return torch.tanh(self.mix(x)) * (1 + 0.2 * t[:, None]) + 0.3 * r[:, None]

    def along(self, x, t, v):
        a = torch.tanh(self.mix(x))
        return (1 - a * a) * (v @ self.mix.weight.T) * (1 + 0.2 * t[:, None]) + 0.2 * a


class Exact(nn.Module):
    """p times the average velocity of N(0, 1) -> N(m, s^2), of the flow map x_r = r m + k_r / k_t (x - t m) with
    k^2 = (1 - t)^2 + t^2 s^2."""

    def __init__(self, m=0.4, s=0.7):
        super().__init__()
        self.m, self.s, self.p = m, s, nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x, t, r):
        t, r = (a.to(x.dtype)[:, None] for a in (t, r))
        k_t, k_r = (((1 - a) ** 2 + a**2 * self.s**2).sqrt() for a in (t, r))
        # (k_r / k_t - 1) / (r - t), without the division by 0 at r = t.
        rate = ((r + t) * (1 + self.s**2) - 2) / (k_t * (k_r + k_t))
        return self.p * (self.m + rate * (x - t * self.m))


def quadrature():
    """Data N(0.4, 0.7^2), noise and weights of a Gauss-Hermite rule, exact for polynomials of degree 11 in each."""
    nodes, weights = (torch.tensor(a, dtype=F64) for a in np.polynomial.hermite_e.hermegauss(6))
    x, z = (0.4 + 0.7 * nodes).repeat_interleave(6)[:, None], nodes.repeat(6)[:, None]
    return x, z, torch.outer(weights, weights).flatten() / (2 * math.pi)


def gradient(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_written_out_formula(p, sigma_min):
    noise, net, x = Noise(4), Net(), torch.randn(SHAPE, dtype=F64)
    t = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 1.0], dtype=F64)
    r = torch.tensor([1.0, 0.4, 0.3, 0.9, 0.8, 1.0], dtype=F64)
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64)
    x_t, v = t[:, None] * x + (1 - (1 - sigma_min) * t[:, None]) * z, x - (1 - sigma_min) * z
    goal = (v + (r - t)[:, None] * net.along(x_t, t, v)).detach()
    squares = (net(x_t, t, r) - goal).square().sum(1)
    expected = (squares / (squares.detach() + 0.01) ** p).mean()
    got = gk.MeanFlow(sigma_min).loss(net, x, t=t, r=r, noise=noise, adaptive=(p, 0.01))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, net), gradient(expected, net))


@pytest.mark.parametrize("t, r", [(0.0, 1.0), (0.2, 0.7), (0.5, 0.5), (0.9, 1.0)])
def test_exact_average_velocity_has_no_gradient_of_the_squared_error(t, r):
    """E[target | x_t] = u there; the gradient is a polynomial of degree 2 in data and noise."""
    x, z, weight = quadrature()
    exact = Exact()
    loss = gk.MeanFlow().loss(exact, x, t=t, r=r, noise=z, adaptive=(0.0, 1.0), weight=weight, reduction="sum")
    assert abs(float(gradient(loss, exact)[0])) < 1e-12


@pytest.mark.parametrize("grid", [[0.0, 1.0], [0.0, 0.3, 0.35, 1.0]])
def test_steps_of_the_exact_average_velocity_are_the_flow_map(grid):
    x0 = torch.randn(SHAPE, dtype=F64)
    x = gk.MeanFlow().sample(Exact(), x0=x0, times=grid, dtype=F64)
    torch.testing.assert_close(x, 0.4 + 0.7 * x0, rtol=1e-6, atol=1e-6)  # the network is told times in float32
    assert torch.equal(x, gk.MeanFlow().sample(Exact(), x0=x0, dtype=F64)) == (len(grid) == 2)


def test_at_equal_times_the_loss_is_flow_matchings():
    net, x, noise, t = Net(), torch.randn(SHAPE, dtype=F64), Noise(1), torch.rand(6, dtype=F64)
    mean_flow = gk.MeanFlow().loss(net, x, t=t, r=t, noise=noise, adaptive=(0.0, 1.0))
    matching = gk.FlowMatching().loss(lambda x, t: net(x, t, t), x, t=t, noise=noise)
    torch.testing.assert_close(mean_flow, 2 * matching)  # a sum over two elements, not a mean


def test_times_are_ordered_logit_normal_numbers_and_apart_in_a_share_of_the_samples():
    seen = []

    def model(x, t, r):
        seen.append((t, r))
        return x

    noise, b = Noise(5), 20_000
    gk.MeanFlow().loss(model, torch.zeros(b, 1, dtype=F64), noise=noise)
    t, r = seen[-1]
    a = [1 - torch.sigmoid(gk.ops.randn((b,), noise=noise.at(Purpose.TIMES, k), dtype=F64) - 0.4) for k in (0, 1)]
    torch.testing.assert_close(t, torch.minimum(*a))
    differ = r > t
    torch.testing.assert_close(r[differ], torch.maximum(*a)[differ])
    assert torch.equal(r[~differ], t[~differ])
    assert float(differ.double().mean()) == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / b))


def test_training_finds_the_mean_and_the_deviation_of_gaussian_data():
    """The exact family from wrong numbers, over a rule of data and noise and times r > t and r = t of a grid."""
    x, z, weight = quadrature()
    grid = torch.tensor([(a, b) for a in np.linspace(0, 1, 5) for b in np.linspace(0, 1, 5) if a <= b], dtype=F64)
    pairs, (t, r) = len(grid), grid.repeat_interleave(len(x), 0).unbind(1)
    net = Exact(0.0, 1.0)
    net.m, net.s = (nn.Parameter(torch.tensor(a, dtype=F64)) for a in (net.m, net.s))
    optimizer = torch.optim.Adam([net.m, net.s], 0.03)
    options = {"adaptive": (0.0, 1.0), "reduction": "sum", "weight": weight.repeat(pairs) / pairs}
    for _ in range(150):
        optimizer.zero_grad()
        gk.MeanFlow().loss(net, x.repeat(pairs, 1), t=t, r=r, noise=z.repeat(pairs, 1), **options).backward()
        optimizer.step()
    assert (net.m.item(), net.s.item()) == pytest.approx((0.4, 0.7), abs=1e-3)


def test_gradients_of_a_distributed_module_are_reduced_once(tmp_path):
    """The forward-mode pass goes past the wrapper, the call with a gradient through it."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        reduced = []

        def hook(state, bucket):
            reduced.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        net, x = Net(), torch.randn(SHAPE, dtype=F64)
        expected = gradient(gk.MeanFlow().loss(net, x, noise=Noise(2)), net)
        wrapped = nn.parallel.DistributedDataParallel(net)
        wrapped.register_comm_hook(None, hook)
        gk.MeanFlow().loss(wrapped, x, noise=Noise(2)).backward()
        assert sum(reduced) == sum(p.numel() for p in net.parameters())
        torch.testing.assert_close([p.grad for p in net.parameters()], list(expected))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options, words", [
    ({"t": 0.5}, "t, r: expected both or neither"),
    ({"t": 0.5, "r": 0.4}, "r - t: expected a number from 0 to 1"),
    ({"t": 0.5, "r": 1.1}, "r: expected a number from 0 to 1, got 1.1"),
    ({"apart": 1.5}, "apart: expected a number from 0 to 1, got 1.5"),
    ({"adaptive": (-1.0, 1.0)}, r"adaptive\[0\]: expected a finite number >= 0, got -1.0"),
    ({"adaptive": (1.0, 0.0)}, r"adaptive\[1\]: expected a number > 0, got 0.0"),
    ({"c": 1.0}, "c: expected None with kind='l2', got 1.0"),
    ({"kind": "l1"}, "kind: expected None, as this loss is of squares, got kind"),
])  # fmt: skip
def test_bad_argument_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.MeanFlow().loss(Net(), torch.zeros(SHAPE, dtype=F64), **options)


def test_network_that_returns_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"model: expected output of shape \(6, 2\) like its input, got \(6, 1\)"):
        gk.MeanFlow().loss(lambda x, t, r: x[:, :1], torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="steps: expected None beside times, got 2"):
        gk.MeanFlow().sample(Net(), SHAPE, steps=2, times=[0.0, 1.0])
