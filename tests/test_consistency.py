"""Consistency models: the parameterisation (13.29), the teacher, distillation (13.32), sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from analytic import DenoiserNetwork, gaussian, mixture
from consistency_cases import EPS, F64, RHO, SD, SHAPE, ExactFunction, Net, T, f_of, gradient, slope
from torch import nn

import genkern as gk
from genkern.noise import Noise, Purpose


@pytest.mark.parametrize("sigma", [EPS, torch.full((6,), EPS)])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_boundary_condition_is_exact(sigma, model_dtype):
    x = torch.randn(SHAPE)
    network = nn.Linear(2, 2, dtype=model_dtype)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x, t):
            return self.inner(x)

    assert torch.equal(gk.Consistency().denoise(Model(), x, sigma), x)


def test_denoise_is_the_written_out_parameterisation():
    consistency, model = gk.Consistency(), Net()
    x, sigma = torch.randn(SHAPE, dtype=F64), torch.tensor([EPS, 0.01, 0.5, 2.0, 40.0, T], dtype=F64)
    y = torch.randn(6, dtype=F64)
    torch.testing.assert_close(consistency.denoise(model, x, sigma), f_of(model, x, sigma))
    torch.testing.assert_close(consistency.teacher_denoise(model, x, sigma), f_of(model, x, sigma, 0.0))
    torch.testing.assert_close(consistency.denoise(model, x, 0.5), f_of(model, x, torch.full((6,), 0.5, dtype=F64)))
    with_cond = consistency.denoise(model, x, sigma, cond={"y": y})
    torch.testing.assert_close(with_cond, f_of(lambda x, t: model(x, t, y), x, sigma))


def test_denoise_has_the_gradient_of_the_written_out_parameterisation():
    consistency, model = gk.Consistency(), Net()
    x, sigma = torch.randn(SHAPE, dtype=F64, requires_grad=True), torch.full((6,), 0.5, dtype=F64)
    wanted = [x, *model.parameters()]
    got = torch.autograd.grad(consistency.denoise(model, x, sigma).square().sum(), wanted)
    torch.testing.assert_close(got, torch.autograd.grad(f_of(model, x, sigma).square().sum(), wanted))


def test_scalings_are_those_of_the_field():
    f, teacher, s = gk.Consistency().function, gk.Consistency().teacher, 3.0
    assert f.c_skip(s) == pytest.approx(0.25 / ((3 - EPS) ** 2 + 0.25), rel=1e-14)
    assert f.c_out(s) == pytest.approx((3 - EPS) * 0.5 / math.sqrt(9.25), rel=1e-14)
    assert f.c_in(s) == teacher.c_in(s) == pytest.approx(1 / math.sqrt(9.25), rel=1e-14)
    assert f.c_noise(s) == teacher.c_noise(s) == pytest.approx(math.log(3.0) / 4, rel=1e-14)
    assert teacher.c_skip(s) == pytest.approx(0.25 / 9.25, rel=1e-14)
    assert (f.c_skip(EPS), f.c_out(EPS)) == (1.0, 0.0)


def test_teacher_loss_is_the_weighted_denoising_error(device):
    consistency, model, noise = gk.Consistency(), Net().to(device), Noise(6)
    x = torch.randn(SHAPE, dtype=F64, device=device)
    options = {"dtype": F64, "device": device}
    sigma = (-1.2 + 1.2 * gk.ops.randn((6,), noise=noise.at(Purpose.TIMES), **options)).exp()
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), **options)
    d = f_of(model, x + sigma[:, None] * z, sigma, 0.0)
    weight = (sigma**2 + SD**2) / (sigma * SD) ** 2
    expected = (weight * (d - x).square().mean(1)).mean()
    got = consistency.teacher_loss(model, x, noise=noise)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, model), gradient(expected, model))


def test_perfect_teacher_minimises_its_loss():
    consistency, data = gk.Consistency(), mixture()
    x = data.sample(4000, seed=0)
    perfect = DenoiserNetwork(data)
    options = {"sigma": 0.7, "noise": Noise(0)}
    best = float(consistency.teacher_loss(perfect, x, **options))
    for change in (0.9, 1.1):
        assert float(consistency.teacher_loss(lambda a, t, c=change: c * perfect(a, t), x, **options)) > best


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2s"])
@pytest.mark.parametrize("kind", RHO)
def test_distillation_loss_and_gradient_are_those_of_the_written_out_formula(solver, kind, device):
    consistency, noise = gk.Consistency(), Noise(9)
    student, target, teacher = Net().to(device), Net().to(device), Net().to(device)
    x = torch.randn(SHAPE, dtype=F64, device=device)
    n = torch.tensor([0, 1, 5, 9, 15, 16], device=device)
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64, device=device)
    times = torch.tensor(consistency.times(18), dtype=F64, device=device)
    low, high = times[n], times[n + 1]
    dt = (low - high)[:, None]
    x_high = x + high[:, None] * z
    with torch.no_grad():
        first = slope(teacher, x_high, high)
        x_hat = x_high + dt * first
        if solver == "heun":
            x_hat = x_high + dt / 2 * (first + slope(teacher, x_hat, low))
        if solver == "dpmpp_2s":  # as in its paper, in lambda = -ln sigma
            h = (high / low).log()[:, None]
            middle = (high * low).sqrt()
            x_middle = middle[:, None] / high[:, None] * x_high - torch.expm1(-h / 2) * f_of(teacher, x_high, high, 0.0)
            x_hat = (low / high)[:, None] * x_high - torch.expm1(-h) * f_of(teacher, x_middle, middle, 0.0)
        goal = f_of(target, x_hat, low)
    weight = torch.linspace(0.5, 1.5, 6, dtype=F64, device=device)
    expected = (weight * RHO[kind](f_of(student, x_high, high) - goal)).mean()
    got = consistency.loss(
        student, x, teacher=teacher, target=target, n=n, noise=noise, solver=solver, kind=kind, weight=weight
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, student), gradient(expected, student))


def test_neither_teacher_nor_target_gets_a_gradient():
    student, target, teacher = Net(), Net(), Net()
    gk.Consistency().loss(student, torch.randn(SHAPE, dtype=F64), teacher=teacher, target=target).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for model in (teacher, target) for p in model.parameters())


def test_without_a_target_the_student_stands_for_it_without_gradient():
    consistency, student, teacher, x = gk.Consistency(), Net(), Net(), torch.randn(SHAPE, dtype=F64)
    own = consistency.loss(student, x, teacher=teacher, noise=Noise(1))
    copy = Net()
    copy.load_state_dict(student.state_dict())
    other = consistency.loss(student, x, teacher=teacher, target=copy, noise=Noise(1))
    torch.testing.assert_close(own, other)
    torch.testing.assert_close(gradient(own, student), gradient(other, student))


@pytest.mark.parametrize("solver, order", [("euler", 2), ("heun", 3), ("dpmpp_2s", 3)])
def test_exact_function_has_the_loss_of_one_step_of_the_solver(solver, order):
    """The step's local error is of this order, and the loss its square."""
    consistency, std = gk.Consistency(), 0.8
    x = gaussian(0.0, std).sample(64, seed=0)
    exact, teacher = ExactFunction(std), DenoiserNetwork(gaussian(0.0, std))

    def loss(n_steps):  # one step near t = 1, of half the length for twice the number of times
        n = int(np.searchsorted(consistency.times(n_steps), 1.0))
        found = consistency.loss(exact, x, teacher=teacher, n_steps=n_steps, n=n, noise=Noise(1), solver=solver)
        return float(found)

    assert math.log2(loss(201) / loss(401)) / 2 == pytest.approx(order, abs=0.2)


