"""BrownianNoise: variance, independence and sums of increments; the strong order of stochastic samplers along it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from analytic import PathNetwork, gaussian
from test_solvers import even_grid

import genkern as gk
from genkern import paths
from genkern.brownian import difference, mix64, weights_of
from genkern.noise import Noise, as_int64
from genkern.reference.noise import _mix64
from genkern.samplers import DPMSolverSDE, EDMHeun, EulerAncestral, OnPath

F64 = torch.float64
TIMES = [0.0, 1e-9, 4e-5, 3e-4, 0.01, 0.2, 0.5, 1.0, 1.0 + 1e-3, 3.7, 60.0, 9999.0]


def product(one, other):
    """The covariance of two sums of independent normals."""
    return sum(c * other.get(node, 0.0) for node, c in one.items())


# The path, by its weights: no draws, no tolerance of statistics


@pytest.mark.parametrize("a, b", list(itertools.combinations(TIMES, 2)))
def test_an_increment_has_the_variance_of_its_length(a, b):
    weights = difference(a, b)
    assert abs(product(weights, weights) - (b - a)) <= 2.0**-24 * (a + b) + 1e-15 * b


def test_increments_that_do_not_overlap_are_independent():
    steps = [difference(a, b) for a, b in itertools.pairwise(TIMES)]
    for (i, one), (j, other) in itertools.combinations(enumerate(steps), 2):
        assert abs(product(one, other)) <= 2.0**-23 * math.sqrt(TIMES[i + 1] * TIMES[j + 1])


def test_the_covariance_of_two_times_is_the_earlier():
    rng = np.random.default_rng(0)
    for a, b in np.exp(rng.uniform(-10, 9, (60, 2))):
        assert product(weights_of(a), weights_of(b)) == pytest.approx(min(a, b), rel=1e-6)


def test_increments_add_up():
    for a, b, c in itertools.combinations(TIMES, 3):
        whole, first, second = difference(a, c), difference(a, b), difference(b, c)
        for node in whole.keys() | first.keys() | second.keys():
            parts = first.get(node, 0.0) + second.get(node, 0.0)
            assert parts == pytest.approx(whole.get(node, 0.0), abs=1e-13 * math.sqrt(c))


def test_folding_of_the_stream_is_the_keys():
    for x in (0, 1, 77, 0x0123456789ABCDEF, (1 << 64) - 1):
        assert as_int64(mix64(x)) == int(_mix64(torch.tensor(as_int64(x))))


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-7, 1e-8, 1e-12])
def test_normals_have_variance_one_however_close_the_times(gap, monkeypatch):
    seen = {}
    monkeypatch.setattr(gk.BrownianNoise, "_sum", lambda self, weights, *others: seen.update(weights))
    gk.BrownianNoise(1).normal(1.7, 1.7 * (1 + gap), (2,))
    assert product(seen, seen) == pytest.approx(1.0, rel=1e-12)


# The path, drawn


def test_increments_add_up_across_grids(device):
    brownian, shape = gk.BrownianNoise(3), (4, 5)
    grid = np.geomspace(0.01, 50.0, 9)
    steps = [brownian.increment(a, b, shape, device=device, dtype=F64) for a, b in itertools.pairwise(grid)]
    torch.testing.assert_close(sum(steps), brownian.increment(grid[0], grid[-1], shape, device=device, dtype=F64))
    torch.testing.assert_close(steps[0], -brownian.increment(grid[1], grid[0], shape, device=device, dtype=F64))


def test_drawn_increments_have_their_moments():
    brownian, n = gk.BrownianNoise(3), 40_000
    one, other = (brownian.normal(a, b, (n, 1), dtype=F64) for a, b in ((0.1, 0.7), (0.7, 30.0)))
    error = 4 / math.sqrt(n)
    for z in (one, other):
        assert abs(float(z.mean())) < error
        assert float(z.var()) == pytest.approx(1.0, abs=error * math.sqrt(2))
        assert float((z**4).mean()) == pytest.approx(3.0, abs=error * math.sqrt(96))
    assert abs(float((one * other).mean())) < error


def test_a_path_follows_its_seed_its_stream_and_its_sample_ids():
    def w(noise):
        return gk.BrownianNoise(noise).increment(0.3, 2.0, (4, 3))

    whole = w(Noise(3))
    assert torch.equal(gk.BrownianNoise(3).increment(0.3, 2.0, (4, 3)), whole)
    assert torch.equal(gk.BrownianNoise(Noise(3, sample_ids=[2, 0])).increment(0.3, 2.0, (2, 3)), whole[[2, 0]])
    for other in (Noise(4), Noise(3, stream=1)):
        assert not torch.equal(w(other), whole)


# Samplers along the path

VP = paths.LinearVP()


def run(sampler, network, n, brownian, count=256, **options):
    """From even steps in log(alpha / sigma), all runs of one start and one path."""
    diffusion = gk.Diffusion(VP, prediction="sample")
    grid = even_grid(VP, 1.0, 0.05, n)
    times = grid[:-1]
    start = torch.randn(count, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    _, trajectory = diffusion.sample(
        network, noise=start, timesteps=np.append(times, grid[-1]), sampler=sampler, step_noise=brownian, dtype=F64,
        return_trajectory=True, **options,
    )  # fmt: skip
    return trajectory[-2]  # at the grid's last time, before the step to the data


@pytest.mark.parametrize("sampler", [DPMSolverSDE(1, False), EulerAncestral(1.0)], ids=["sde", "ancestral"])
def test_with_constant_data_every_grid_ends_at_the_same_state_of_the_path(sampler):
    """The noise integral of the reverse-time SDE is alpha / SNR times W, whatever the steps."""
    brownian = gk.BrownianNoise(5)
    ends = [run(sampler, lambda x, t: torch.full_like(x, 0.4), n, brownian, 16) for n in (3, 7, 24)]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-6, atol=1e-6)


STD = 0.5  # of Gaussian data, whose perfect network is linear: E[y | x] = alpha STD^2 / (alpha^2 STD^2 + sigma^2) x
SDE = {"dpmpp_1_sde": DPMSolverSDE(1, False), "dpmpp_2m_sde": DPMSolverSDE(2, False), "ancestral": EulerAncestral(1.0)}


def end_of(sampler, n, fine):
    """The end of n steps as weights of the start and of the increments of `fine` steps, scaled to variance 1, by the
    rows alone."""
    grid, clock = even_grid(VP, 1.0, 0.05, n), np.array([VP.snr(t) for t in even_grid(VP, 1.0, 0.05, fine)])
    lengths, each = np.diff(clock), fine // n
    x, memory = np.eye(1, fine + 1)[0], {}
    for k, (stage, t) in enumerate(zip(sampler.stages(OnPath(VP, "sample"), grid), grid, strict=False)):
        alpha, sigma = VP.alpha(t), VP.sigma(t)
        y = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x
        z, part = np.zeros(fine + 1), slice(k * each, (k + 1) * each)
        z[1:][part] = np.sqrt(lengths[part] / lengths[part].sum())
        new = stage.out.y * y + stage.out.x * x + stage.out.z * z
        new = new + sum(c * memory[slot] for c, slot in zip(stage.out.h, stage.reads, strict=True))
        memory |= {slot: out.y * y for slot, out in stage.keeps}
        x = new
    return x


def strong_distance(sampler, n):
    """Root mean square distance of the ends of n and 2n steps along one Brownian path, exactly."""
    return float(np.linalg.norm(end_of(sampler, n, 2 * n) - end_of(sampler, 2 * n, 2 * n)))


@pytest.mark.parametrize("sampler", SDE.values(), ids=SDE)
def test_strong_order_one_on_gaussian_data(sampler):
    assert math.log2(strong_distance(sampler, 200) / strong_distance(sampler, 400)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("sampler", SDE.values(), ids=SDE)
def test_drawn_paths_have_the_exact_strong_distance(sampler):
    network, brownian = PathNetwork(gaussian(0.0, STD), VP, "sample"), gk.BrownianNoise(7)
    found = float((run(sampler, network, 16, brownian) - run(sampler, network, 32, brownian)).square().mean().sqrt())
    assert found == pytest.approx(strong_distance(sampler, 16), rel=4 / math.sqrt(2 * 512))  # four standard errors


def test_without_one_path_runs_with_other_steps_stay_apart():
    network = PathNetwork(gaussian(0.3, 0.5), VP, "sample")
    ends = [run(DPMSolverSDE(1, False), network, n, gk.BrownianNoise(n)) for n in (16, 32)]
    assert float((ends[0] - ends[1]).square().mean().sqrt()) > 0.3


def test_splitting_the_batch_leaves_the_path():
    network = PathNetwork(gaussian(0.3, 0.5), VP, "sample")
    whole = run(DPMSolverSDE(1, False), network, 6, gk.BrownianNoise(7), 5)
    assert torch.equal(run(DPMSolverSDE(1, False), network, 6, gk.BrownianNoise(7), 5, batch_size=2), whole)


def test_the_step_to_clean_data_takes_noise_of_its_own():
    diffusion, x = gk.Diffusion(), torch.zeros(3, 2)
    options = {"noise": x, "timesteps": [500, 0], "sampler": "ddpm", "final_sigma": 0.1}
    first, second = (diffusion.sample(lambda x, t: x, step_noise=gk.BrownianNoise(seed), **options) for seed in (1, 2))
    assert not torch.equal(first, second)
    plain = diffusion.sample(lambda x, t: x, step_noise=gk.BrownianNoise(1), **(options | {"final_sigma": 0.0}))
    z = gk.ops.randn((3, 2), noise=Noise(1, draw=(2 << 24) | 1))
    torch.testing.assert_close(first - plain, 0.1 * z, rtol=0, atol=1e-5 * float(plain.abs().max() + 1))


def test_churn_along_a_path_is_refused():
    options = {"noise": torch.zeros(3, 2), "timesteps": [500, 200], "step_noise": gk.BrownianNoise(1)}
    with pytest.raises(ValueError, match="step_noise: expected no BrownianNoise with s_churn > 0"):
        gk.Diffusion().sample(lambda x, t: x, sampler=EDMHeun(s_churn=1.0), **options)
    gk.Diffusion().sample(lambda x, t: x, sampler=EDMHeun(), **options)


@pytest.mark.parametrize("make, error, words", [
    (lambda: gk.BrownianNoise(-1), ValueError, "seed: expected an integer from 0"),
    (lambda: gk.BrownianNoise(Noise(torch.tensor([1]))), TypeError, "noise: expected a seed and a stream on the host"),
    (lambda: gk.BrownianNoise(1).increment(-1.0, 2.0, (2,)), ValueError, "tau: expected a number from 0 to"),
    (lambda: gk.BrownianNoise(1).increment(0.0, 1e17, (2,)), ValueError, "tau: expected a number from 0 to"),
    (lambda: gk.BrownianNoise(1).normal(2.0, 2.0, (2,)), ValueError, "b: expected another time than a, got 2.0"),
])  # fmt: skip
def test_bad_argument_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
