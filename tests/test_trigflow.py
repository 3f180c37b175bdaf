"""sCM on TrigFlow: its losses against the paper's algorithm, and the exact functions on Gaussian data."""

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
SD, STD = 0.5, 0.8


class Net(nn.Module):
    """tanh(W y) (1 + 0.2 t), of which the derivative is written out."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 2, dtype=F64)

    def forward(self, y, t):
        return torch.tanh(self.mix(y)) * (1 + 0.2 * t[:, None])

    def along(self, y, t, dy):
        a = torch.tanh(self.mix(y))
        return (1 - a * a) * (dy @ self.mix.weight.T) * (1 + 0.2 * t[:, None]) + 0.2 * a


def spread(t):
    """The standard deviation of x_t, data N(0, STD^2)."""
    return (torch.cos(t) ** 2 * STD**2 + torch.sin(t) ** 2 * SD**2).sqrt()


class Teacher(nn.Module):
    """sd F = dx/dt = x k' / k, k = spread."""

    def forward(self, y, t):
        t = t.to(y.dtype)[:, None]
        return y * torch.cos(t) * torch.sin(t) * (SD**2 - STD**2) / spread(t) ** 2


class Exact(nn.Module):
    """F of p f + (1 - p) cos(t) x, f = x STD / k(t): the consistency function at p = 1."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, y, t):
        t = t.to(y.dtype)[:, None]
        return self.p * y * (torch.cos(t) - STD / spread(t)) / torch.sin(t)


def gradient(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


T = torch.tensor([0.05, 0.3, 0.8, 1.1, 1.4, 1.55], dtype=F64)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("warmup, tangent_c", [(1.0, 0.1), (0.3, 0.1), (0.0, 0.1), (1.0, None)])
def test_loss_and_gradient_are_those_of_the_papers_algorithm(distilled, warmup, tangent_c):
    noise, net, teacher, x = Noise(4), Net(), Net(), torch.randn(SHAPE, dtype=F64)
    z = SD * gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64)
    cos, sin = torch.cos(T)[:, None], torch.sin(T)[:, None]
    x_t = cos * x + sin * z
    with torch.no_grad():
        dx = SD * teacher(x_t / SD, T) if distilled else cos * z - sin * x
        still, turn = net(x_t / SD, T), net.along(x_t / SD, T, dx / SD)
        g = -(cos**2) * (SD * still - dx) - warmup * cos * sin * (x_t + SD * turn)
        if tangent_c is not None:
            g = g / (g.square().sum(1, keepdim=True).sqrt() + tangent_c)
    u = nn.Parameter(torch.tensor(0.3, dtype=F64))
    squares = (net(x_t / SD, T) - still - g).square().sum(1) / 2
    for log_weight, expected in ((None, squares), (lambda t: u * t, (u * T).exp() * squares - u * T)):
        options = {"warmup": warmup, "tangent_c": tangent_c, "log_weight": log_weight, "noise": noise, "t": T}
        got = gk.TrigFlow().loss(net, x, teacher=teacher if distilled else None, **options)
        torch.testing.assert_close(got, expected.mean())
        leaves = [*net.parameters(), *([] if log_weight is None else [u])]
        found, wanted = (torch.autograd.grad(a, leaves, retain_graph=True) for a in (got, expected.mean()))
        torch.testing.assert_close(found, wanted)


class Simple(nn.Module):
    """F = p sin(y) (1 + t), and r beside it."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.7, dtype=F64))

    def forward(self, y, t, r=None):
        return self.p * y.sin() * (1 + (t if r is None else t + r)[:, None])


FORWARD_MODE = pytest.mark.parametrize("loss", [gk.TrigFlow().loss, gk.MeanFlow().loss], ids=["sCM", "MeanFlow"])


@FORWARD_MODE
def test_a_compiled_network_that_was_called_without_gradients_keeps_its_derivative(loss):
    torch._dynamo.reset()
    net, x, t = Simple(), torch.randn(SHAPE, dtype=F64), torch.rand(len(SHAPE) * 3, dtype=F64)
    expected = loss(net, x, noise=Noise(3))
    compiled = torch.compile(net, backend="aot_eager")
    with torch.no_grad():
        compiled(x, t)
        compiled(x, t, r=t)
    found = loss(compiled, x, noise=Noise(3))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, net), gradient(expected, net))
    torch._dynamo.reset()