def test_weight_is_told_the_lower_time():
    consistency, seen = gk.Consistency(), []

    def weight(t):
        seen.append(t)
        return 1 / t

    n = torch.arange(6)
    consistency.loss(Net(), torch.randn(SHAPE, dtype=F64), teacher=Net(), n=n, n_steps=10, weight=weight)
    torch.testing.assert_close(seen[0], torch.tensor(consistency.times(10)[:6]))


def test_pairs_of_times_are_uniform():
    seen = []

    def student(x, t):
        seen.append(t)
        return x

    gk.Consistency().loss(
        student, torch.zeros(9000, 1), teacher=lambda x, t: x, n_steps=10, solver="euler", noise=Noise(2)
    )
    high = seen[1]  # after the target's call
    values, counts = high.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor(gk.Consistency().times(10)[1:], dtype=torch.float32).log() / 4)
    assert float(((counts - 1000.0) ** 2 / 1000.0).sum()) < 26.1  # 99.9% of chi-squared with 8 degrees of freedom


def test_one_step_of_the_exact_function_follows_the_probability_flow():
    consistency, std = gk.Consistency(), 0.8
    start = T * torch.randn(SHAPE, dtype=F64)
    x = consistency.sample(ExactFunction(std), noise=start, dtype=F64)
    torch.testing.assert_close(x, start * math.sqrt((std**2 + EPS**2) / (std**2 + T**2)))
    ode = consistency.sample_ode(DenoiserNetwork(gaussian(0.0, std)), noise=start, steps=300, dtype=F64)
    torch.testing.assert_close(x, ode, rtol=1e-3, atol=0)


def test_multistep_sampling_is_the_written_out_loop():
    consistency, model = gk.Consistency(), Net()
    start, z = T * torch.randn(SHAPE, dtype=F64), torch.randn(3, *SHAPE, dtype=F64)
    got = consistency.sample(model, noise=start, times=[T, 5.0, 0.4], step_noise=z, dtype=F64)
    x = f_of(model, start, torch.full((6,), T, dtype=F64))
    for k, t in enumerate((5.0, 0.4)):
        x = f_of(model, x + math.sqrt(t**2 - EPS**2) * z[k], torch.full((6,), t, dtype=F64))
    torch.testing.assert_close(got, x.detach())


