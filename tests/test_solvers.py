"""DPM-Solver++, its SDE form, UniPC, the ancestral sampler and DDIM inversion: orders, equations, memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from analytic import PathNetwork, mixture

import genkern as gk
from genkern import eager, paths
from genkern.rows import Out
from genkern.samplers import (
    DDIM,
    DDPM,
    DPMSolver,
    DPMSolverSDE,
    EulerAncestral,
    OnPath,
    UniPC,
    loop,
    passes,
)
from genkern.samplers.dpm_solver import orders
from genkern.samplers.log_snr import phi, steps

F64 = torch.float64
SHAPE = (5, 3, 4)
SOLVERS = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_1",
    "dpmpp_2m",
    "dpmpp_3m",
    "dpmpp_1_sde",
    "dpmpp_2m_sde",
    "unipc",
)
VP = paths.LinearVP()


def even_grid(path, first, last, n, start=None):
    """n even steps in log(alpha / sigma), after one of the fraction `start` of the whole where that is given."""
    u = np.linspace(0.0, 1.0, n + 1)
    if start is not None:
        u = np.append(0.0, start + (1.0 - start) * u)
    low, high = (-math.log(path.noise_level(t)) for t in (first, last))
    return path.time_at(np.exp(-(low + (high - low) * u)))


def rotating(x, t):
    return torch.sin(x.flip(-1) + t.reshape(-1, 1, 1).to(x.dtype) * 0.001)


# Orders of convergence


@pytest.mark.parametrize("sampler, order", [
    (EulerAncestral(0.0), 1), (DPMSolver(1, False), 1), (DPMSolver(2, False), 2), (DPMSolver(3, False), 3),
    (DPMSolver(3, False, as_published=True), 2), (UniPC(1, False), 2), (UniPC(2, False), 3),
], ids=["euler", "dpmpp_1", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_published", "unipc_1", "unipc_2"])  # fmt: skip
@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
def test_order_on_a_mixture(sampler, order, prediction):
    """The start has a matching order: its first step, of order 1, has the length h^{3/2}."""
    network, data = OnPath(VP, prediction), PathNetwork(mixture(), VP, prediction)
    z = torch.randn(16, 2, dtype=F64, generator=torch.Generator().manual_seed(0))

    def run(n):
        grid = even_grid(VP, 1.0, 0.02, n, start=2.0 * n**-1.5)
        return loop.run(data, sampler.stages(network, grid), None, start=z, dtype=F64)

    coarse, middle, fine = (run(n) for n in (192, 384, 768))
    found = math.log2((coarse - middle).norm() / (middle - fine).norm())
    assert found == pytest.approx(order, abs=0.15)


def test_all_solvers_go_to_the_same_solution():
    data, diffusion = PathNetwork(mixture(), VP, "v"), gk.Diffusion(VP, prediction="v")
    ends = [
        diffusion.sample(data, (16, 2), steps=400, sampler=s, spacing="exponential", dtype=F64, seed=0)
        for s in ("dpmpp_2m", "dpmpp_3m", "unipc")
    ]
    for one, other in itertools.pairwise(ends):
        assert (one - other).abs().max() < 1e-3
    euler = diffusion.sample(data, (16, 2), steps=400, sampler="euler", spacing="exponential", dtype=F64, seed=0)
    assert (euler - ends[0]).abs().max() < 0.05


@pytest.mark.parametrize("order", [1, 2])
def test_weak_order_of_the_sde_solver_on_gaussian_data(order):
    """The perfect network of N(0, s^2) is linear, so the covariance of (state, memory) follows from the rows alone."""
    std, last = 0.5, 0.05

    def variance(n):
        grid, cov = even_grid(VP, 1.0, last, n, start=2.0 * n**-1.5), np.zeros((2, 2))
        cov[0, 0] = VP.alpha(1.0) ** 2 * std**2 + VP.sigma(1.0) ** 2
        for stage, t in zip(DPMSolverSDE(order, False).stages(OnPath(VP, "sample"), grid), grid[:-1], strict=True):
            alpha, sigma = VP.alpha(t), VP.sigma(t)
            y = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
            out = stage.out
            new = np.array([[out.y * y + out.x, sum(out.h)], [y, 0.0] if stage.keeps else [0.0, 1.0]])
            cov = new @ cov @ new.T
            cov[0, 0] += out.z**2
        return cov[0, 0]

    exact = VP.alpha(last) ** 2 * std**2 + VP.sigma(last) ** 2
    coarse, fine = (abs(variance(n) - exact) for n in (200, 400))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_samples_of_the_sde_solver_have_the_moments_of_the_mixture():
    diffusion, data, n = gk.Diffusion(), mixture(), 20_000
    x = diffusion.sample(
        PathNetwork(data, diffusion.path, "epsilon"), (n, 2), steps=60, sampler="dpmpp_2m_sde", seed=0, dtype=F64
    )
    weights = data.weights[:, None]
    mean = (weights * data.means).sum(0)
    second = (weights * (data.means**2 + data.stds[:, None] ** 2)).sum(0)
    error = 4 * float((second - mean**2).max().sqrt()) / math.sqrt(n)  # four standard errors
    assert (x.mean(0) - mean).abs().max() < 0.02 + error
    assert (x.square().mean(0) - second).abs().max() < 0.04 + 4 * error


# Equations


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("z", [-30.0, -2.0, -0.6, -0.4, -1e-3, 0.0, 0.3, 2.0])
def test_phi_functions_are_their_integrals(k, z):
    nodes, weights = np.polynomial.legendre.leggauss(60)
    theta = (nodes + 1) / 2
    integral = (weights / 2 * np.exp((1 - theta) * z) * theta ** (k - 1)).sum() / math.factorial(k - 1)
    assert phi(k, z) == pytest.approx(integral, rel=1e-12)


GRID = np.array([999.0, 700.0, 300.0, 20.0, 0.0, -1.0])


def same_rows(one, other):
    for a, b in zip(one, other, strict=True):
        for term in ("y", "x", "m", "z"):
            assert getattr(a.out, term) == pytest.approx(getattr(b.out, term), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ancestral_steps_on_a_variance_preserving_path_are_ddims(eta):
    network = OnPath(gk.Diffusion().path, "epsilon")
    same_rows(EulerAncestral(eta).stages(network, GRID), DDIM(eta).stages(network, GRID))


def test_first_order_solvers_are_ddim_and_ddpm():
    network = OnPath(gk.Diffusion().path, "epsilon")
    same_rows(DPMSolver(1).stages(network, GRID), DDIM().stages(network, GRID))
    same_rows(DPMSolverSDE(1).stages(network, GRID), DDPM().stages(network, GRID))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_ancestral_steps_on_the_exploding_path_keep_the_marginals(eta):
    path, grid = paths.VE(), np.array([80.0, 7.0, 1.0, 0.1])
    for stage, t, s in zip(EulerAncestral(eta).stages(OnPath(path, "sample"), grid), grid[:-1], grid[1:], strict=True):
        out = stage.out
        assert out.y + out.x == pytest.approx(1.0, abs=1e-12)
        assert (out.x * t) ** 2 + out.z**2 == pytest.approx(s**2, rel=1e-12)
        assert out.z == pytest.approx(min(s, eta * s * math.sqrt(t**2 - s**2) / t), rel=1e-12)


@pytest.mark.parametrize("sampler", [DPMSolver(2, False), DPMSolver(3, False), UniPC(2, False)])
def test_a_constant_prediction_is_integrated_exactly(sampler):
    """With y the same everywhere x - alpha y shrinks as sigma, whatever the order."""
    x, y = torch.randn(2, *SHAPE, dtype=F64)
    grid = even_grid(VP, 1.0, 0.1, 6)
    end = loop.run(lambda x, t: y, sampler.stages(OnPath(VP, "sample"), grid), None, start=x, dtype=F64)
    expected = VP.alpha(0.1) * y + VP.sigma(0.1) / VP.sigma(1.0) * (x - VP.alpha(1.0) * y)
    torch.testing.assert_close(end, expected, rtol=1e-10, atol=1e-10)


def polynomial_step(k, grid, y):
    """The exact end of step k from the state 1 for y a function of lambda, by quadrature; and y at the grid's times."""
    step = steps(VP, grid)[k]
    low, high = (-math.log(VP.noise_level(t)) for t in grid[k : k + 2])
    nodes, weights = np.polynomial.legendre.leggauss(30)
    u = low + (nodes + 1) / 2 * (high - low)
    integral = (weights / 2 * (high - low) * np.exp(u - high) * y(u)).sum()
    return step.decay + step.alpha_s * integral, [y(-math.log(VP.noise_level(t))) for t in grid]


