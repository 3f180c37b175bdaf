"""Consistency models without a teacher: CT and its schedules against their papers' formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from analytic import DenoiserNetwork, gaussian
from consistency_cases import EPS, F64, RHO, SHAPE, ExactFunction, Net, f_of, gradient
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import genkern as gk
from genkern.methods import curricula
from genkern.noise import Noise, Purpose


def pair(student, target, x, low, high, z):
    """f(x + t z, t) and f^-(x + r z, r), written out."""
    with torch.no_grad():
        goal = f_of(target, x + low[:, None] * z, low)
    return f_of(student, x + high[:, None] * z, high), goal


def drawn(noise, device="cpu"):
    return gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64, device=device)


@pytest.mark.parametrize("kind", RHO)
def test_training_loss_and_gradient_are_those_of_the_written_out_formula(kind, device):
    consistency, noise = gk.Consistency(), Noise(9)
    student, target = Net().to(device), Net().to(device)
    x = torch.randn(SHAPE, dtype=F64, device=device)
    n = torch.tensor([0, 1, 5, 9, 15, 16], device=device)
    times = torch.tensor(consistency.times(18), dtype=F64, device=device)
    weight = torch.linspace(0.5, 1.5, 6, dtype=F64, device=device)
    f, goal = pair(student, target, x, times[n], times[n + 1], drawn(noise, device))
    expected = (weight * RHO[kind](f - goal)).mean()
    got = consistency.training_loss(student, x, target=target, n=n, noise=noise, kind=kind, weight=weight)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, student), gradient(expected, student))


def quadrature(std):
    """x ~ N(0, std^2), z ~ N(0, 1) and weights of a Gauss-Hermite rule, exact for polynomials of degree 11 in each."""
    nodes, weights = (torch.tensor(a, dtype=F64) for a in np.polynomial.hermite_e.hermegauss(6))
    x, z = (std * nodes).repeat_interleave(6)[:, None], nodes.repeat(6)[:, None]
    return x, z, torch.outer(weights, weights).flatten() / (2 * math.pi)


class Linear(nn.Module):
    """F = a x + b + c t, so that f is linear in the state."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([0.7, -0.2, 0.1], dtype=F64))

    def forward(self, x, t):
        a, b, c = self.p
        return a * x + b + c * t.to(x.dtype)[:, None]


@pytest.mark.parametrize("n", [0, 4, 8])
def test_training_has_the_gradient_of_distillation_from_the_perfect_teacher(n):
    """E[x + t_n z | x_{t_{n+1}}] is the teacher's Euler step, exactly, so with a linear f^- both have one gradient.

    Both are polynomials of degree 2 in data and noise."""
    consistency, student, std = gk.Consistency(), Linear(), 0.8
    x, z, weight = quadrature(std)
    options = {"n_steps": 10, "n": n, "noise": z, "weight": weight, "reduction": "sum"}
    trained = gradient(consistency.training_loss(student, x, **options), student)
    teacher = DenoiserNetwork(gaussian(0.0, std, dim=1))
    distilled = gradient(consistency.loss(student, x, teacher=teacher, solver="euler", **options), student)
    torch.testing.assert_close(trained, distilled, rtol=1e-9, atol=1e-12)


def test_at_the_lowest_pair_the_target_is_the_noised_data_itself():
    consistency, student, noise = gk.Consistency(), Net(), Noise(3)
    x, low, high = torch.randn(SHAPE, dtype=F64), torch.full((6,), EPS, dtype=F64), consistency.times(18)[1]
    z = drawn(noise)
    f, _ = pair(student, student, x, low, torch.full((6,), high, dtype=F64), z)
    expected = (f - (x + EPS * z)).square().mean()
    torch.testing.assert_close(consistency.training_loss(student, x, n=0, noise=noise), expected)


