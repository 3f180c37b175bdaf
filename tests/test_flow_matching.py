"""Flow matching: the loss (13.23), theorem 2, and the arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import genkern as gk
from genkern.noise import Noise, Purpose

F64 = torch.float64
SHAPE = (6, 3, 5)


class Net(nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.mix = nn.Linear(width, width, dtype=F64)

    def forward(self, x, t):
        return torch.tanh(self.mix(x)) * (1 + t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)))


def gradient(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_the_written_out_formula(sigma_min, device):
    flow, model = gk.FlowMatching(sigma_min=sigma_min), Net().to(device)
    x1, noise = torch.randn(SHAPE, dtype=F64, device=device), Noise(2)
    t = gk.ops.uniform((6,), noise=noise.at(Purpose.TIMES), dtype=F64, device=device)
    x0 = gk.ops.randn(SHAPE, noise=noise.at(Purpose.TRAINING), dtype=F64, device=device)
    wide = t.reshape(-1, 1, 1)
    psi = (1 - (1 - sigma_min) * wide) * x0 + wide * x1
    expected = (model(psi, t) - (x1 - (1 - sigma_min) * x0)).square().mean()
    got = flow.loss(model, x1, noise=noise)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, model), gradient(expected, model))


def test_marginal_and_conditional_objectives_have_equal_gradients_over_a_finite_data_set():
    """Theorem 2 at each x of a fine grid: sum_i q_i p(x|i) grad |v - u(x|i)|^2 = p(x) grad |v - u(x)|^2."""
    sigma_min, t = 0.2, 0.6
    flow, model = gk.FlowMatching(sigma_min=sigma_min), Net(1)
    data = torch.tensor([-1.0, 0.3, 2.0], dtype=F64)
    q = torch.tensor([0.5, 0.2, 0.3], dtype=F64)
    x = torch.linspace(-6.0, 6.0, 801, dtype=F64)
    sigma = 1 - (1 - sigma_min) * t
    p = torch.exp(-((x[:, None] - t * data) ** 2) / (2 * sigma**2)) / math.sqrt(2 * math.pi) / sigma  # p_t(x | x1)
    cell = float(x[1] - x[0])

    conditional = sum(
        flow.loss(
            model, data[i].expand(801, 1).contiguous(), t=t, noise=((x - t * data[i]) / sigma)[:, None],
            weight=q[i] * p[:, i] * cell, reduction="sum",
        )
        for i in range(3)
    )  # fmt: skip
    u_given = -(1 - sigma_min) / sigma * (x[:, None] - t * data) + data  # (13.22)
    marginal = p @ q  # (13.18)
    u = (u_given * p * q).sum(1) / marginal  # (13.19)
    v = model(x[:, None], torch.full((801,), t, dtype=F64))[:, 0]
    direct = ((v - u) ** 2 * marginal * cell).sum()  # (13.17)
    assert abs(float((conditional - direct).detach())) > 0.01  # they differ by a constant
    torch.testing.assert_close(gradient(conditional, model), gradient(direct, model))


def test_times_are_in_the_unit_interval_and_float32():
    seen = []
    gk.FlowMatching().loss(lambda x, t: seen.append(t) or x, torch.zeros(1000, 2))
    assert seen[0].dtype == torch.float32
    assert 0.0 < float(seen[0].min()) < 0.01
    assert 0.99 < float(seen[0].max()) <= 1.0


def test_half_precision_data_meets_a_float32_network():
    model = nn.Linear(5, 5)
    x = torch.randn(SHAPE)
    loss = gk.FlowMatching().loss(lambda x, t: model(x), x.bfloat16(), noise=Noise(0), model_dtype=torch.float32)
    expected = gk.FlowMatching().loss(lambda x, t: model(x), x.bfloat16().float(), noise=Noise(0))
    torch.testing.assert_close(loss, expected)


def test_network_is_given_its_own_dtype():
    seen = []
    gk.FlowMatching().loss(lambda x, t: seen.append(x.dtype) or x, torch.zeros(SHAPE), model_dtype=torch.bfloat16)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("sampler, calls", [("euler", 5), ("ab2", 5), ("midpoint", 10), ("heun", 10), ("rk4", 20)])
def test_calls_of_a_sampler(sampler, calls):
    seen = []
    gk.FlowMatching().sample(lambda x, t: seen.append(t) or x, (2, 3), steps=5, sampler=sampler)
    assert len(seen) == calls


def test_euler_is_the_written_out_loop():
    x0 = torch.randn(SHAPE, dtype=F64)
    got = gk.FlowMatching().sample(lambda x, t: -x.sin(), x0=x0, times=[0.0, 0.3, 0.4, 1.0], dtype=F64)
    x = x0
    for h in (0.3, 0.1, 0.6):
        x = x - h * x.sin()
    torch.testing.assert_close(got, x)


def test_heun_is_the_written_out_loop():
    x0 = torch.randn(SHAPE, dtype=F64)
    got = gk.FlowMatching().sample(lambda x, t: -x.sin(), x0=x0, times=[0.0, 0.3, 1.0], sampler="heun", dtype=F64)
    x = x0
    for h in (0.3, 0.7):
        v = -x.sin()
        x = x + h / 2 * (v - (x + h * v).sin())
    torch.testing.assert_close(got, x)


@pytest.mark.parametrize("options, words", [
    ({"path": "sine"}, "path: expected one of 'cond_ot', 'cosine', 'vp', got 'sine'"),
    ({"sigma_min": -0.1}, "sigma_min: expected a number from 0 to 1"),
    ({"sigma_min": 1.0}, "sigma_min: expected a number from 0 to 1"),
])  # fmt: skip
def test_bad_argument_of_the_method_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.FlowMatching(**options)


@pytest.mark.parametrize("t, words", [
    (1.5, "t: expected a number from 0 to 1, got 1.5"),
    (math.nan, "t: expected a number from 0 to 1, got nan"),
    (torch.full((6,), 2.0), "t: expected a number from 0 to 1, got 2.0 at index 0"),
    (torch.zeros(5), r"t: expected a number, one element, or shape \(6,\)"),
])  # fmt: skip
def test_time_outside_the_path_is_refused(t, words):
    with pytest.raises(ValueError, match=words):
        gk.FlowMatching().loss(lambda x, t: x, torch.zeros(SHAPE), t=t)
    with pytest.raises(ValueError, match=words):
        gk.FlowMatching().velocity(lambda x, t: x, torch.zeros(SHAPE), t)


@pytest.mark.parametrize("options, words", [
    ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
    ({"steps": 2, "times": [0.0, 1.0]}, "steps: expected None beside times"),
    ({"times": [0.0, 0.5, 0.4]}, "times: expected strictly increasing or strictly decreasing"),
    ({"times": [1.0, 0.0]}, "times: expected increasing times with direction='forward'"),
    ({"times": [0.0, 1.1]}, r"times: expected times from 0.0 to 1.0"),
    ({"sampler": "rk5"}, "sampler: expected one of 'euler', 'ab2', .* 'dopri5', 'sde', .* got 'rk5'"),
    ({"direction": "up"}, "direction: expected one of 'forward', 'backward'"),
    ({"direction": "backward"}, "x1: expected the initial state of direction='backward'"),
    ({"x1": torch.zeros(SHAPE)}, "x1: expected None with direction='forward'"),
    ({"direction": "backward", "x0": torch.zeros(SHAPE)}, "x0: expected None with direction='backward'"),
])  # fmt: skip
def test_bad_argument_of_sample_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.FlowMatching().sample(lambda x, t: x, SHAPE, **options)
