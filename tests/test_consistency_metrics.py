"""Metrics of consistency models: d(f, f^-) by any callable, and self-consistency along trajectories."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import DenoiserNetwork, gaussian
from consistency_cases import EPS, F64, RHO, SHAPE, ExactFunction, Net, T, gradient

import genkern as gk
from genkern.noise import Noise

LOSSES = ("loss", "training_loss", "improved_loss", "tuning_loss")


def options_of(name):
    return {"loss": {"teacher": Net()}, "tuning_loss": {"stage": 4}}.get(name, {}) | {"noise": Noise(5)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", RHO)
@pytest.mark.parametrize("weight", [None, 0.3, lambda t: t])
def test_metric_given_as_a_callable_has_the_loss_and_gradient_of_the_kind(name, kind, weight):
    student, x, options = Net(), torch.randn(SHAPE, dtype=F64), options_of(name)
    loss = getattr(gk.Consistency(), name)
    fused = loss(student, x, kind=kind, weight=weight, **options)
    own = loss(student, x, metric=lambda f, g: RHO[kind](f - g), weight=weight, **options)
    torch.testing.assert_close(own, fused)
    torch.testing.assert_close(gradient(own, student), gradient(fused, student))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_metric_of_trailing_ones_is_reduced_as_one_number_a_sample(reduction):
    student, x, options = Net(), torch.randn(SHAPE, dtype=F64), options_of("training_loss")
    loss = gk.Consistency().training_loss
    flat = loss(student, x, metric=lambda f, g: (f - g).square().mean(1), reduction=reduction, **options)
    lpips = loss(
        student, x, metric=lambda f, g: (f - g).square().mean(1)[:, None, None], reduction=reduction, **options
    )
    torch.testing.assert_close(flat, lpips)
    torch.testing.assert_close(flat, loss(student, x, reduction=reduction, **options))


@pytest.mark.parametrize("name", LOSSES)
def test_metric_of_another_shape_is_refused_and_no_gradient_is_left(name):
    student, x = Net(), torch.zeros(SHAPE, dtype=F64)
    for metric, got in ((lambda f, g: f - g, r"\(6, 2\)"), (lambda f, g: (f - g).mean(), r"\(\)")):
        with pytest.raises(ValueError, match=rf"metric: expected shape \(6,\), one a sample, got {got}"):
            getattr(gk.Consistency(), name)(student, x, metric=metric, **options_of(name))
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("options, error, words", [
    ({"metric": "lpips"}, TypeError, "metric: expected a callable of"),
    ({"metric": lambda f, g: 0.0}, TypeError, r"metric: expected a tensor \[6\], got float"),
    ({"metric": lambda f, g: f, "kind": "l2"}, ValueError, "kind: expected None beside a metric"),
    ({"metric": lambda f, g: f, "mask": torch.ones(SHAPE)}, ValueError, "mask: expected None beside a metric"),
])  # fmt: skip
@pytest.mark.parametrize("name", LOSSES)
def test_bad_metric_is_named(name, options, error, words):
    with pytest.raises(error, match=words):
        getattr(gk.Consistency(), name)(Net(), torch.zeros(SHAPE, dtype=F64), **options, **options_of(name))


def trajectory_of(std, times):
    """x(t) = x(T) sqrt((std^2 + t^2) / (std^2 + T^2)), exact on N(0, std^2)."""
    times = torch.tensor(times.copy(), dtype=F64)[:, None, None]
    return T * torch.randn(SHAPE, dtype=F64) * ((std**2 + times**2) / (std**2 + T**2)).sqrt()


def test_exact_function_is_consistent_along_exact_trajectories():
    consistency, std = gk.Consistency(), 0.8
    times = consistency.times(20)[::-1]
    found = consistency.self_consistency(ExactFunction(std), trajectory_of(std, times), times)
    assert found.shape == (20,) and found[-1] == 0.0
    assert float(found.max()) < 1e-12


def test_self_consistency_of_another_function_is_its_closed_form():
    """f = c x (std^2 + eps^2)^1/2 / (std^2 + t^2)^1/2 but at epsilon, where f = x: |c - 1| times x there."""
    consistency, std, c = gk.Consistency(), 0.8, 1.3
    times, exact = consistency.times(12)[::-1], ExactFunction(std)
    trajectory = trajectory_of(std, times)

    def changed(x, t):  # c f = skip x + out (c F + (c - 1) skip / out x)
        s = (4 * t)[:, None].exp()
        r = (s**2 + 0.25).sqrt()
        skip, out = 0.25 / ((s - EPS) ** 2 + 0.25), (s - EPS) * 0.5 / r
        return c * exact(x, t) + (c - 1) * skip / out.clamp_min(1e-12) * x * r

    expected = abs(c - 1) * float(trajectory[-1].square().mean().sqrt())
    found = consistency.self_consistency(changed, trajectory, times)
    torch.testing.assert_close(found[:-1], torch.full((11,), expected, dtype=F64), rtol=1e-9, atol=0)


def test_self_consistency_takes_the_trajectory_of_the_ode():
    """The solver's error is left: it falls with the square of the steps (Heun)."""
    consistency, std = gk.Consistency(), 0.8
    teacher, start = DenoiserNetwork(gaussian(0.0, std)), T * torch.randn(SHAPE, dtype=F64)

    def error(steps):
        _, trajectory = consistency.sample_ode(teacher, noise=start, steps=steps, dtype=F64, return_trajectory=True)
        times = consistency.times(steps + 1)[::-1]
        return float(consistency.self_consistency(ExactFunction(std), trajectory, times).max())

    assert math.log2(error(80) / error(160)) == pytest.approx(2.0, abs=0.2)


def test_bad_trajectory_is_named():
    consistency, x = gk.Consistency(), torch.zeros(3, *SHAPE)
    with pytest.raises(ValueError, match=r"times: expected shape \(3,\), one a state, got \(2,\)"):
        consistency.self_consistency(lambda x, t: x, x, [1.0, 0.5])
    with pytest.raises(ValueError, match="times: expected a number from 0.002 to 80, got 90.0"):
        consistency.self_consistency(lambda x, t: x, x, [90.0, 1.0, 0.5])