def test_only_the_student_gets_a_gradient_and_it_stands_for_a_missing_target():
    consistency, student, target, x = gk.Consistency(), Net(), Net(), torch.randn(SHAPE, dtype=F64)
    consistency.training_loss(student, x, target=target).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in target.parameters())
    target.load_state_dict(student.state_dict())
    own = consistency.training_loss(student, x, noise=Noise(1))
    copied = consistency.training_loss(student, x, target=target, noise=Noise(1))
    torch.testing.assert_close(gradient(own, student), gradient(copied, student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_network_trains_with_finite_numbers(dtype):
    student = nn.Sequential(nn.Linear(2, 2)).to(dtype)
    loss = gk.Consistency().training_loss(lambda x, t: student(x), torch.randn(SHAPE), model_dtype=dtype)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_weight_is_told_the_lower_time():
    consistency, seen = gk.Consistency(), []

    def weight(t):
        seen.append(t)
        return 1 / t

    consistency.training_loss(Net(), torch.randn(SHAPE, dtype=F64), n=torch.arange(6), n_steps=10, weight=weight)
    torch.testing.assert_close(seen[0], torch.tensor(consistency.times(10)[:6]))


@pytest.mark.parametrize("options, words", [
    ({"n_steps": 1}, "n_steps: expected an integer >= 2, got 1"),
    ({"n": 17}, "n: expected an integer from 0 to 16, got 17"),
    ({"kind": "lpips"}, "kind: expected one of"),
])  # fmt: skip
def test_bad_argument_of_the_training_loss_is_named_before_a_network_is_called(options, words):
    def model(x, t):
        raise AssertionError("called")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        gk.Consistency().training_loss(model, torch.zeros(SHAPE), **options)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("role", ["model", "target"])
def test_network_that_returns_another_shape_is_refused(role):
    networks = {name: (lambda x, t: x) for name in ("model", "target")}
    networks[role] = lambda x, t: x[:, :1]
    with pytest.raises(ValueError, match=rf"{role}: expected output of shape \(6, 2\) like its input, got \(6, 1\)"):
        gk.Consistency().training_loss(x=torch.zeros(SHAPE), **networks)


def test_improved_loss_and_gradient_are_those_of_the_written_out_formula(device):
    consistency, noise, student = gk.Consistency(), Noise(4), Net().to(device)
    x = torch.randn(SHAPE, dtype=F64, device=device)
    n = torch.tensor([0, 1, 4, 6, 8, 9], device=device)
    times = torch.tensor(consistency.times(11), dtype=F64, device=device)
    low, high = times[n], times[n + 1]
    f, goal = pair(student, student, x, low, high, drawn(noise, device))
    for c in (None, 0.3):
        size = 0.00054 * math.sqrt(2) if c is None else c
        huber = ((f - goal).square().sum(1) + size**2).sqrt() - size
        expected = (huber / (high - low)).mean()
        got = consistency.improved_loss(student, x, n=n, noise=noise, c=c)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            gradient(got, student), torch.autograd.grad(expected, [*student.parameters()], retain_graph=True)
        )
    own = consistency.improved_loss(student, x, n=n, noise=noise, kind="l2", weight=lambda t: t)
    torch.testing.assert_close(own, (low * (f - goal).square().mean(1)).mean())


@pytest.mark.parametrize("n_steps", [2, 11, 1281])
def test_times_of_improved_training_are_the_inverse_of_the_papers_masses(n_steps):
    consistency, noise, seen = gk.Consistency(), Noise(8), []

    def student(x, t):
        seen.append(t)
        return x

    consistency.improved_loss(student, torch.zeros(2000, 1, dtype=F64), n_steps=n_steps, noise=noise)
    edges = [(math.log(t) + 1.1) / (2.0 * math.sqrt(2.0)) for t in consistency.times(n_steps)]
    mass = np.diff([math.erf(e) for e in edges])
    u = gk.ops.uniform((2000,), noise=noise.at(Purpose.TIMES), dtype=F64).numpy()
    index = np.searchsorted(np.cumsum(mass)[:-1] / mass.sum(), u, side="right")
    low, high = (np.log(consistency.times(n_steps)[index + k]) / 4 for k in (0, 1))
    np.testing.assert_allclose(seen[0], low, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(seen[1], high, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options, words", [
    ({"n_steps": 1}, "n_steps: expected an integer >= 2, got 1"),
    ({"std": 0.0}, "std: expected a number > 0, got 0.0"),
    ({"mean": 1e6}, r"mean, std: expected mass in \[0.002, 80.0\], got 1000000.0, 2.0"),
    ({"c": -1.0}, "c: expected a number > 0, got -1.0"),
    ({"c": 1.0, "kind": "l2"}, "c: expected None with kind='l2', got 1.0"),
])  # fmt: skip
def test_bad_argument_of_the_improved_loss_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.Consistency().improved_loss(lambda x, t: x, torch.zeros(SHAPE), **options)


def ratio(t, q, a, k=8.0, b=1.0):
    """ECT's r, for t counted from epsilon."""
    return (t * (1 - (1 + k / (1 + torch.exp(b * t))) / q**a)).clamp_min(0)


@pytest.mark.parametrize("q, stage", [(2.0, 1), (2.0, 4), (4.0, 6)])
def test_tuning_loss_and_gradient_are_those_of_the_written_out_formula(q, stage, device):
    consistency, noise, student = gk.Consistency(), Noise(7), Net().to(device)
    x = torch.randn(SHAPE, dtype=F64, device=device)
    t = (gk.ops.randn((6,), noise=noise.at(Purpose.TIMES), dtype=F64, device=device) * 2.0 - 1.1).exp()
    r = ratio(t, q, stage)
    f, goal = pair(student, student, x, r + EPS, t + EPS, drawn(noise, device))
    c = 0.00054 * math.sqrt(2)
    expected = (((f - goal).square().sum(1) + c**2).sqrt() - c) / (t - r)
    got = consistency.tuning_loss(student, x, stage=stage, q=q, noise=noise)
    torch.testing.assert_close(got, expected.mean())
    torch.testing.assert_close(gradient(got, student), gradient(expected.mean(), student))
    given = consistency.tuning_loss(student, x, stage=stage, q=q, noise=noise, t=t + EPS, reduction="none")
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-9)


