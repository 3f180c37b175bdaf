"""Rectified flow: the loss (13.24), couplings, reflow, both directions of time."""

from __future__ import annotations

import pytest
import torch
from analytic import PathNetwork, gaussian, mixture
from torch import nn

import genkern as gk
from genkern.noise import Noise, Purpose

F64 = torch.float64
SHAPE = (6, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 2, dtype=F64)

    def forward(self, x, t):
        return torch.tanh(self.mix(x)) * (1 + t.to(x.dtype)[:, None])


def gradient(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("coupled", [False, True])
def test_loss_and_gradient_are_those_of_the_written_out_formula(coupled, device):
    flow, model, noise = gk.RectifiedFlow(), Net().to(device), Noise(3)
    x1 = torch.randn(SHAPE, dtype=F64, device=device)
    t = gk.ops.uniform((6,), noise=noise.at(Purpose.TIMES), dtype=F64, device=device)
    if coupled:
        x0 = torch.randn(SHAPE, dtype=F64, device=device)
    else:
        x0 = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64, device=device)
    wide = t[:, None]
    expected = (x1 - x0 - model(wide * x1 + (1 - wide) * x0, t)).square().mean()
    got = flow.loss(model, x1, x0 if coupled else None, noise=noise)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, model), gradient(expected, model))


def test_objective_is_symmetric_in_time():
    flow, model, noise = gk.RectifiedFlow(), Net(), Noise(3)
    x0, x1 = torch.randn(2, *SHAPE, dtype=F64)
    t = torch.linspace(0.1, 0.9, 6, dtype=F64)
    forward = flow.loss(model, x1, x0, t=t, noise=noise)
    swapped = flow.loss(lambda x, s: -model(x, 1 - s), x0, x1, t=1 - t, noise=noise)
    torch.testing.assert_close(forward, swapped)


def test_independent_noise_is_flow_matching_without_sigma_min():
    model, noise, x1 = Net(), Noise(3), torch.randn(SHAPE, dtype=F64)
    torch.testing.assert_close(
        gk.RectifiedFlow().loss(model, x1, noise=noise), gk.FlowMatching().loss(model, x1, noise=noise)
    )


def test_backward_flow_inverts_the_forward_flow():
    flow, options = gk.RectifiedFlow(), {"steps": 400, "sampler": "heun", "dtype": F64}
    network = PathNetwork(mixture(), flow.path, "velocity")
    z = torch.randn(64, 2, dtype=F64)
    x = flow.sample(network, x0=z, **options)
    back = flow.sample(network, x1=x, direction="backward", **options)
    torch.testing.assert_close(back, z, rtol=0, atol=2e-3)
    assert (x - z).abs().max() > 0.5


def test_backward_sampling_solves_the_reversed_equation():
    """dX = -v(X, 1 - s) ds from X_0 = x1: the seed's form, as a forward flow of another field."""
    flow, x1 = gk.RectifiedFlow(), torch.randn(SHAPE, dtype=F64)

    def v(x, t):
        return torch.cos(x) * (0.5 + t.to(x.dtype)[:, None])

    backward = flow.sample(v, x1=x1, direction="backward", steps=8, dtype=F64)
    reversed_field = flow.sample(lambda x, s: -v(x, 1 - s), x0=x1, steps=8, dtype=F64)
    torch.testing.assert_close(backward, reversed_field)


def test_pairs_are_the_flow_from_their_source():
    flow = gk.RectifiedFlow()
    network = PathNetwork(gaussian(1.0, 0.5), flow.path, "velocity")
    x0, x1 = flow.pairs(network, (50, 2), steps=20, seed=4, batch_size=16)
    assert torch.equal(x0, gk.ops.randn((50, 2), noise=Noise(4).at(Purpose.INITIAL), dtype=torch.float32))
    assert torch.equal(x1, flow.sample(network, (50, 2), steps=20, seed=4, batch_size=16))
    again = flow.pairs(network, x0=x0, steps=20)
    assert again[0] is x0
    torch.testing.assert_close(again[1], x1)


def test_pairs_of_a_seeded_sample_are_the_same_in_any_split():
    flow = gk.RectifiedFlow()
    whole = flow.pairs(lambda x, t: x.sin(), (7, 2), steps=3, noise=Noise(1, sample_ids=range(7)))
    split = flow.pairs(lambda x, t: x.sin(), (7, 2), steps=3, seed=1, batch_size=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))


def test_straight_coupling_is_solved_exactly_by_one_step():
    """After reflow of N(0, 1) -> N(m, s^2): x1 = m + s x0, whose flow has straight lines."""
    flow, m, s = gk.RectifiedFlow(), 1.5, 0.4

    def straight(x, t):
        t = t.to(x.dtype)[:, None]
        return m + (s - 1) * (x - t * m) / (1 - t + t * s)

    x0 = torch.randn(40, 2, dtype=F64)
    x1 = flow.sample(straight, x0=x0, steps=1, dtype=F64)
    torch.testing.assert_close(x1, m + s * x0)
    assert float(flow.loss(straight, x1, x0)) < 1e-24
    assert float(flow.loss(straight, x1)) > 0.01  # the independent coupling is another problem


def test_reflow_lowers_the_transport_cost():
    flow, data = gk.RectifiedFlow(), mixture()
    network = PathNetwork(data, flow.path, "velocity")
    x0, x1 = flow.pairs(network, (2000, 2), steps=50, sampler="heun", seed=0, dtype=F64)
    independent = (data.sample(2000, seed=5) - x0).square().sum(1).mean()
    assert (x1 - x0).square().sum(1).mean() < 0.8 * independent


@pytest.mark.parametrize("x0, error, words", [
    (torch.zeros(6, 3), ValueError, r"x0: expected shape \(6, 2\) like x1, got \(6, 3\)"),
    (torch.zeros(SHAPE, dtype=torch.int64), TypeError, "x0: expected float32"),
    (torch.zeros(SHAPE, dtype=F64), TypeError, "x0: expected torch.float32 like x1, or a lower precision"),
])  # fmt: skip
def test_bad_source_is_named(x0, error, words):
    with pytest.raises(error, match=words):
        gk.RectifiedFlow().loss(lambda x, t: x, torch.zeros(SHAPE), x0)


def test_contradicting_arguments_are_refused():
    flow, x = gk.RectifiedFlow(), torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="noise: expected a Noise beside x0"):
        flow.loss(lambda x, t: x, x, x, noise=x)
    with pytest.raises(ValueError, match="noise: expected a Noise where the initial state is given"):
        flow.sample(lambda x, t: x, x0=x, noise=x)
    with pytest.raises(ValueError, match="return_trajectory: expected False"):
        flow.pairs(lambda x, t: x, SHAPE, return_trajectory=True)
    with pytest.raises(ValueError, match="shape: expected the state's shape, or x0"):
        flow.pairs(lambda x, t: x)


@pytest.mark.parametrize("shape, options, words", [
    ((2, -1), {}, "shape: expected 1 to 16 sizes"),
    ((2, 3), {"device": "abacus"}, "device: expected a device that torch has here"),
    ((2, 3), {"seed": 1, "noise": Noise(1)}, "at most one of seed, noise and generator"),
])  # fmt: skip
def test_pairs_that_are_refused_draw_nothing(shape, options, words):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        gk.RectifiedFlow().pairs(lambda x, t: x, shape, steps=2, **options)
    assert torch.equal(torch.get_rng_state(), state)