@FORWARD_MODE
def test_a_loss_in_inference_mode_is_that_without_gradients(loss):
    net, x = Simple(), torch.randn(SHAPE, dtype=F64)
    with torch.no_grad():
        expected = loss(net, x, noise=Noise(3))
    with torch.inference_mode():
        torch.testing.assert_close(loss(net, x, noise=Noise(3)), expected)


@FORWARD_MODE
def test_derivative_along_the_trajectory_is_the_same_under_transforms_and_compiled(loss):
    torch._dynamo.reset()
    net, x = Simple(), torch.randn(SHAPE, dtype=F64)
    expected = loss(net, x, noise=Noise(3))

    def of(p):
        return loss(lambda y, t, **r: torch.func.functional_call(net, {"p": p}, (y, t), r), x, noise=Noise(3))

    torch.testing.assert_close(torch.func.grad(of)(net.p.detach()), gradient(expected, net)[0])
    compiled = torch.compile(lambda x: loss(net, x, noise=Noise(3)), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradient(compiled, net), gradient(loss(net, x, noise=Noise(3)), net))
    torch._dynamo.reset()


@FORWARD_MODE
def test_network_that_looks_at_nothing_has_no_derivative(loss):
    x, out = torch.randn(SHAPE, dtype=F64), torch.randn(SHAPE, dtype=F64).requires_grad_()

    def still(y, t, r=None):
        return out + 0 * y + 0 * t[:, None]

    constant, derived = (loss(model, x, noise=Noise(3)) for model in (lambda y, t, r=None: out, still))
    torch.testing.assert_close(constant, derived)


def test_exact_function_has_no_loss_under_the_exact_teacher():
    """Its derivative along the teacher's trajectories is 0."""
    x = STD * torch.randn(SHAPE, dtype=F64)
    loss = gk.TrigFlow().loss(Exact(), x, teacher=Teacher(), t=T, tangent_c=None, reduction="none")
    assert float(loss.detach().max()) < 1e-24


@pytest.mark.parametrize("t", [0.2, 0.9, 1.5])
@pytest.mark.parametrize("tangent_c", [None, 0.1])
def test_exact_function_has_no_gradient_in_consistency_training(t, tangent_c):
    """Given x_t, the tangent is an odd function of the other direction of (x, z), a symmetric one. Both directions have
    a Gauss-Hermite rule."""
    nodes, weights = (torch.tensor(a, dtype=F64) for a in np.polynomial.hermite_e.hermegauss(8))
    a, b = nodes.repeat_interleave(8)[:, None], nodes.repeat(8)[:, None]
    k = spread(torch.tensor(t, dtype=F64))
    p, q = math.cos(t) * STD / k, math.sin(t) * SD / k
    x, z = STD * (p * a - q * b), q * a + p * b
    weight, exact = torch.outer(weights, weights).flatten() / (2 * math.pi), Exact()
    options = {"tangent_c": tangent_c, "weight": weight, "reduction": "sum"}
    loss = gk.TrigFlow().loss(exact, x, t=t, noise=z, **options)
    assert abs(gradient(loss, exact)[0].item()) < 1e-12
    assert loss.item() > 1e-4  # the tangent's own variance


def test_distillation_finds_the_exact_function():
    net, x, options = Exact(), STD * torch.randn(64, 1, dtype=F64), {"teacher": Teacher(), "tangent_c": None}
    nn.init.constant_(net.p, 0.5)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for step in range(200):
        optimizer.zero_grad()
        gk.TrigFlow().loss(net, x, noise=Noise(0, step), **options).backward()
        optimizer.step()
    assert net.p.item() == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_boundary_condition_is_exact(dtype):
    x, net = torch.randn(SHAPE, dtype=dtype), nn.Linear(2, 2, dtype=dtype)
    for t in (0.0, torch.zeros(6, dtype=F64 if dtype == F64 else torch.float32)):
        assert torch.equal(gk.TrigFlow().denoise(lambda y, t: net(y), x, t), x)