def test_multistep_samples_of_the_exact_function_keep_the_marginal():
    std = 0.8
    x = gk.Consistency().sample(ExactFunction(std), (40_000, 1), steps=3, seed=0)
    assert float(x.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * 40_000))  # four standard errors


@pytest.mark.parametrize("sampler, calls", [("euler", 6), ("heun", 11)])
def test_ode_to_zero_ends_with_the_denoiser(sampler, calls):
    consistency, network = gk.Consistency(), DenoiserNetwork(mixture())
    start = T * torch.randn(SHAPE, dtype=F64)
    x, trajectory = consistency.sample_ode(
        network, noise=start, steps=6, sampler=sampler, to_zero=True, dtype=F64, return_trajectory=True
    )
    assert network.calls == calls
    assert x.isfinite().all()
    torch.testing.assert_close(x, mixture().data(trajectory[-2], 1.0, EPS))


def test_ode_to_epsilon_is_the_written_out_loop():
    consistency, model = gk.Consistency(), Net()
    x = T * torch.randn(SHAPE, dtype=F64)
    got = consistency.sample_ode(model, noise=x, steps=3, dtype=F64)
    times = [torch.full((6,), t, dtype=F64) for t in consistency.times(4)[::-1]]
    for t, s in zip(times[:-1], times[1:], strict=True):
        first, h = slope(model, x, t), (s - t)[:, None]
        x = x + h / 2 * (first + slope(model, x + h * first, s))
    torch.testing.assert_close(got, x.detach())


def test_one_ode_step_to_zero_is_the_denoiser():
    start = T * torch.randn(SHAPE, dtype=F64)
    x = gk.Consistency().sample_ode(DenoiserNetwork(mixture()), noise=start, steps=1, to_zero=True, dtype=F64)
    torch.testing.assert_close(x, mixture().data(start, 1.0, T))


@pytest.mark.parametrize("options, words", [
    ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max, got 0.0 and 80.0"),
    ({"sigma_min": 3.0, "sigma_max": 2.0}, "0 < sigma_min < sigma_max"),
    ({"sigma_max": math.inf}, "sigma_max: expected a finite number"),
    ({"sigma_data": 0.0}, "sigma_data: expected a number > 0"),
    ({"rho": -1.0}, "rho: expected a number > 0"),
])  # fmt: skip
def test_bad_argument_of_the_method_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.Consistency(**options)


@pytest.mark.parametrize("options, words", [
    ({"n_steps": 1}, "n_steps: expected an integer >= 2, got 1"),
    ({"solver": "rk4"}, "solver: expected one of 'heun', 'euler', 'dpmpp_2s'"),
    ({"n": 17}, "n: expected an integer from 0 to 16, got 17"),
    ({"n": torch.full((6,), 17)}, "n: expected integers from 0 to 16"),
    ({"kind": "lpips"}, "kind: expected one of"),
])  # fmt: skip
def test_bad_argument_of_the_loss_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.Consistency().loss(lambda x, t: x, torch.zeros(SHAPE), teacher=lambda x, t: x, **options)


@pytest.mark.parametrize("role", ["model", "teacher", "target"])
def test_network_that_returns_another_shape_is_refused(role):
    networks = {name: (lambda x, t: x) for name in ("model", "teacher", "target")}
    networks[role] = lambda x, t: x[:, :1]
    with pytest.raises(ValueError, match=rf"{role}: expected output of shape \(6, 2\) like its input, got \(6, 1\)"):
        gk.Consistency().loss(x=torch.zeros(SHAPE), **networks)


@pytest.mark.parametrize("options, words", [
    ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
    ({"times": [90.0]}, "times: expected times from .* to 80.0"),
    ({"times": [0.002]}, "times: expected strictly"),
    ({"times": [0.001]}, "times: expected decreasing times"),
    ({"times": [1.0, 2.0]}, "times: expected strictly"),
    ({"times": []}, "times: expected at least"),
    ({"times": [1.0], "steps": 1}, "steps: expected None beside times"),
])  # fmt: skip
def test_bad_argument_of_sample_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.Consistency().sample(lambda x, t: x, SHAPE, **options)


@pytest.mark.parametrize("options, words", [
    ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
    ({"times": [1.0, 2.0]}, "times: expected decreasing times"),
    ({"times": [80.0, -1.0]}, "times: expected times from 0.0 to 80.0"),
    ({"times": [80.0, 1.0], "to_zero": True}, "to_zero: expected False beside times"),
    ({"sampler": "ddim"}, "sampler: expected one of 'euler', 'ab2', 'midpoint', 'heun', 'rk4', got 'ddim'"),
])  # fmt: skip
def test_bad_argument_of_the_ode_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.Consistency().sample_ode(lambda x, t: x, SHAPE, **options)


@pytest.mark.parametrize("sigma", [0.001, 81.0, math.nan])
def test_time_outside_the_path_is_refused(sigma):
    with pytest.raises(ValueError, match="sigma: expected a number from 0.002 to 80"):
        gk.Consistency().denoise(lambda x, t: x, torch.zeros(SHAPE), sigma)