def test_tuning_at_stage_0_is_a_diffusion_models_loss():
    consistency, noise, student = gk.Consistency(), Noise(7), Net()
    x, t = torch.randn(SHAPE, dtype=F64), torch.tensor([0.01, 0.1, 0.5, 1.0, 5.0, 40.0], dtype=F64)
    z = drawn(noise)
    expected = (f_of(student, x + t[:, None] * z, t) - (x + EPS * z)).square().mean()
    got = consistency.tuning_loss(student, x, stage=0, t=t, noise=noise, kind="l2", weight=1.0)
    torch.testing.assert_close(got, expected)


class Scaled(nn.Module):
    """The exact function's F times a number, 1 at first."""

    def __init__(self, std):
        super().__init__()
        self.exact, self.p = ExactFunction(std), nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x, t):
        return self.p * self.exact(x, t)


def test_gradient_of_tuning_at_the_exact_function_vanishes_with_the_distance_of_the_times():
    """E[d f(x + t z, t) / dt | x + t z] = 0 there, so half the distance leaves half of the gradient, over t - r."""
    std = 0.8
    x, z, weight = quadrature(std)

    def slope(stage):
        student, t = Scaled(std), 1.0
        gap = t - EPS - ratio(torch.tensor(t - EPS, dtype=F64), 2.0, stage)
        loss = gk.Consistency().tuning_loss(
            student, x, stage=stage, t=t, noise=z, kind="l2", weight=weight / gap, reduction="sum"
        )
        return float(gradient(loss, student)[0])

    assert abs(slope(12)) < 1e-3
    assert slope(12) / slope(13) == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize("c", [None, 0.3])
def test_adaptive_l2_at_one_half_has_twice_the_pseudo_huber_gradient(c):
    consistency, student, x = gk.Consistency(), Net(), torch.randn(SHAPE, dtype=F64)
    metric, options = gk.methods.metrics.AdaptiveL2(0.5, c), {"stage": 3, "noise": Noise(1)}
    adaptive = gradient(consistency.tuning_loss(student, x, metric=metric, **options), student)
    huber = gradient(consistency.tuning_loss(student, x, c=c, **options), student)
    torch.testing.assert_close(adaptive, tuple(2 * g for g in huber))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_adaptive_l2_is_its_formula(p):
    f, g = torch.randn(SHAPE, dtype=F64), torch.randn(SHAPE, dtype=F64)
    squares = (f - g).square().sum(1)
    torch.testing.assert_close(gk.methods.metrics.AdaptiveL2(p, 0.2)(f, g), squares / (squares + 0.04) ** p)


@pytest.mark.parametrize("options, words", [
    ({"stage": -1}, "stage: expected an integer >= 0, got -1"),
    ({"q": 1.0}, "q: expected a number > 1, got 1.0"),
    ({"std": -1.0}, "std: expected a number > 0, got -1.0"),
    ({"t": EPS}, "t: expected a finite number >= 0.002, got 0.002"),
    ({"k": -1.0}, "k: expected a finite number >= 0, got -1.0"),
])  # fmt: skip
def test_bad_argument_of_the_tuning_loss_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.Consistency().tuning_loss(lambda x, t: x, torch.zeros(SHAPE), **{"stage": 1, **options})