def test_third_order_step_integrates_a_quadratic_prediction_exactly():
    grid, k = np.append(even_grid(VP, 1.0, 0.3, 4), [0.25, 0.1, 0.05]), 5  # uneven steps
    expected, y = polynomial_step(k, grid, lambda u: 0.4 + 0.3 * u - 0.2 * u**2)
    out = DPMSolver(3, False).stages(OnPath(VP, "sample"), grid)[k].out
    assert out.x + out.y * y[k] + out.h[0] * y[k - 1] + out.h[1] * y[k - 2] == pytest.approx(expected, rel=1e-10)


def test_corrected_state_of_unipc_integrates_a_quadratic_prediction_exactly():
    grid, k = np.append(even_grid(VP, 1.0, 0.3, 4), [0.25, 0.1, 0.05, 0.02]), 5
    expected, y = polynomial_step(k, grid, lambda u: 0.4 + 0.3 * u - 0.2 * u**2)
    out = dict(UniPC(2, False).stages(OnPath(VP, "sample"), grid)[k + 1].keeps)[0]
    assert out.h[0] + out.y * y[k + 1] + out.h[1] * y[k] + out.h[2] * y[k - 1] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count, order, final, expected", [
    (5, 3, True, [1, 2, 3, 2, 1]), (5, 3, False, [1, 2, 3, 3, 1]), (2, 3, True, [1, 1]), (1, 2, True, [1]),
    (16, 3, True, [1, 2, *[3] * 13, 1]), (14, 2, True, [1, *[2] * 12, 1]),
])  # fmt: skip
def test_orders_fall_at_the_end_of_few_steps_and_at_the_data(count, order, final, expected):
    grid = np.append(np.linspace(1.0, 0.1, count), 0.0)
    assert orders(steps(VP, grid), order, final) == expected


