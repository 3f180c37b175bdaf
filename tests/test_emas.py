"""Several averages at once, and the power-function average against the closed form of its weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn
from watching import Calls

import genkern as gk
from genkern.training import EMASet, PowerDecay

SIGMAS = [0.01, 0.05, 0.1, 0.25, 12**-0.5]


def walk(net):
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape))


@pytest.mark.parametrize("sigma_rel", SIGMAS)
def test_gamma_has_the_relative_length(sigma_rel):
    """The standard deviation of the density (gamma + 1) tau^gamma on [0, 1]."""
    g = PowerDecay(sigma_rel).gamma
    moments = [integrate.quad(lambda tau, k=k: (g + 1) * tau ** (g + k), 0, 1)[0] for k in (1, 2)]
    assert math.sqrt(moments[1] - moments[0] ** 2) == pytest.approx(sigma_rel, rel=1e-6)


def test_gamma_of_published_lengths():
    """arXiv:2312.02696, section 3.1: sigma_rel of 0.05 and 0.10 have gamma of about 16.97 and 6.94."""
    assert PowerDecay(0.05).gamma == pytest.approx(16.97, abs=0.005)
    assert PowerDecay(0.10).gamma == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", SIGMAS)
def test_weights_are_the_products_of_the_decays(sigma_rel):
    power, steps = PowerDecay(sigma_rel), 40
    decays = [power.decay(t) for t in range(1, steps + 1)]
    products = [(1 - decays[i]) * math.prod(decays[i + 1 :]) for i in range(steps)]
    np.testing.assert_allclose(power.weights(steps), products, rtol=1e-9, atol=1e-300)
    assert power.weights(steps).sum() == pytest.approx(1.0, rel=1e-14)


def test_all_steps_weigh_alike_in_the_longest_average():
    np.testing.assert_allclose(PowerDecay(12**-0.5).weights(10), np.full(10, 0.1), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_averages_have_the_closed_forms_weights(dtype):
    net, steps = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype), 30
    start = [p.detach().double().clone() for p in net.parameters()]
    emas = EMASet(net, (PowerDecay(0.05), 0.9, PowerDecay(0.2)))
    seen = []
    for _ in range(steps):
        walk(net)
        emas.update(net)
        seen.append([p.detach().double().clone() for p in net.parameters()])
    constant = np.array([0.9**steps, *(0.1 * 0.9 ** (steps - i) for i in range(1, steps + 1))])
    for ema, w in zip(
        emas.averages,
        ([0.0, *PowerDecay(0.05).weights(steps)], constant, [0.0, *PowerDecay(0.2).weights(steps)]),
        strict=True,
    ):
        got = list(ema.state_dict()["parameters"].values())
        for k, average in enumerate(got):
            expected = sum(float(c) * p[k] for c, p in zip(w, [start, *seen], strict=True))
            assert average.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            rtol = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(average.double(), expected, rtol=rtol, atol=rtol)
            torch.testing.assert_close(list(ema.module.parameters())[k], expected.to(dtype))


def test_set_of_constant_decays_is_as_many_single_averages():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    decays = (0.5, 0.99)
    emas, single = EMASet(net, decays), [gk.training.EMA(net, d) for d in decays]
    for _ in range(4):
        walk(net)
        net[1].running_mean.add_(1.0)
        emas.update(net)
        for ema in single:
            ema.update(net)
    for a, b in zip(emas.averages, single, strict=True):
        for x, y in zip(a.module.state_dict().values(), b.module.state_dict().values(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype, launches", [
    (torch.float32, ["_foreach_lerp_"]),
    (torch.bfloat16, ["_foreach_copy_", "_foreach_lerp_", "_foreach_copy_"]),
])  # fmt: skip
def test_update_of_three_averages_is_one_multi_tensor_call_and_the_casts(dtype, launches):
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20))).to(dtype)
    emas = EMASet(net, (0.9, 0.99, PowerDecay(0.1)))
    with Calls() as calls:
        emas.update(net)
    assert [name for name in calls.names if name not in ("detach", "empty_like")] == launches


def test_state_is_restored_and_goes_on_as_before():
    net = nn.Linear(2, 2)
    emas, other = (EMASet(net, (0.9, PowerDecay(0.1))) for _ in range(2))
    walk(net)
    emas.update(net)
    other.load_state_dict(emas.state_dict())
    walk(net)
    for each in (emas, other):
        each.update(net)
    assert emas.steps == other.steps == 2
    for a, b in zip(emas.averages, other.averages, strict=True):
        assert torch.equal(a.module.weight, b.module.weight)


def test_refused_model_or_state_leaves_all_as_it_was():
    net = nn.Linear(2, 2)
    emas = EMASet(net, (0.9, PowerDecay(0.1)))
    before = [e.module.weight.clone() for e in emas.averages]
    with pytest.raises(ValueError, match="model: expected the parameters of the averaged model"):
        emas.update(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="state: expected the decays"):
        emas.load_state_dict(EMASet(net, (0.9, PowerDecay(0.2))).state_dict())
    state = EMASet(nn.Linear(2, 2), (0.9, PowerDecay(0.1))).state_dict()
    state["averages"][1] = EMASet(nn.Linear(3, 2), (0.9,)).averages[0].state_dict()
    with pytest.raises(ValueError, match="state: expected the parameters of the averaged model"):
        emas.load_state_dict(state)
    assert emas.steps == 0
    assert all(torch.equal(e.module.weight, w) for e, w in zip(emas.averages, before, strict=True))


@pytest.mark.parametrize("call, words", [
    (lambda: PowerDecay(0.0), r"sigma_rel: expected a number in \(0, 12\^\(-1/2\)\], got 0.0"),
    (lambda: PowerDecay(0.3), "sigma_rel: expected a number in"),
    (lambda: PowerDecay(0.1).decay(0), "step: expected an integer >= 1, got 0"),
    (lambda: EMASet(nn.Linear(2, 2), ()), "decays: expected at least one, got none"),
    (lambda: EMASet(nn.Linear(2, 2), (1.0,)), r"decay: expected a number in \[0, 1\), got 1.0"),
])  # fmt: skip
def test_bad_argument_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
