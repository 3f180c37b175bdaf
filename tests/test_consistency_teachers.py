"""Teachers from other paths: on Gaussian data all perfect networks say the same."""

from __future__ import annotations

import pytest
import torch
from analytic import DenoiserNetwork, PathNetwork, gaussian
from consistency_cases import F64, SHAPE, Net, gradient

import genkern as gk
from genkern.methods import PathTeacher
from genkern.noise import Noise

METHODS = {
    "flow matching": gk.FlowMatching(),
    "rectified flow": gk.RectifiedFlow(),
    "continuous, epsilon": gk.Diffusion("continuous_vp"),
    "continuous, v": gk.Diffusion("cosine_log_snr", prediction="v"),
    "discrete, sample": gk.Diffusion("scaled_linear", prediction="sample"),
}


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2s"])
@pytest.mark.parametrize("name", METHODS)
def test_perfect_teachers_of_all_paths_give_one_loss_and_gradient(name, solver):
    """Noise levels from 0.05 to 10, which every one of these paths has."""
    data, method, student = gaussian(0.3, 0.8), METHODS[name], Net()
    consistency = gk.Consistency(sigma_min=0.05, sigma_max=10.0)
    network = PathNetwork(data, method.path, getattr(method, "prediction", "velocity"))
    options = {"n": 5, "n_steps": 12, "noise": Noise(3), "solver": solver}
    x = data.sample(6, seed=0)
    own = consistency.loss(student, x, teacher=DenoiserNetwork(data), **options)
    other = consistency.loss(student, x, teacher=PathTeacher(network, method, round_times=False), **options)
    assert network.calls == (1 if solver == "euler" else 2)
    torch.testing.assert_close(other, own, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gradient(other, student), gradient(own, student), rtol=1e-8, atol=1e-12)


def test_network_of_a_discrete_path_is_told_the_nearest_timestep():
    method, seen = METHODS["discrete, sample"], []

    def network(x, t):
        seen.append(t)
        return x

    consistency = gk.Consistency(sigma_min=0.05, sigma_max=10.0)
    n = torch.tensor([0, 1, 2, 5, 8, 9])
    x = torch.randn(SHAPE, dtype=F64)
    consistency.loss(Net(), x, teacher=PathTeacher(network, method), n=n, n_steps=11)
    times = consistency.times(11)
    for t, levels in zip(seen, (times[n + 1], times[n]), strict=True):
        assert t.dtype == torch.int64
        assert (t.numpy() == method.path.time_at(levels).round()).all()
    consistency.loss(Net(), x, teacher=PathTeacher(network, method, round_times=False), n=n, n_steps=11)
    torch.testing.assert_close(seen[2], torch.tensor(method.path.time_at(times[n + 1])))


def called(*args):
    raise AssertionError("called")


@pytest.mark.parametrize("teacher, error, words", [
    (gk.FlowMatching(), TypeError, "teacher: expected a network F or a methods.PathTeacher, got FlowMatching"),
    (PathTeacher(called, gk.Diffusion()), ValueError,
     "teacher: expected a path with the noise levels sigma / alpha from 0.002 to .*, epsilon to T, got DiscreteVP"),
    (PathTeacher(called, gk.FlowMatching(sigma_min=0.1)), ValueError, "teacher: expected a path with .* got CondOT"),
])  # fmt: skip
def test_teacher_of_another_path_is_refused_before_anything_is_drawn_or_called(teacher, error, words):
    before = torch.get_rng_state()
    with pytest.raises(error, match=words):
        gk.Consistency().loss(called, torch.zeros(SHAPE), teacher=teacher)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("network, method, words", [
    (3, gk.FlowMatching(), "network: expected a callable, got int"),
    (called, gk.Consistency(), "method: expected one with a path, as gk.Diffusion has, got Consistency"),
])  # fmt: skip
def test_bad_argument_of_a_path_teacher_is_named(network, method, words):
    with pytest.raises(TypeError, match=words):
        PathTeacher(network, method)