def test_second_order_step_with_a_clamped_history_is_the_written_out_formula():
    diffusion, lo, hi = gk.Diffusion(prediction="sample"), -0.4, 0.7
    times = [900, 600, 200, 50]
    x, outputs = torch.randn(SHAPE, dtype=F64), list(torch.randn(4, *SHAPE, dtype=F64))
    calls = iter(outputs)
    _, trajectory = diffusion.sample(
        lambda x, t: next(calls), noise=x, timesteps=times, sampler=DPMSolver(2, False), clip=(lo, hi), dtype=F64,
        return_trajectory=True,
    )  # fmt: skip
    y = [m.clamp(lo, hi) for m in outputs]
    alpha, sigma = (f(np.array([*times, -1])) for f in (diffusion.path.alpha, diffusion.path.sigma))
    lam = np.log(alpha[:-1] / sigma[:-1])
    h, before = lam[2] - lam[1], lam[1] - lam[0]
    d = y[1] + h / (2 * before) * (y[1] - y[0])
    expected = sigma[2] / sigma[1] * trajectory[1] + alpha[2] * (1 - math.exp(-h)) * d
    torch.testing.assert_close(trajectory[2], expected)
    torch.testing.assert_close(trajectory[-1], y[-1])


@pytest.mark.parametrize("sampler", [s for s in SOLVERS if s != "heun"])  # whose steps are in sigma / alpha itself
@pytest.mark.parametrize("prediction", ["v", "sample"])
def test_a_start_without_signal_is_left_by_a_finite_step(sampler, prediction):
    diffusion = gk.Diffusion(prediction=prediction, rescale_zero_snr=True)
    nearly = gk.Diffusion(alphas_cumprod=np.append(diffusion.alphas_cumprod[:-1], 1e-18), prediction=prediction)
    ends = [d.sample(rotating, SHAPE, steps=6, sampler=sampler, seed=0, dtype=F64) for d in (diffusion, nearly)]
    assert ends[0].isfinite().all()
    # With a finite first step in lambda of about 20, the slopes over it are small, not 0.
    torch.testing.assert_close(*ends, rtol=0, atol=0.2)


# Inversion


def test_encoding_and_decoding_return_to_the_input_with_an_error_of_order_one():
    diffusion = gk.Diffusion(timesteps=4096)
    data = PathNetwork(mixture(), diffusion.path, "epsilon")
    x = mixture().sample(64, seed=3)

    def error(n):
        z = diffusion.encode(data, x, steps=n, dtype=F64)
        return float((diffusion.sample(data, noise=z, steps=n, dtype=F64) - x).norm() / x.norm())

    coarse, fine = error(256), error(512)
    assert fine < 0.02
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("prediction", ["v", "sample", "score"])
def test_every_prediction_is_read_as_the_noise_at_the_later_time(prediction):
    epsilon, other = gk.Diffusion(), gk.Diffusion(prediction=prediction)

    def converted(x, t):
        return other.path.convert(rotating(x, t), x, int(t[0]), "epsilon", prediction)

    x = torch.randn(SHAPE, dtype=F64)
    expected = epsilon.encode(rotating, x, steps=7, dtype=F64)
    torch.testing.assert_close(other.encode(converted, x, steps=7, dtype=F64), expected)


def test_encoded_data_are_noise():
    diffusion, data = gk.Diffusion(), mixture()
    network = PathNetwork(data, diffusion.path, "epsilon")
    z = diffusion.encode(network, data.sample(4_000, seed=1), steps=400, dtype=F64)
    # Beside the bias of 400 steps, four standard errors of a mean and of a variance over 4,000 draws.
    assert z.mean(0).abs().max() < 0.02 + 4 / math.sqrt(4_000)
    assert (z.T.cov() - torch.eye(2)).abs().max() < 0.02 + 4 * math.sqrt(2 / 4_000)


