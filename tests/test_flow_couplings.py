"""Couplings: optimal transport where it is known in closed form, its entropic form, classes, and the losses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import genkern as gk
from genkern import check, flows
from genkern.flows.couplings import costs
from genkern.noise import Noise, Purpose

pytest.importorskip("scipy")

F64 = torch.float64
FLOWS = [gk.FlowMatching(), gk.RectifiedFlow()]


def batch(n, shape=(1,), seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, n, *shape, dtype=F64, generator=g).to(dtype)
    return x0, 3.0 * x1 + 1.0, torch.rand(n, dtype=F64, generator=g)


def total(x0, x1, index):
    return float((x0[index] - x1).square().sum())


def test_optimal_coupling_in_one_dimension_is_the_sorted_one(device):
    x0, x1, u = (v.to(device) for v in batch(200))
    index = flows.Optimal()(x0, x1, {}, u)
    rank = x1[:, 0].argsort().argsort()
    assert torch.equal(x0[index], x0[x0[:, 0].argsort()][rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_optimal_coupling_is_a_permutation_that_no_other_beats(dtype):
    x0, x1, u = batch(6, (2, 3), dtype=dtype)
    index = flows.Optimal()(x0, x1, {}, u)
    orders = itertools.permutations(range(6))
    least = min(total(x0.double(), x1.double(), torch.tensor(order)) for order in orders)
    assert sorted(index.tolist()) == list(range(6))
    assert total(x0.double(), x1.double(), index) == pytest.approx(least, rel=1e-6)


def test_costs_are_the_squared_distances_far_from_the_origin():
    x0, x1, _ = batch(20, (3, 2), dtype=torch.float32)
    expected = torch.cdist(x0.double().flatten(1), x1.double().flatten(1)).square()
    torch.testing.assert_close(costs(x0 + 1000.0, x1 + 1000.0).double(), expected, rtol=1e-3, atol=1e-2)


def test_sinkhorn_approaches_the_optimal_coupling_as_epsilon_falls():
    x0, x1, u = batch(48, (2,))
    best = total(x0, x1, flows.Optimal()(x0, x1, {}, u))
    means = []
    for epsilon in (1.0, 0.1, 0.01, 0.001):
        plan = flows.Sinkhorn(epsilon, 2000).plan(x0, x1)
        means.append(float((plan * costs(x0, x1)).sum()))
    assert means == sorted(means, reverse=True)
    assert means[-1] == pytest.approx(best, rel=2e-3)
    x0 = torch.randperm(10).double()[:, None]
    x1, u = torch.randperm(10).double()[:, None], torch.rand(10, dtype=F64)
    index = flows.Sinkhorn(0.01, 500)(x0, x1, {}, u)
    assert torch.equal(x0[index], x1)


def test_sinkhorn_with_much_regularisation_is_independent():
    x0, x1, _ = batch(16, (2,))
    plan = flows.Sinkhorn(1e4, 10).plan(x0, x1)
    torch.testing.assert_close(plan, torch.full_like(plan, 1 / 16), rtol=1e-3, atol=0)


def test_sinkhorn_of_two_points_has_its_closed_form():
    x0, x1, _ = batch(2, (3,), seed=4)
    cost, epsilon = costs(x0, x1), 0.3
    gap = float(cost[0, 1] + cost[1, 0] - cost[0, 0] - cost[1, 1]) / (2 * epsilon * float(cost.mean()))
    p = 1 / (1 + math.exp(-gap))
    plan = flows.Sinkhorn(epsilon, 400).plan(x0, x1)
    torch.testing.assert_close(plan, torch.tensor([[p, 1 - p], [1 - p, p]], dtype=F64))


def test_sinkhorn_keeps_both_marginals():
    n = 32
    x0, x1, _ = batch(n, (2,))
    coupling = flows.Sinkhorn(0.05, 1000)
    plan = coupling.plan(x0, x1)
    torch.testing.assert_close(plan.sum(0), torch.ones(n, dtype=F64))
    torch.testing.assert_close(plan.sum(1), torch.ones(n, dtype=F64), rtol=0, atol=1e-5)


def test_sources_are_drawn_as_often_as_the_plan_says():
    """Over K even values of u, to one part in K."""
    n, count, coupling = 16, 50, flows.Sinkhorn(0.1, 40)
    x0, x1, _ = batch(n, (2,))
    drawn = torch.zeros(n, n, dtype=F64)
    for k in range(count):
        index = coupling(x0, x1, {}, torch.full((n,), (k + 0.5) / count, dtype=F64))
        drawn[index, torch.arange(n)] += 1 / count
    assert float((drawn - coupling.plan(x0, x1)).abs().max()) < 1 / count


@pytest.mark.parametrize("coupling", [flows.Optimal("y"), flows.Sinkhorn(0.02, 200, labels="y")])
def test_sources_stay_within_their_class(coupling):
    x0, x1, u = batch(60, (2,), dtype=torch.float32)
    y = torch.arange(60) % 4
    index = coupling(x0, x1, {"y": y}, u)
    assert torch.equal(y[index], y)
    if isinstance(coupling, flows.Optimal):
        for c in range(4):
            of = torch.nonzero(y == c)[:, 0]
            alone = of[flows.Optimal()(x0[of], x1[of], {}, u[of])]
            assert torch.equal(index[of], alone)


def test_independent_coupling_is_a_permutation_by_the_uniforms():
    x0, x1, u = batch(50)
    index = flows.Independent()(x0, x1, {}, u)
    assert sorted(index.tolist()) == list(range(50))
    assert torch.equal(u[index], u.sort().values)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("coupling", [flows.Optimal(), flows.Sinkhorn(), flows.Independent()])
def test_loss_under_a_coupling_is_the_loss_of_the_coupled_noise(flow, coupling):
    model, noise = nn.Linear(4, 4, dtype=F64), Noise(3)
    _, x, _ = batch(8, (4,))
    z = gk.ops.randn((8, 4), noise=noise.at(Purpose.TRAINING), dtype=F64)
    u = gk.ops.uniform((8,), noise=noise.at(Purpose.TIMES, 2), dtype=F64)
    t = gk.ops.uniform((8,), noise=noise.at(Purpose.TIMES), dtype=F64)
    index = coupling(z, x, {}, u)
    got = flow.loss(lambda x, t: model(x), x, coupling=coupling, noise=noise)
    expected = flow.loss(lambda x, t: model(x), x, t=t, noise=z[index])
    torch.testing.assert_close(got, expected)
    given = flow.loss(lambda x, t: model(x), x, t=t, noise=z, coupling=lambda x0, x1, cond, u: index)
    torch.testing.assert_close(given, expected)


def test_given_sources_are_coupled_too():
    x0, x1, _ = batch(8, (4,))
    index = flows.Optimal()(x0, x1, {}, None)
    flow, t = gk.RectifiedFlow(), torch.rand(8, dtype=F64)
    got = flow.loss(lambda x, t: x, x1, x0, t=t, coupling=flows.Optimal())
    torch.testing.assert_close(got, flow.loss(lambda x, t: x, x1, x0[index], t=t))


@pytest.mark.parametrize("features", [None, lambda x: x[:, :1]])
def test_sources_have_their_gradient_through_a_gathered_coupling(features):
    """That of the loss of the sources in the order of the index."""
    x0, x1, u = batch(8, (4,))
    x0.requires_grad_()
    flow, t, seen = gk.RectifiedFlow(), torch.rand(8, dtype=F64), features or (lambda x: x)
    index = flows.Optimal()(seen(x0), seen(x1), {}, u)
    (expected,) = torch.autograd.grad(flow.loss(lambda x, t: 0.5 * x, x1, x0[index], t=t), x0)
    got = flow.loss(lambda x, t: 0.5 * x, x1, x0, t=t, coupling=flows.Gathered(flows.Optimal(), features=features))
    torch.testing.assert_close(torch.autograd.grad(got, x0)[0], expected)
    assert expected.abs().min() > 0.0


def test_coupled_loss_of_half_precision_data_has_a_gradient():
    model = nn.Linear(4, 4)
    x = torch.randn(8, 4).bfloat16()
    loss = gk.FlowMatching().loss(
        lambda x, t, y: model(x), x, coupling=flows.Sinkhorn(labels="y"), cond={"y": torch.arange(8) % 2},
        model_dtype=torch.float32,
    )  # fmt: skip
    loss.backward()
    assert torch.isfinite(model.weight.grad).all()


@pytest.mark.parametrize("coupling, error, words", [
    (flows.Optimal("y"), ValueError, r"labels: expected cond\['y'\] to be a tensor of shape \(3,\), got NoneType"),
    ("exact", TypeError, "coupling: expected a callable, got str"),
    (lambda *_: torch.zeros(2), ValueError, r"coupling: expected an index of int64 and shape \(3,\), got torch.float"),
])  # fmt: skip
def test_bad_coupling_is_named(coupling, error, words):
    with pytest.raises(error, match=words):
        gk.FlowMatching().loss(lambda x, t: x, torch.zeros(3, 2), coupling=coupling)


@pytest.mark.parametrize("last", [-1, 3])
def test_index_of_a_coupling_that_is_no_sample_is_refused(last):
    with pytest.raises(ValueError, match=rf"coupling: expected integers from 0 to 2, got \[0, 1, {last}\]"):
        gk.FlowMatching().loss(lambda x, t: x, torch.zeros(3, 2), coupling=lambda *_: torch.tensor([0, 1, last]))


@pytest.mark.parametrize("place", ["x0", "x1"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_sinkhorn_refuses_what_is_not_finite(place, value):
    x0, x1, u = batch(4, (2,))
    (x0 if place == "x0" else x1)[2, 1] = value
    with pytest.raises(ValueError, match=f"{place}: expected a finite number, got"):
        flows.Sinkhorn()(x0, x1, {}, u)


def test_sinkhorn_leaves_what_is_not_finite_in_its_place_where_values_are_not_looked_at(monkeypatch):
    x0, x1, u = batch(4, (2,))
    x0[2] = math.nan
    monkeypatch.setattr(check.values, "visible", lambda value: False)  # as on a device
    assert torch.equal(flows.Sinkhorn()(x0, x1, {}, u), torch.arange(4))


@pytest.mark.parametrize("options, words", [
    ({"epsilon": 0.0}, "epsilon: expected a number > 0, got 0.0"),
    ({"iterations": 0}, "iterations: expected an integer >= 1, got 0"),
])  # fmt: skip
def test_bad_argument_of_sinkhorn_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        flows.Sinkhorn(**options)


def test_coupling_that_gives_sources_of_another_shape_is_refused():
    class Short:
        def sources(self, x0, x1, cond, u):
            return x0[:2]

    with pytest.raises(ValueError, match=r"coupling: expected shape \(3, 2\) like x, got \(2, 2\)"):
        gk.FlowMatching().loss(lambda x, t: x, torch.zeros(3, 2), coupling=Short())