class Passes(TorchDispatchMode):
    """Counts genkern's passes over tensors of the data's shape."""

    def __init__(self):
        super().__init__()
        self.found = {"map": 0, "reduce": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.removesuffix("_numbers")
        if func.namespace == "genkern":
            shapes = [leaf.shape for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.found[name] += SHAPE in shapes
        return func(*args, **(kwargs or {}))


LOSSES = {
    "loss": {"teacher": Net(), "n": 3},
    "training_loss": {"n": 3},
    "improved_loss": {"n": 3},
    "tuning_loss": {"stage": 3},
}


@pytest.mark.parametrize("name", LOSSES)
def test_passes_around_the_networks_are_one_map_one_reduce_and_one_map_backward(name):
    loss, x = getattr(gk.Consistency(), name), torch.randn(SHAPE, dtype=F64)
    with Passes() as passes:
        found = loss(Net(), x, noise=Noise(1), **LOSSES[name])
    assert passes.found == {"map": 3 if name == "loss" else 1, "reduce": 1}  # Heun's two stages beside the noising
    with Passes() as passes:
        found.backward()
    assert passes.found == {"map": 1, "reduce": 0}


class Dropped(nn.Module):
    """A network with dropout, that keeps the masks of its calls."""

    def __init__(self):
        super().__init__()
        self.scale, self.masks = nn.Parameter(torch.ones((), dtype=F64)), []

    def forward(self, x, t, r=None):
        kept = torch.nn.functional.dropout(torch.ones(x.shape, device=x.device), 0.5, self.training)
        self.masks.append(kept.detach())
        return self.scale * x * kept


@pytest.mark.parametrize(
    "method, name", [*(("Consistency", n) for n in LOSSES), ("MeanFlow", "loss"), ("TrigFlow", "loss")]
)
@pytest.mark.parametrize("training", [True, False])
def test_student_draws_the_dropout_of_the_call_without_gradient_again(method, name, training, device):
    net = Dropped().to(device).train(training)
    x = torch.randn(64, 8, dtype=F64, device=device)
    options = LOSSES[name] if method == "Consistency" else {}
    if name == "loss" and method == "Consistency":
        options = {"teacher": lambda x, t: x, "target": net}
    for _ in range(2):
        getattr(getattr(gk, method)(), name)(net, x, **options)
    first, student, later, _ = net.masks
    assert torch.equal(first, student)
    assert torch.equal(student, later) is not training


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_losses_are_the_eager_ones(name):
    torch._dynamo.reset()
    consistency, net, x = gk.Consistency(), Net(), torch.randn(SHAPE, dtype=F64)

    def run(x):
        return getattr(consistency, name)(net, x, noise=Noise(1), **LOSSES[name])

    eager, traced = run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(gradient(traced, net), gradient(eager, net))
    torch._dynamo.reset()


@pytest.mark.parametrize("total, s0, s1", [(800, 2, 150), (1000, 2, 200), (7, 3, 9), (1, 2, 1)])
def test_ct_steps_are_the_papers_formula(total, s0, s1):
    for k in range(total + 1):
        root = math.sqrt((k * ((s1 + 1) ** 2 - s0**2) + total * s0**2) / total)
        near = round(root)
        exact = near if near**2 * total == k * ((s1 + 1) ** 2 - s0**2) + total * s0**2 else math.ceil(root)
        n = curricula.ct_steps(k, total, s0, s1)
        assert n == exact  # ceil(root - 1) + 1
        assert curricula.ct_decay(k, total, s0, s1, 0.95) == pytest.approx(0.95 ** (s0 / n), rel=1e-14)
    assert (curricula.ct_steps(0, total, s0, s1), curricula.ct_steps(total, total, s0, s1)) == (s0, s1 + 1)


def test_ict_steps_double_at_even_intervals_up_to_the_last():
    total = 400_000  # K' = floor(400000 / (log2(128) + 1)) = 50000
    for k in range(0, total + 1, 12_500):
        assert curricula.ict_steps(k, total) == min(10 * 2 ** (k // 50_000), 1280) + 1
    assert curricula.ict_steps(49_999, total) == 11
    assert curricula.ict_steps(50_000, total) == 21
    assert curricula.ict_steps(total, total) == 1281


def test_ect_stage_is_the_rounded_up_quotient():
    assert [curricula.ect_stage(k, 10) for k in (0, 1, 10, 11, 20, 21)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("call, words", [
    (lambda: curricula.ct_steps(5, 4), "step: expected an integer from 0 to 4, got 5"),
    (lambda: curricula.ct_steps(0, 0), "total: expected an integer >= 1, got 0"),
    (lambda: curricula.ct_steps(0, 4, s0=1), "s0: expected an integer >= 2, got 1"),
    (lambda: curricula.ct_steps(0, 4, s0=9, s1=7), "s1: expected an integer >= 8, got 7"),
    (lambda: curricula.ct_decay(0, 4, mu0=1.0), r"mu0: expected a number in \(0, 1\), got 1.0"),
    (lambda: curricula.ict_steps(0, 3), "total: expected a step at least for each doubling from s0=10 to s1=1280, got"),
    (lambda: curricula.ect_stage(0, 0), "every: expected an integer >= 1, got 0"),
])  # fmt: skip
def test_bad_argument_of_a_curriculum_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