# The loop's memory


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("guided", [False, True])
def test_keeping_a_gradient_changes_no_result(sampler, guided):
    def model(x, t, y=0.0):
        return rotating(x, t) + y

    options = {"cond": {"y": 0.1}, "uncond": {"y": 0.1}, "guidance_scale": 1.5} if guided else {}
    runs = [
        gk.Diffusion(prediction="v").sample(
            model, SHAPE, steps=6, sampler=sampler, seed=0, dtype=F64, differentiable=d, **options
        )
        for d in (False, True)
    ]
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SOLVERS)
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_memory_written_in_place_holds_the_bits_of_one_written_anew(sampler, model_dtype, device):
    def elementwise(x, t):
        return torch.sin(x + t.reshape(-1, 1).to(x.dtype) * 0.001)

    runs = [
        gk.Diffusion().sample(
            elementwise, (3, 20_011), steps=6, sampler=sampler, seed=0, device=device, model_dtype=model_dtype,
            differentiable=d,
        )
        for d in (False, True)
    ]  # fmt: skip
    assert torch.equal(*runs)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_gradient_through_the_memory_is_that_of_finite_differences(sampler):
    diffusion = gk.Diffusion(prediction="sample")
    x = torch.randn(2, 1, 2, dtype=F64, requires_grad=True)

    def end(x):
        return diffusion.sample(rotating, noise=x, steps=5, sampler=sampler, differentiable=True, dtype=F64,
                                step_noise=torch.ones(5, 2, 1, 2, dtype=F64))  # fmt: skip

    assert torch.autograd.gradcheck(end, x)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_3m", "unipc", "dpmpp_2m_sde"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_a_step(sampler, dtype, monkeypatch):
    """One more where a step writes four tensors: UniPC's state, input, prediction and corrected state."""
    count = []
    monkeypatch.setattr(eager, "face", None)  # so that every pass goes by these
    for name in ("map_rows_out", "run_numbers"):
        if hasattr(passes.functions, name):
            real = getattr(passes.functions, name)
            monkeypatch.setattr(passes.functions, name, lambda *a, _real=real: count.append(1) or _real(*a))
    gk.Diffusion().sample(rotating, SHAPE, steps=8, sampler=sampler, seed=0, model_dtype=dtype)
    split = 7 if sampler == "unipc" and dtype == torch.bfloat16 else 0  # the last step keeps nothing
    assert len(count) == 1 + 8 + split


def test_a_memory_of_the_callers_own_sampler_is_read_and_written_in_one_pass():
    class Sums:
        order = 1

        def stages(self, network, grid):
            from genkern.samplers.table import stage

            table = []
            for k, (t, s) in enumerate(itertools.pairwise(grid.tolist())):
                total = Out(x=1.0, h=(1.0,) if k else ())
                out = Out(x=2.0, h=total.h)
                table.append(stage(network, t, out, step=k, time=s, reads=(0,) if k else (), keeps=((0, total),)))
            return table

    x = gk.RectifiedFlow().sample(lambda x, t: x, x0=torch.ones(1, 2), steps=4, sampler=Sums())
    # states 1, 2, 5, 13, 34 and sums of the states before: every other Fibonacci number
    assert x.tolist() == [[34.0, 34.0]]


# Bad input


@pytest.mark.parametrize("make, words", [
    (lambda: DPMSolver(4), "order: expected an integer from 1 to 3, got 4"),
    (lambda: DPMSolver(0), "order: expected an integer from 1 to 3, got 0"),
    (lambda: DPMSolverSDE(3), "order: expected an integer from 1 to 2, got 3"),
    (lambda: UniPC(3), "order: expected an integer from 1 to 2, got 3"),
    (lambda: EulerAncestral(-0.1), "eta: expected a finite number >= 0"),
])  # fmt: skip
def test_bad_argument_of_a_solver_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("options, words", [
    ({"sampler": "dpmpp_2m", "eta": 1.0}, "eta: expected None with sampler='dpmpp_2m', got 1.0"),
    ({"sampler": DDIM(), "eta": 1.0}, "eta: expected None with sampler=DDIM, got 1.0"),
    ({"sampler": "unipc", "final_sigma": 0.1}, "final_sigma: expected 0 with sampler='unipc', got 0.1"),
    ({"sampler": "dpmpp_4m"}, "sampler: expected one of 'ddim', 'ddpm', .*'unipc', got 'dpmpp_4m'"),
])  # fmt: skip
def test_option_that_a_sampler_does_not_have_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        gk.Diffusion().sample(rotating, SHAPE, steps=3, **options)
