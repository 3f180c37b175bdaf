"""Post-hoc reconstruction of power-function averages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from genkern.training import EMA, EMASet, PowerDecay, reconstruct
from genkern.training.posthoc import _product, coefficients


@pytest.mark.parametrize("t_a, t_b", [(3.0, 7.0), (7.0, 3.0), (5.0, 5.0)])
@pytest.mark.parametrize("g_a, g_b", [(6.94, 16.97), (0.0, 2.5)])
def test_products_of_profiles_are_their_integrals(t_a, t_b, g_a, g_b):
    def p(tau, t, g):
        return (g + 1) * tau**g / t ** (g + 1)

    expected = integrate.quad(lambda tau: p(tau, t_a, g_a) * p(tau, t_b, g_b), 0, min(t_a, t_b))[0]
    assert _product(t_a, g_a, t_b, g_b) == pytest.approx(expected, rel=1e-8)


def test_coefficients_are_the_minimum_of_the_distance_of_profiles():
    """Against least squares of the profiles on a fine grid, before both are divided by their sum."""
    stored = [(t, PowerDecay(s)) for t in (400, 700, 1000) for s in (0.05, 0.1)]
    wanted, tau = PowerDecay(0.08), (np.arange(200_000) + 0.5) / 200_000 * 900

    def profile(t, g):
        return np.where(tau <= t, (g + 1) * (tau / t) ** g / t, 0.0)

    columns = np.stack([profile(t, p.gamma) for t, p in stored if t <= 900], axis=1)
    x = np.linalg.lstsq(columns, profile(900, wanted.gamma), rcond=None)[0]
    found = coefficients(stored, 900, wanted)
    np.testing.assert_allclose(found[:4], x / x.sum(), rtol=1e-3, atol=1e-4)
    assert (found[4:] == 0.0).all() and found.sum() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.06, 0.075, 0.1, 0.15])
def test_weights_of_a_reconstructed_average_are_those_of_a_tracked_one(sigma_rel):
    """Two lengths stored every 64 steps of 1024: within 2% of its largest weight, in all weights."""
    stored = [(t, PowerDecay(s)) for t in range(64, 1025, 64) for s in (0.05, 0.1)]
    found = np.zeros(1024)
    for x, (t, power) in zip(coefficients(stored, 1024, PowerDecay(sigma_rel)), stored, strict=True):
        found[:t] += x * power.weights(t)
    wanted = PowerDecay(sigma_rel).weights(1024)
    assert np.abs(found - wanted).max() < 0.02 * wanted.max()


def walked(steps, every, decays):
    """States of a set along a random walk of a network, the network, and averages of every step's parameters."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    emas, states = EMASet(net, decays), []
    tracked = EMASet(net, (PowerDecay(0.07),))
    for k in range(1, steps + 1):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn(p.shape))
            net[1].running_mean.fill_(k)
        emas.update(net)
        tracked.update(net)
        if k % every == 0:
            states.append(emas.state_dict())
    return net, states, tracked


def test_reconstructed_parameters_are_those_of_a_tracked_average():
    net, states, tracked = walked(256, 16, (PowerDecay(0.05), 0.9, PowerDecay(0.1)))
    average = EMA(net)
    average.load_state_dict(reconstruct(states, 0.07))
    spread = float(torch.cat([p.detach().flatten() for p in net.parameters()]).std())
    for found, wanted in zip(average.module.parameters(), tracked.averages[0].module.parameters(), strict=True):
        assert (found - wanted).abs().max() < 0.02 * spread
    assert average.decay == PowerDecay(0.07).decay(256)
    early = reconstruct(states[::-1], 0.07, step=200)
    assert float(early["buffers"]["1.running_mean"][0]) == 192.0


def test_what_is_stored_is_found_again():
    _, states, _ = walked(96, 32, (PowerDecay(0.05), PowerDecay(0.1)))
    for k, sigma in enumerate((0.05, 0.1)):
        found = reconstruct(states, sigma, step=64)["parameters"]
        for name, wanted in states[1]["averages"][k]["parameters"].items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("call, words", [
    (lambda s: reconstruct([], 0.1), "states: expected at least one, got none"),
    (lambda s: reconstruct(s, 0.4), "sigma_rel: expected a number in"),
    (lambda s: reconstruct(s, 0.1, step=7), r"step: expected averages stored at 7 or before it, got \[8, 16\]"),
    (lambda s: reconstruct([{**s[0], "decays": [("decay", 0.9)]}], 0.1), "states: expected averages of a PowerDecay"),
    (lambda s: reconstruct([s[0], other()], 0.1), "states: expected the same parameters in all"),
])  # fmt: skip
def test_bad_argument_is_named(call, words):
    _, states, _ = walked(16, 8, (PowerDecay(0.1),))
    with pytest.raises(ValueError, match=words):
        call(states)


def other():
    net = nn.Linear(2, 2)
    emas = EMASet(net, (PowerDecay(0.1),))
    emas.update(net)
    return emas.state_dict()