def test_denoise_is_the_written_out_function():
    net, x = Net(), torch.randn(SHAPE, dtype=F64)
    expected = torch.cos(T)[:, None] * x - torch.sin(T)[:, None] * SD * net(x / SD, T)
    torch.testing.assert_close(gk.TrigFlow().denoise(net, x, T), expected)


def test_teacher_loss_is_the_squared_error_of_the_velocity():
    noise, net, x = Noise(4), Net(), torch.randn(SHAPE, dtype=F64)
    n = gk.ops.randn((6,), noise=noise.at(Purpose.TIMES), dtype=F64)
    t = torch.atan((1.4 * n - 1.0).exp() / SD)
    z = SD * gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64)
    cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
    expected = (SD * net((cos * x + sin * z) / SD, t) - (cos * z - sin * x)).square().mean() / SD**2
    got = gk.TrigFlow().teacher_loss(net, x, noise=noise)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, net), gradient(expected, net))


def test_one_step_of_the_exact_function_follows_the_teachers_flow():
    flow, start = gk.TrigFlow(), SD * torch.randn(SHAPE, dtype=F64)
    x = flow.sample(Exact(), noise=start, dtype=F64)
    torch.testing.assert_close(x.detach(), start * STD / spread(torch.tensor(flow.stop, dtype=F64)), rtol=1e-6, atol=0)
    errors = [float((flow.sample_ode(Teacher(), noise=start, steps=k, dtype=F64) - x).abs().max()) for k in (32, 64)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2.0, abs=0.1)  # Heun's order


def test_multistep_sampling_is_the_written_out_loop():
    flow, net = gk.TrigFlow(), Net()
    start, z = SD * torch.randn(SHAPE, dtype=F64), torch.randn(2, *SHAPE, dtype=F64)
    got = flow.sample(net, noise=start, times=[1.5, 1.1, 0.4], step_noise=torch.cat([z, z[:1]]), dtype=F64)

    def f(x, t):
        told = torch.full((6,), t, dtype=torch.float32).double()
        return math.cos(t) * x - math.sin(t) * SD * net(x / SD, told)

    x = f(start, 1.5)
    for k, t in enumerate((1.1, 0.4)):
        x = f(math.cos(t) * x + math.sin(t) * SD * z[k], t)
    torch.testing.assert_close(got, x.detach())
    two, twice = (flow.sample(net, (6, 2), seed=3, **o) for o in ({"steps": 2}, {"times": [flow.stop, 1.1]}))
    assert torch.equal(two, twice)


@pytest.mark.parametrize("call, error, words", [
    (lambda: gk.TrigFlow(0.0), ValueError, "sigma_data: expected a number > 0, got 0.0"),
    (lambda: gk.TrigFlow(sigma_max=0.0), ValueError, "sigma_max: expected a number > 0, got 0.0"),
    (lambda: loss(warmup=1.5), ValueError, "warmup: expected a number from 0 to 1, got 1.5"),
    (lambda: loss(tangent_c=0.0), ValueError, "tangent_c: expected a number > 0, got 0.0"),
    (lambda: loss(t=2.0), ValueError, "t: expected a number from 0 to 1.5708, got 2.0"),
    (lambda: loss(kind="l1"), ValueError, "kind: expected None, as this loss is of squares"),
    (lambda: loss(mask=torch.ones(SHAPE)), ValueError, "mask: expected None, as this loss is of squares"),
    (lambda: loss(teacher=lambda y, t: y[:1]), ValueError, r"teacher: expected output of shape \(6, 2\) like its"),
    (lambda: loss(log_weight=lambda t: t[:2]), ValueError, r"log_weight: expected shape \(6,\), one a sample, got"),
    (lambda: loss(log_weight=lambda t: 0.0), TypeError, r"log_weight: expected a tensor \[6\], got float"),
    (lambda: gk.TrigFlow().sample(Net(), SHAPE, steps=3), ValueError, "steps: expected an integer from 1 to 2, got 3"),
    (lambda: gk.TrigFlow().sample(Net(), SHAPE, times=[0.5, 1.0]), ValueError, "times: expected"),
])  # fmt: skip
def test_bad_argument_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def loss(**options):
    return gk.TrigFlow().loss(Net(), torch.zeros(SHAPE, dtype=F64), **options)
