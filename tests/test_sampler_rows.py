"""The tables of rows of the samplers: each against its equation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import genkern as gk
from genkern import grids
from genkern.samplers import DDIM, DDPM, Euler, Heun, Multistep, OnPath, Preconditioned, table

SHAPE = (5, 3, 4)


def rotating(x, t):
    return torch.sin(x.flip(-1) + t.reshape(-1, 1, 1).to(x.dtype) * 0.001)


def test_ddim_at_eta_one_has_the_ddpm_posterior_mean_and_variance():
    diffusion = gk.Diffusion()
    a = np.append(1.0, diffusion.alphas_cumprod)  # the seed's alpha_0 .. alpha_T
    stages = DDPM().stages(OnPath(diffusion.path, "sample"), np.arange(999, -2, -1).astype(float))
    for stage, t in zip(stages, range(1000, 0, -1), strict=True):
        step = a[t] / a[t - 1]
        assert stage.out.y == pytest.approx(np.sqrt(a[t - 1]) * (1 - step) / (1 - a[t]), abs=1e-12)
        assert stage.out.x == pytest.approx(np.sqrt(step) * (1 - a[t - 1]) / (1 - a[t]), abs=1e-12)
        assert stage.out.z**2 == pytest.approx(diffusion.posterior_variance(t - 1), abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_steps_keep_the_marginals_of_equation_13_7(eta):
    """If x_t = alpha_t y + sigma_t e then x_s has data scale alpha_s and noise variance sigma_s^2."""
    path = gk.Diffusion().path
    grid = np.array([999.0, 700.0, 300.0, 20.0, 0.0, -1.0])
    for stage, t, s in zip(DDIM(eta).stages(OnPath(path, "sample"), grid), grid[:-1], grid[1:], strict=True):
        assert stage.out.y + stage.out.x * path.alpha(t) == pytest.approx(path.alpha(s), abs=1e-12)
        variance = (stage.out.x * path.sigma(t)) ** 2 + stage.out.z**2
        assert variance == pytest.approx(path.sigma(s) ** 2, abs=1e-12)


def test_ddim_step_is_equation_13_13():
    diffusion = gk.Diffusion()
    x, eps, z = torch.randn(3, *SHAPE, dtype=torch.float64)
    got = diffusion.sample(
        lambda x, t: eps, noise=x, timesteps=[600, 400], eta=0.5, dtype=torch.float64, return_trajectory=True,
        step_noise=torch.stack([z, z]),
    )[1][1]  # fmt: skip
    a_t, a_s = diffusion.alphas_cumprod[[600, 400]]
    d = 0.5 * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
    f = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    torch.testing.assert_close(got, math.sqrt(a_s) * f + math.sqrt(1 - a_s - d**2) * eps + d * z)


def test_last_diffusion_step_is_the_prediction_plus_the_given_noise():
    diffusion = gk.Diffusion()
    x, eps, z = torch.randn(3, *SHAPE, dtype=torch.float64)
    options = {"noise": x, "timesteps": [0], "dtype": torch.float64, "step_noise": z[None]}
    a = diffusion.alphas_cumprod[0]
    f = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    torch.testing.assert_close(diffusion.sample(lambda x, t: eps, **options), f)
    torch.testing.assert_close(diffusion.sample(lambda x, t: eps, final_sigma=0.1, **options), f + 0.1 * z)


def test_clamped_prediction_stands_for_the_data_in_the_posterior():
    diffusion = gk.Diffusion()
    x, m = torch.randn(2, *SHAPE, dtype=torch.float64)
    got = diffusion.sample(
        lambda x, t: m, noise=x, timesteps=[600, 400], clip=(-0.2, 0.3), dtype=torch.float64, return_trajectory=True
    )[1][1]
    a_t, a_s = diffusion.alphas_cumprod[[600, 400]]
    y = ((x - math.sqrt(1 - a_t) * m) / math.sqrt(a_t)).clamp(-0.2, 0.3)
    torch.testing.assert_close(got, math.sqrt(a_s) * y + math.sqrt((1 - a_s) / (1 - a_t)) * (x - math.sqrt(a_t) * y))


def test_clipped_samples_lie_in_the_range():
    x = gk.Diffusion().sample(lambda x, t: 3 * x, SHAPE, steps=5, seed=0, clip=0.5)
    assert x.abs().max() == 0.5


def test_heun_ends_with_an_euler_step_where_the_slope_is_not_defined():
    teacher = Preconditioned(0.5)
    stages = Heun().stages(teacher, np.array([80.0, 1.0, 0.0]))
    assert [stage.time for stage in stages] == [None, 1.0, 0.0]
    assert stages[-1].out.x == pytest.approx(teacher.c_skip(1.0), abs=1e-15)  # D itself
    assert stages[-1].out.m == pytest.approx(teacher.c_out(1.0), abs=1e-15)


def test_multistep_renoises_up_to_the_next_time():
    f = Preconditioned(0.5, 0.002)
    stages = Multistep(0.002).stages(f, np.array([80.0, 1.0, 0.002]))
    assert [stage.out.z for stage in stages] == pytest.approx([math.sqrt(1.0 - 0.002**2), 0.0])


def test_samplers_hold_no_state_of_a_run():
    sampler = Heun()
    before = dict(vars(sampler))
    gk.RectifiedFlow().sample(rotating, SHAPE, steps=2, sampler=sampler)
    assert vars(sampler) == before
    same = gk.RectifiedFlow().sample(rotating, SHAPE, steps=2, sampler=sampler, seed=0)
    assert torch.equal(same, gk.RectifiedFlow().sample(rotating, SHAPE, steps=2, sampler="heun", seed=0))


def test_a_sampler_of_the_callers_own_is_walked():
    class Midpoint:
        order = 2

        def stages(self, network, grid):
            from genkern.rows import Out
            from genkern.samplers.table import stage

            table = []
            for k, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
                half, v = (t + s) / 2, network.slope(t)
                table.append(stage(network, t, Out(x=1 + (half - t) * v.x, m=(half - t) * v.m), step=k, time=None))
                v = network.slope(half)
                table.append(stage(network, half, Out(h=(1.0,), x=(s - t) * v.x, m=(s - t) * v.m), step=k, time=s))
            return table

    x0 = torch.ones(1, 1, dtype=torch.float64)
    x = gk.RectifiedFlow().sample(lambda x, t: -x, x0=x0, steps=100, sampler=Midpoint(), dtype=torch.float64)
    assert float(x) == pytest.approx(math.exp(-1.0), abs=1e-5)


@pytest.mark.parametrize("eta", [-0.1, math.nan])
def test_eta_outside_its_range_is_refused(eta):
    with pytest.raises(ValueError, match="eta: expected a finite number >= 0"):
        DDIM(eta)


def test_impossible_eta_is_refused_with_the_largest_possible():
    with pytest.raises(ValueError, match="eta: expected at most .* got 50"):
        gk.Diffusion().sample(rotating, SHAPE, steps=10, eta=50.0)


def test_wrong_sigma_data_is_refused():
    with pytest.raises(ValueError, match="sigma_data: expected a number > 0"):
        Preconditioned(0.0)
    with pytest.raises(ValueError, match="epsilon"):
        Multistep(-1.0)


def test_euler_has_one_stage_a_step_and_heun_two():
    network = OnPath(gk.RectifiedFlow().path, "velocity")
    assert len(Euler().stages(network, grids.uniform(6))) == 6
    assert len(Heun().stages(network, grids.uniform(6))) == 12


# Tables are kept


def tabulated(monkeypatch, cls):
    """How often the class tabulates, from now on."""
    made, stages = [], cls.stages
    monkeypatch.setattr(cls, "stages", lambda *a: made.append(1) or stages(*a))
    return made


def test_stages_are_tabulated_once_for_a_path_and_a_grid(monkeypatch):
    made, method = tabulated(monkeypatch, DDIM), gk.Diffusion()
    for _ in range(3):
        method.sample(lambda x, t: x, (1, 2), steps=4)
    assert len(made) == 1
    for more in ({"eta": 0.5}, {"steps": 5}, {"spacing": "leading"}, {"round_times": False}):
        method.sample(lambda x, t: x, (1, 2), **{"steps": 4, **more})
    assert len(made) == 5
    gk.Diffusion().sample(lambda x, t: x, (1, 2), steps=4)
    gk.Diffusion(prediction="v").sample(lambda x, t: x, (1, 2), steps=4)
    assert len(made) == 7


def test_a_path_that_has_been_set_anew_is_tabulated_anew():
    flow, method = gk.FlowMatching(), gk.Diffusion()
    for change in (
        lambda: setattr(method, "prediction", "v"),
        lambda: setattr(method, "path", gk.paths.DiscreteVP(method.alphas_cumprod**2)),
        lambda: setattr(flow.path, "sigma_min", 0.5),
    ):
        for one in (flow, method):
            one.sample(lambda x, t: x.sin(), (2, 2), steps=3, seed=0)
        change()
    fresh = gk.Diffusion(alphas_cumprod=method.alphas_cumprod, prediction="v")
    wanted = fresh.sample(lambda x, t: x.sin(), (2, 2), steps=3, seed=0)
    assert torch.equal(method.sample(lambda x, t: x.sin(), (2, 2), steps=3, seed=0), wanted)


def test_samplers_of_others_are_asked_every_time(monkeypatch):
    class Mine(Euler):
        asked = 0

        def stages(self, network, grid):
            Mine.asked += 1
            return super().stages(network, grid)

    flow = gk.FlowMatching()
    for _ in range(2):
        flow.sample(lambda x, t: x, (1, 2), steps=2, sampler=Mine())
    assert Mine.asked == 2


def test_few_tables_are_kept():
    flow = gk.FlowMatching()
    for steps in range(1, 40):
        flow.sample(lambda x, t: x, (1, 2), steps=steps)
    assert len(table._tables[flow.path]) == table.KEPT
