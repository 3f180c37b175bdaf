"""Straightness, curvature and transport cost, and the theorems on rectified flow that they measure."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import PathNetwork, gaussian, mixture

import genkern as gk
from genkern import flows
from genkern.noise import Noise

F64 = torch.float64
FLOW = gk.RectifiedFlow()
POINTS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0], [1.5, 1.5]], dtype=F64)
convex = pytest.mark.parametrize("cost", flows.COSTS)


def circle(n, speed):
    t = torch.linspace(0.0, 1.0, n + 1, dtype=F64)
    return torch.stack([torch.cos(speed * t), torch.sin(speed * t)], 1)[:, None].expand(-1, 3, -1)


def test_arc_of_a_circle_has_its_closed_forms():
    """|Z'| = w, |Z''| = w^2, |Z_1 - Z_0| = 2 sin(w/2): the straightness is w^2 - 4 sin^2(w/2)."""
    w = 1.7
    z = circle(1000, w)
    torch.testing.assert_close(flows.curvature(z), torch.full((3,), w * w, dtype=F64), rtol=2e-3, atol=0)
    expected = torch.full((3,), w * w - 4 * math.sin(w / 2) ** 2, dtype=F64)
    torch.testing.assert_close(flows.straightness(z), expected, rtol=1e-5, atol=0)


def test_straight_line_on_any_grid_either_way_has_neither():
    x0, x1 = torch.randn(2, 4, 2, 3, dtype=F64)
    for times in ([0.0, 0.1, 0.5, 1.0], [1.0, 0.7, 0.2, 0.0]):
        z = torch.stack([(1 - t) * x0 + t * x1 for t in times])
        assert float(flows.straightness(z, times).max()) < 1e-25
        assert float(flows.curvature(z, times).max()) < 1e-12
        uneven = flows.straightness(z)  # the same line at another speed
        assert float(uneven.min()) > 1e-3


def test_straightness_of_the_gaussian_flow_is_its_integral():
    """z_t = t m + s_t z with s_t^2 = (1-t)^2 + t^2 s^2: |z|^2 int (s_t' - (s - 1))^2 dt."""
    integrate = pytest.importorskip("scipy.integrate")
    m, s, z = 1.5, 0.4, torch.randn(6, 2, dtype=F64)

    def excess(t):
        return ((t * s * s - (1 - t)) / math.sqrt((1 - t) ** 2 + t * t * s * s) - (s - 1)) ** 2

    network = PathNetwork(gaussian(m, s), FLOW.path, "velocity")
    _, trajectory = FLOW.sample(network, x0=z, steps=400, sampler="midpoint", dtype=F64, return_trajectory=True)
    expected = z.square().sum(1) * integrate.quad(excess, 0, 1)[0]
    torch.testing.assert_close(flows.straightness(trajectory), expected, rtol=1e-4, atol=0)


@convex
def test_cost_is_convex_even_and_zero_where_nothing_moves(cost):
    a, b, zero = torch.randn(200, 3, dtype=F64), torch.randn(200, 3, dtype=F64), torch.zeros(200, 3, dtype=F64)
    middle = flows.transport_cost(zero, 0.3 * a + 0.7 * b, cost)
    ends = 0.3 * flows.transport_cost(zero, a, cost) + 0.7 * flows.transport_cost(zero, b, cost)
    assert (middle <= ends + 1e-12).all()
    torch.testing.assert_close(flows.transport_cost(a, b, cost), flows.transport_cost(b, a, cost))
    assert float(flows.transport_cost(a, a, cost).abs().max()) < 1e-14


def test_costs_are_their_formulas_on_states_of_any_rank():
    z0, z1 = torch.zeros(2, 1, 2), torch.tensor([[[3.0, -4.0]], [[0.0, 1.0]]])
    for cost, expected in {"squared": [25, 1], "norm": [5, 1], "l1": [7, 1], "max": [4, 1], "cubic": [125, 1]}.items():
        assert flows.transport_cost(z0, z1, cost).tolist() == pytest.approx(expected)
    logs = [math.log(math.cosh(3.0)) + math.log(math.cosh(4.0)), math.log(math.cosh(1.0))]
    assert flows.transport_cost(z0, z1, "log_cosh").tolist() == pytest.approx(logs)
    assert flows.transport_cost(z0, z1, lambda d: d[:, 1]).tolist() == [-4.0, 1.0]


@pytest.fixture(scope="module")
def rectified():
    """Independent pairs of noise and four points, and the flow's from the same sources by the exact field."""
    n = 6000
    field = flows.MarginalField(POINTS)
    x1 = POINTS[torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(2))]
    z1, trajectory = FLOW.sample(field, (n, 2), steps=200, seed=6, dtype=F64, return_trajectory=True)
    return field, x1, z1, trajectory


@convex
def test_rectified_coupling_costs_no_more_for_any_convex_cost(cost, rectified):
    _, x1, z1, trajectory = rectified
    before, after = (flows.transport_cost(trajectory[0], end, cost) for end in (x1, z1))
    saved = before - after
    assert float(saved.mean()) > 4 * float(saved.std()) / math.sqrt(len(saved))


def test_rectified_coupling_keeps_the_marginals(rectified):
    _, _, z1, trajectory = rectified
    stats = pytest.importorskip("scipy.stats")
    distance = torch.cdist(z1, POINTS)
    assert float(distance.min(1).values.max()) < 1e-3
    counts = torch.bincount(distance.argmin(1), minlength=4)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert stats.kstest(trajectory[0].flatten().numpy(), "norm").pvalue > 1e-3


