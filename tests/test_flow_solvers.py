"""AB2, midpoint and RK4 of the flows: the written-out formulas, torchdiffeq, and the loop's options."""

from __future__ import annotations

import pytest
import torch

import genkern as gk
from genkern import samplers

F64 = torch.float64
TIMES = [0.0, 0.3, 0.4, 1.0]


def field(x, t):
    return (x + 2 * t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))).sin()


def flat(t, x):
    return field(x, t.expand(x.shape[0]))


def classical(t, x):
    """Kutta's classical step; torchdiffeq's "rk4" is his 3/8 rule."""
    for s, e in zip(t[:-1], t[1:], strict=True):
        h = e - s
        k1 = flat(s, x)
        k2 = flat(s + h / 2, x + h / 2 * k1)
        k3 = flat(s + h / 2, x + h / 2 * k2)
        k4 = flat(e, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def adams(t, x):
    before = None
    for s, e in zip(t[:-1], t[1:], strict=True):
        h, v = e - s, flat(s, x)
        r = 0.0 if before is None else h / before[0]
        x = x + h * ((1 + r / 2) * v - (r / 2) * (0.0 if before is None else before[1]))
        before = h, v
    return x


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("sampler", ["euler", "ab2", "midpoint", "heun", "rk4"])
def test_solver_is_its_formula_on_an_uneven_grid_either_way(sampler, forward):
    x = torch.randn(5, 3, 4, dtype=F64)
    times = TIMES if forward else TIMES[::-1]
    start = {"x0": x} if forward else {"x1": x, "direction": "backward"}
    got = gk.FlowMatching().sample(field, times=times, sampler=sampler, dtype=F64, **start)
    grid = torch.tensor(times, dtype=F64)
    if sampler in ("ab2", "rk4"):
        expected = {"ab2": adams, "rk4": classical}[sampler](grid, x)
    else:
        method = {"heun": "heun2"}.get(sampler, sampler)
        expected = pytest.importorskip("torchdiffeq").odeint(flat, x, grid, method=method)[-1]
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("sampler", ["ab2", "midpoint", "rk4"])
def test_solver_under_guidance_in_a_half_precision_network_is_the_solver_of_the_guided_field(sampler):
    x, y = torch.randn(6, 4), torch.rand(6)

    def network(x, t, y):
        return torch.sin(x) * y.reshape(-1, 1).to(x.dtype)

    got = gk.FlowMatching().sample(
        network, x0=x, steps=3, sampler=sampler, cond={"y": y}, uncond={"y": 0 * y + 0.5}, guidance_scale=3.0, seed=0
    )

    def guided(x, t):
        return torch.sin(x) * (0.5 + 3.0 * (y.reshape(-1, 1) - 0.5))

    expected = gk.FlowMatching().sample(guided, x0=x, steps=3, sampler=sampler, seed=0)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sampler", ["ab2", "midpoint", "rk4"])
def test_solver_keeps_the_gradient_and_the_trajectory(sampler):
    flow, x = gk.FlowMatching(), torch.randn(2, 3, dtype=F64, requires_grad=True)

    def run(x):
        return flow.sample(field, x0=x, steps=3, sampler=sampler, dtype=F64, differentiable=True)

    assert torch.autograd.gradcheck(run, (x,))
    end, trajectory = flow.sample(field, x0=x.detach(), steps=3, sampler=sampler, dtype=F64, return_trajectory=True)
    assert trajectory.shape == (4, 2, 3)
    assert torch.equal(trajectory[-1], end)
    torch.testing.assert_close(end, run(x).detach())


def test_rk4_ends_with_a_midpoint_step_where_the_slope_is_not_finite():
    consistency, x = gk.Consistency(), torch.randn(4, 2, dtype=F64)

    def network(x, c_noise):
        return torch.tanh(x)

    a, b = (
        consistency.sample_ode(network, noise=x, times=[80.0, 0.0], sampler=sampler, dtype=F64)
        for sampler in (samplers.RK4(), samplers.Midpoint())
    )
    assert torch.equal(a, b)
    assert torch.isfinite(a).all()


@pytest.mark.parametrize("sampler", ["ab2", "midpoint", "rk4"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_captured_solver_has_the_bits_of_the_uncaptured_one(sampler, model_dtype, captures):
    model = torch.nn.Linear(4, 4).to(model_dtype).eval()

    def network(x, t, y):
        return model(x).sin() * y.reshape(-1, 1)

    for seed in range(3):
        options = {"cond": {"y": torch.rand(5)}, "uncond": {"y": torch.rand(5)}, "guidance_scale": 2.0, "seed": seed}
        options |= {"steps": 4, "sampler": sampler, "model_dtype": model_dtype}
        wanted = gk.FlowMatching().sample(network, (5, 4), **options)
        assert torch.equal(gk.FlowMatching().sample(network, (5, 4), **options, cuda_graph=True), wanted)
    assert captures