def test_what_reflow_saves_is_the_straightness_and_the_residual(rectified):
    """E|X_1 - X_0|^2 - E|Z_1 - Z_0|^2 = S(Z) + int E|(X_1 - X_0) - v(X_t, t)|^2 dt, within four standard errors."""
    field, x1, z1, trajectory = rectified
    x0 = trajectory[0]
    residual = 2 * FLOW.loss(field, x1, x0, times="stratified", noise=Noise(3), reduction="none")
    terms = flows.transport_cost(x0, x1) - flows.transport_cost(x0, z1) - flows.straightness(trajectory) - residual
    assert float(terms.mean()) == pytest.approx(0.0, abs=4 * float(terms.std()) / math.sqrt(len(terms)) + 0.01)


@convex
@pytest.mark.parametrize("rho", [-0.8, 0.0, 0.6])
def test_rectified_gaussian_coupling_of_any_correlation_is_the_identity(rho, cost):
    """X_1 = rho X_0 + ...: v = (Var X_t)' / (2 Var X_t) x, whose flow scales by the deviations: Z_1 = Z_0, cost 0."""

    def v(x, t):
        t = t.to(x.dtype)[:, None]
        variance = (1 - t) ** 2 + t**2 + 2 * rho * t * (1 - t)
        return (2 * t - 1) * (1 - rho) / variance * x

    x0, w = torch.randn(2, 500, 3, dtype=F64)
    _, z1 = FLOW.pairs(v, x0=x0, steps=100, sampler="rk4", dtype=F64)
    torch.testing.assert_close(z1, x0, rtol=1e-5, atol=1e-5)
    x1 = rho * x0 + math.sqrt(1 - rho**2) * w
    assert float(flows.transport_cost(x0, z1, cost).mean()) < 1e-4 * float(flows.transport_cost(x0, x1, cost).mean())


def test_reflow_straightens_and_a_straight_path_is_exact_in_one_step_of_euler():
    """In one dimension the rectified coupling is the monotone map z -> m + s z, whose own flow has straight lines."""
    m, s, z = 1.5, 0.4, torch.randn(200, 1, dtype=F64)

    def second(x, t):
        t = t.to(x.dtype)[:, None]
        return m + (s - 1) * (x - t * m) / (1 - t + t * s)

    first = PathNetwork(gaussian(m, s, 1), FLOW.path, "velocity")
    end, bent = FLOW.sample(first, x0=z, steps=200, sampler="rk4", dtype=F64, return_trajectory=True)
    again, straight = FLOW.sample(second, x0=z, steps=200, dtype=F64, return_trajectory=True)
    torch.testing.assert_close(again, end, rtol=0, atol=1e-6)  # the coupling is kept
    assert float(flows.straightness(bent).mean()) > 0.01
    assert float(flows.straightness(straight).max()) < 1e-20
    assert float(flows.curvature(straight).max()) < 1e-10
    torch.testing.assert_close(FLOW.sample(second, x0=z, steps=1, dtype=F64), again)


def test_trajectories_do_not_cross_where_interpolations_do():
    """On the line, where trajectories that met would change their order."""
    field = flows.MarginalField(torch.tensor([[-1.5], [-0.4], [1.8]], dtype=F64))
    x0 = torch.linspace(-2.0, 2.0, 60, dtype=F64)[:, None]
    _, z = FLOW.sample(field, x0=x0, steps=400, dtype=F64, return_trajectory=True)
    x1 = field.points[torch.randint(0, 3, (60,))]
    lines = torch.stack([(1 - t) * x0 + t * x1 for t in torch.linspace(0.0, 1.0, 401, dtype=F64)])
    assert float(z[:-1, :, 0].diff(dim=1).min()) > 0.0  # at the last time many are at one point
    assert float(lines[:-1, :, 0].diff(dim=1).min()) < 0.0


def test_one_step_of_euler_errs_most_where_the_paths_are_least_straight():
    network = PathNetwork(mixture(), FLOW.path, "velocity")
    x, z = FLOW.sample(network, (400, 2), steps=100, sampler="midpoint", seed=1, dtype=F64, return_trajectory=True)
    one = FLOW.sample(network, (400, 2), steps=1, seed=1, dtype=F64)
    error, bent = (one - x).norm(dim=1), flows.straightness(z)
    order = bent.argsort()
    assert float(error[order[:100]].mean()) < float(error[order[-100:]].mean())


@pytest.mark.parametrize("make, words", [
    (lambda: flows.straightness(torch.zeros(1, 3, 2)), r"trajectory: expected \[steps \+ 1, B, ...\]"),
    (lambda: flows.straightness(torch.zeros(3, 2, 2), [0.0, 1.0]), "times: expected 3, one a state"),
    (lambda: flows.curvature(torch.zeros(2, 2, 2), [0.0, 0.0]), "times: expected strictly increasing"),
    (lambda: flows.transport_cost(torch.zeros(3, 2), torch.zeros(3, 3)), r"z1: expected shape \(3, 2\)"),
    (lambda: flows.transport_cost(torch.zeros(3, 2), torch.zeros(3, 2), "l3"), "cost: expected one of 'squared'"),
    (lambda: flows.transport_cost(torch.zeros(3, 2), torch.zeros(3, 2), lambda d: d), r"cost: expected shape \(3,\)"),
])  # fmt: skip
def test_bad_argument_of_a_measure_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
