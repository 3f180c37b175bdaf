"""The loop of the samplers: noise, batches, guidance, dtypes, conditions, what it keeps and what it refuses."""

from __future__ import annotations

import math
import types

import pytest
import torch
from conftest import NO_CUDA, cuda_works
from torch import nn

import genkern as gk
from genkern import grids, samplers
from genkern.noise import Noise, Purpose

SHAPE = (5, 3, 4)


def rotating(x, t):
    """A network without an interaction between samples, elementwise in each: the same bits in any batch."""
    return torch.sin(x.flip(-1) + t.reshape(-1, 1, 1).to(x.dtype) * 0.001)


def conditioned(x, t, y):
    return x * y.reshape(-1, 1, 1).to(x.dtype)


class Recorder:
    """Calls a function and keeps copies of what it was given."""

    def __init__(self, function=rotating):
        self.function, self.inputs, self.times, self.cond = function, [], [], []

    def __call__(self, x, t, **cond):
        self.inputs.append(x.clone())
        self.times.append(t.clone())
        self.cond.append(cond)
        return self.function(x, t, **cond)


def runs():
    """sample() of every family, under one signature."""
    consistency, third = gk.Consistency(), samplers.DPMSolver(3, lower_order_final=False)
    churn = samplers.EDMHeun(s_churn=2.0, s_max=20.0)  # below the start, which is then used as it is given
    return {
        "ddim": lambda model, **o: gk.Diffusion().sample(model, SHAPE, steps=4, eta=0.7, **o),
        "ddpm": lambda model, **o: gk.Diffusion(prediction="v").sample(model, SHAPE, steps=4, sampler="ddpm", **o),
        "flow": lambda model, **o: gk.FlowMatching().sample(model, SHAPE, steps=4, **o),
        "rectified": lambda model, **o: gk.RectifiedFlow().sample(model, SHAPE, steps=4, sampler="heun", **o),
        "dpmpp_3m": lambda model, **o: gk.Diffusion().sample(model, SHAPE, steps=4, sampler=third, **o),
        "sde": lambda model, **o: gk.Diffusion().sample(model, SHAPE, steps=4, sampler="dpmpp_2m_sde", **o),
        "churn": lambda model, **o: gk.Diffusion().sample(model, SHAPE, steps=4, sampler=churn, **o),
        "unipc": lambda model, **o: gk.Diffusion(prediction="v").sample(model, SHAPE, steps=4, sampler="unipc", **o),
        "consistency": lambda model, **o: consistency.sample(model, SHAPE, steps=4, **o),
        "ode": lambda model, **o: consistency.sample_ode(model, SHAPE, steps=4, **o),
    }


every_family = pytest.mark.parametrize("family", runs())


@every_family
def test_samples_do_not_depend_on_how_the_batch_is_split(family, device):
    sample = runs()[family]
    whole = sample(rotating, seed=3, device=device)
    for batch_size in (1, 2, 5, 7):
        assert torch.equal(sample(rotating, seed=3, device=device, batch_size=batch_size), whole)


@every_family
def test_sample_follows_its_id(family):
    sample = runs()[family]
    whole = sample(rotating, seed=3)
    ids = torch.tensor([4, 2, 0, 3, 1])
    assert torch.equal(sample(rotating, noise=Noise(3, sample_ids=ids), batch_size=2), whole[ids])


@every_family
def test_samples_are_finite_in_float32_by_default(family):
    x = runs()[family](rotating, seed=0)
    assert (x.shape, x.dtype) == (SHAPE, torch.float32)
    assert x.isfinite().all()


@every_family
def test_without_a_seed_torch_governs(family):
    sample = runs()[family]
    torch.manual_seed(7)
    first, second = sample(rotating), sample(rotating)
    torch.manual_seed(7)
    assert torch.equal(sample(rotating), first)
    assert not torch.equal(first, second)
    drawn = [sample(rotating, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*drawn)


@every_family
def test_trajectory_and_callback_keep_their_own_copies(family):
    seen = []
    sample = runs()[family]
    x, trajectory = sample(
        rotating, seed=1, return_trajectory=True, batch_size=3, callback=lambda *event: seen.append(event)
    )
    steps = trajectory.shape[0] - 1
    assert trajectory.shape[1:] == SHAPE
    assert torch.equal(trajectory[-1], x)
    assert torch.equal(x, sample(rotating, seed=1))
    assert [k for k, _, _ in seen] == 2 * list(range(steps))
    for k, _, state in seen[:steps]:
        assert torch.equal(state, trajectory[k + 1, :3])
    pointers = {trajectory.data_ptr(), x.data_ptr(), *(state.data_ptr() for _, _, state in seen)}
    assert len(pointers) == 2 + len(seen)


def test_callback_is_told_the_time_of_the_state():
    times = []
    gk.RectifiedFlow().sample(rotating, SHAPE, steps=4, sampler="heun", callback=lambda k, t, x: times.append(t))
    assert times == [0.25, 0.5, 0.75, 1.0]


@every_family
def test_network_of_lower_precision_is_given_its_dtype_while_the_state_stays_float32(family):
    model = Recorder()
    x = runs()[family](model, seed=0, model_dtype=torch.bfloat16)
    assert {seen.dtype for seen in model.inputs} == {torch.bfloat16}
    assert x.dtype == torch.float32
    assert (x.bfloat16().float() != x).any()


@every_family
def test_initial_state_given_is_used_and_left_alone(family):
    start = torch.randn(SHAPE)
    copy = start.clone()
    _, trajectory = runs()[family](rotating, noise=start, seed=0, return_trajectory=True)
    assert torch.equal(trajectory[0], copy)
    assert torch.equal(start, copy)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_given_step_noise_is_the_kernels_own(batch_size):
    noise = Noise(11)
    steps = torch.stack([gk.ops.randn(SHAPE, noise=noise.at(Purpose.STEP, k), dtype=torch.float32) for k in range(4)])
    for family in ("ddim", "ddpm", "consistency"):
        sample = runs()[family]
        drawn = sample(rotating, noise=noise)
        assert torch.equal(sample(rotating, noise=noise, step_noise=steps, batch_size=batch_size), drawn)
        assert torch.equal(sample(rotating, noise=noise, step_noise=lambda k: steps[k], batch_size=batch_size), drawn)


def test_initial_state_is_the_noise_of_its_purpose():
    noise = Noise(11)
    z = gk.ops.randn(SHAPE, noise=noise.at(Purpose.INITIAL), dtype=torch.float32)
    _, trajectory = gk.RectifiedFlow().sample(rotating, SHAPE, steps=1, noise=noise, return_trajectory=True)
    assert torch.equal(trajectory[0], z)
    _, trajectory = gk.Consistency().sample(rotating, SHAPE, noise=noise, return_trajectory=True)
    assert torch.equal(trajectory[0], 80.0 * z)


@every_family
@pytest.mark.parametrize("per_sample", [False, True])
def test_guidance_is_the_manual_combination(family, per_sample):
    sample, w = runs()[family], torch.tensor([0.0, 1.0, 2.0, 3.5, -1.0]) if per_sample else 2.5
    cond, null = torch.linspace(0.1, 0.5, 5), torch.full((5,), 0.05)
    wide = w.reshape(-1, 1, 1) if per_sample else w

    def manual(x, t):
        uncond = conditioned(x, t, null)
        return uncond + wide * (conditioned(x, t, cond) - uncond)

    guided = sample(conditioned, seed=2, cond={"y": cond}, uncond={"y": null}, guidance_scale=w)
    expected = sample(manual, seed=2)
    scale = float(expected.abs().max())
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-5 * scale)
    split = sample(conditioned, seed=2, cond={"y": cond}, uncond={"y": null}, guidance_scale=w, batch_size=2)
    assert torch.equal(split, guided)


def test_guidance_calls_once_with_the_unconditional_half_first():
    model = Recorder(lambda x, t, y, flag: x)
    gk.RectifiedFlow().sample(
        model, SHAPE, steps=2, guidance_scale=2.0, model_dtype=torch.float16,
        cond={"y": torch.ones(5), "flag": True}, uncond={"y": torch.zeros(5), "flag": True},
    )  # fmt: skip
    assert len(model.inputs) == 2
    for seen, t, cond in zip(model.inputs, model.times, model.cond, strict=True):
        assert torch.equal(seen[:5], seen[5:])
        assert t.shape == (10,)
        assert cond["y"].tolist() == [0.0] * 5 + [1.0] * 5
        assert cond["flag"] is True


def test_conditions_are_split_with_the_batch_and_others_passed_as_they_are():
    model = Recorder(lambda x, t, **cond: x)
    nested = {"text": torch.arange(5)}
    gk.RectifiedFlow().sample(
        model, SHAPE, steps=1, batch_size=2, cond={"y": torch.arange(5), "more": nested, "k": 3, "s": torch.tensor(2.0)}
    )
    assert [c["y"].tolist() for c in model.cond] == [[0, 1], [2, 3], [4]]
    assert [c["more"]["text"].tolist() for c in model.cond] == [[0, 1], [2, 3], [4]]
    assert all(c["k"] == 3 and c["s"] == 2.0 for c in model.cond)


def test_times_that_networks_are_told():
    model = Recorder()
    gk.Diffusion().sample(model, SHAPE, steps=4)
    assert [t.tolist() for t in model.times] == [[k] * 5 for k in (999, 749, 499, 249)]
    assert model.times[0].dtype == torch.int64
    model = Recorder()
    gk.FlowMatching().sample(model, SHAPE, steps=2, sampler="heun")
    assert [float(t[0]) for t in model.times] == [0.0, 0.5, 0.5, 1.0]
    assert model.times[0].dtype == torch.float32
    model = Recorder()
    gk.Consistency().sample(model, SHAPE, times=[80.0, 2.0])
    torch.testing.assert_close(torch.stack(model.times)[:, 0], torch.tensor([80.0, 2.0]).log() / 4)


def test_input_of_a_preconditioned_network_is_scaled():
    model = Recorder()
    _, trajectory = gk.Consistency().sample_ode(model, SHAPE, steps=3, sampler="euler", seed=0, return_trajectory=True)
    for x, seen, s in zip(trajectory, model.inputs, grids.karras(4)[::-1], strict=False):
        torch.testing.assert_close(seen, x / math.sqrt(s**2 + 0.25))


@every_family
@pytest.mark.parametrize("wrap", [lambda m: (m, None), lambda m: types.SimpleNamespace(sample=m)])
def test_wrapped_outputs_are_unwrapped(family, wrap):
    sample = runs()[family]
    assert torch.equal(sample(lambda x, t: wrap(rotating(x, t)), seed=0), sample(rotating, seed=0))


@every_family
def test_network_that_returns_its_own_input_is_read_before_it_is_overwritten(family):
    sample = runs()[family]
    expected = sample(lambda x, t: x.clone(), seed=0)
    assert torch.equal(sample(lambda x, t: x, seed=0), expected)
    turned = sample(lambda x, t: x.flip(-1), seed=0)
    assert torch.equal(sample(lambda x, t: x[..., [3, 2, 1, 0]], seed=0), turned)


def test_no_gradient_is_kept_unless_asked_for():
    weight = torch.tensor(0.3, requires_grad=True)
    assert not gk.RectifiedFlow().sample(lambda x, t: weight * x, SHAPE, steps=2).requires_grad


@pytest.mark.parametrize("guided", [False, True])
def test_differentiable_sampling_has_the_gradient_of_the_written_out_loop(guided):
    weight = torch.tensor(0.3, requires_grad=True, dtype=torch.float64)
    x0 = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)

    def model(x, t, y=None):
        return weight * x.sin() if y is None else weight * x.sin() * y.reshape(-1, 1, 1)

    options = {}
    if guided:
        one = torch.ones(5, dtype=torch.float64)
        options = {"guidance_scale": 3.0, "cond": {"y": one}, "uncond": {"y": 0.5 * one}}
    x = gk.RectifiedFlow().sample(
        model, x0=x0, steps=3, sampler="heun", differentiable=True, dtype=torch.float64, **options
    )
    got = torch.autograd.grad(x.square().sum(), [weight, x0])
    factor = 0.5 + 3.0 * 0.5 if guided else 1.0
    state, h = x0, 1 / 3
    for _ in range(3):
        v = factor * weight * state.sin()
        state = state + h / 2 * (v + factor * weight * (state + h * v).sin())
    expected = torch.autograd.grad(state.square().sum(), [weight, x0])
    torch.testing.assert_close(got, expected)


def test_module_gives_its_dtype_and_device():
    module = nn.Linear(4, 4).to(torch.bfloat16)
    recorder = Recorder(lambda x, t: module(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x, t):
            return recorder(x, t)

    x = gk.RectifiedFlow().sample(Model(), SHAPE, steps=2)
    assert recorder.inputs[0].dtype == torch.bfloat16
    assert x.dtype == torch.float32


def test_network_of_higher_precision_than_the_state_is_rounded():
    x = gk.RectifiedFlow().sample(lambda x, t: x.double(), SHAPE, steps=2, seed=0)
    assert torch.equal(x, gk.RectifiedFlow().sample(lambda x, t: x, SHAPE, steps=2, seed=0))


def test_channels_last_state_gives_the_same_samples():
    start = torch.randn(2, 3, 4, 4)
    flow = gk.RectifiedFlow()
    expected = flow.sample(lambda x, t: x.sin(), x0=start, steps=3)
    strided = flow.sample(lambda x, t: x.sin(), x0=start.to(memory_format=torch.channels_last), steps=3)
    assert torch.equal(strided, expected)


def test_empty_batch_gives_an_empty_result():
    assert gk.RectifiedFlow().sample(rotating, (0, 3, 4), steps=2).shape == (0, 3, 4)


def test_progress_bar_counts_the_steps(capsys):
    gk.RectifiedFlow().sample(rotating, SHAPE, steps=4, batch_size=3, progress=True)
    assert "8/8" in capsys.readouterr().err


# Bad input


@every_family
@pytest.mark.parametrize(
    "broken, error, words",
    [
        (
            lambda x, t: x[..., :2],
            ValueError,
            r"model: expected output of shape \(5, 3, 4\) like its input, got \(5, 3, 2\)",
        ),
        (lambda x, t: x.long(), TypeError, "model: expected output of float32"),
        (lambda x, t: None, TypeError, "model: expected a tensor, a tuple or an object with .sample, got NoneType"),
    ],
)
def test_model_that_returns_something_else_is_named(family, broken, error, words):
    with pytest.raises(error, match=words):
        runs()[family](broken)


@every_family
@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1 << 64}, ValueError, "seed"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": 1, "noise": Noise(2)}, ValueError, "at most one of seed, noise and generator"),
        ({"noise": 3}, TypeError, "noise: expected a Noise or a tensor, got int"),
        ({"noise": torch.zeros(5, 3)}, ValueError, r"initial state: expected shape \(5, 3, 4\), got \(5, 3\)"),
        ({"noise": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "initial state: expected a tensor of float32"),
        ({"noise": Noise(1, sample_ids=[1, 2])}, ValueError, r"sample_ids: expected shape \(5,\), one a sample"),
        ({"noise": Noise(1, sample_ids=5)}, TypeError, "sample_ids: expected a sequence of integers"),
        ({"noise": Noise(1, sample_ids=[True] * 5)}, TypeError, "sample_ids: expected int64"),
        ({"noise": Noise(1, sample_ids=torch.ones(5))}, TypeError, "sample_ids: expected int64, got torch.float32"),
        ({"noise": Noise(1, sample_ids=[1 << 63] * 5)}, ValueError, "sample_ids: expected integers that int64"),
        ({"step_noise": torch.zeros(4, 5, 3)}, ValueError, r"step_noise: expected shape \(4, 5, 3, 4\)"),
        ({"step_noise": 1}, TypeError, "step_noise: expected a tensor or a callable, got int"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype: expected torch.float32 or torch.float64 for the state"),
        ({"model_dtype": torch.int32}, TypeError, "model_dtype: expected float32"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        ({"guidance_scale": 2.0}, ValueError, "uncond: expected the unconditional conditions"),
        ({"uncond": {"y": 1}}, ValueError, "guidance_scale: expected a number or a tensor"),
        (
            {"guidance_scale": 2.0, "uncond": {"y": 1}},
            ValueError,
            r"uncond: expected the keys of cond, \[\], got \['y'\]",
        ),
        ({"guidance_scale": math.nan, "uncond": {}}, ValueError, "guidance_scale: expected a finite number, got nan"),
        ({"cond": [1]}, TypeError, "cond: expected a mapping"),
        (
            {"cond": {"y": torch.zeros(4)}},
            ValueError,
            r"cond\['y'\]: expected dimension 0 to be the batch, 5, got \(4,\)",
        ),
    ],
)
def test_bad_option_is_named(family, options, error, words):
    called = []
    with pytest.raises(error, match=words):
        runs()[family](lambda x, t, **c: called.append(1) or x, **options)
    assert not called


@every_family
@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"scale": 3.0}, TypeError, "unexpected keyword argument 'scale'"),
        ({"time_dtype": torch.float64}, TypeError, "unexpected keyword argument 'time_dtype'"),
        ({"start": torch.zeros(SHAPE)}, TypeError, "unexpected keyword argument 'start'"),
        ({"sed": 3}, TypeError, "unexpected keyword argument 'sed'"),
        ({"callback": 5}, TypeError, "callback: expected a callable, got int"),
        ({"generator": 5}, TypeError, "generator: expected a torch.Generator, got int"),
        ({"cond": 5}, TypeError, "cond: expected a mapping"),
        ({"model_dtype": "float32"}, TypeError, "model_dtype: expected float32, .*, got 'float32'"),
        ({"dtype": torch.int32}, ValueError, "dtype: expected torch.float32 or torch.float64"),
        ({"device": "abacus"}, ValueError, "device: expected a device that torch has here, got 'abacus'"),
        ({"device": "cuda:99"}, ValueError, "device: expected a device that torch has here, got 'cuda:99'"),
    ],
)
def test_an_option_that_is_refused_draws_nothing(family, options, error, words):
    called, state = [], torch.get_rng_state()
    with pytest.raises(error, match=words):
        runs()[family](lambda x, t, **c: called.append(1) or x, **options)
    assert not called
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["ddim", "ddpm", "consistency"])
def test_a_clip_that_is_refused_draws_nothing(family):
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="clip: expected lo < hi"):
        runs()[family](rotating, clip=(1, -1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["flow", "rectified", "ode"])
def test_methods_without_predicted_data_have_no_clip(family):
    with pytest.raises(TypeError, match="unexpected keyword argument 'clip'"):
        runs()[family](rotating, clip=0.01)


def test_clip_is_refused_where_the_sampler_predicts_no_data():
    with pytest.raises(ValueError, match="clip: expected None with a sampler that predicts no data, got 0.5"):
        gk.Diffusion("cosine_log_snr").sample(rotating, SHAPE, steps=3, sampler=samplers.Euler(), clip=0.5)


@pytest.mark.parametrize("sampler", [None, 5, samplers.Euler])
def test_what_is_no_sampler_is_named(sampler):
    for sample in (gk.Diffusion().sample, gk.FlowMatching().sample, gk.Consistency().sample_ode):
        with pytest.raises(TypeError, match="sampler: expected a name or a Sampler, got"):
            sample(rotating, SHAPE, steps=3, sampler=sampler)


@pytest.mark.parametrize("shape", [(), (2, -1)])
def test_bad_shape_is_refused(shape):
    with pytest.raises(ValueError, match="shape: expected 1 to 16 sizes"):
        gk.RectifiedFlow().sample(rotating, shape)


def test_state_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="initial state: expected dimension 0 to be the batch, got a 0-d tensor"):
        gk.RectifiedFlow().sample(rotating, x0=torch.tensor(1.0))
    with pytest.raises(ValueError, match="shape: expected the state's shape, or an initial state, got None"):
        gk.RectifiedFlow().sample(rotating)


# No waiting for the device


@pytest.mark.cuda
@pytest.mark.skipif(not cuda_works(), reason=NO_CUDA)
@every_family
@pytest.mark.parametrize("guided", [False, True])
def test_nothing_in_the_loop_waits_for_the_device(family, guided):
    def model(x, t):
        torch.cuda.set_sync_debug_mode("error")  # from the first call on
        return x.sin()

    options = {"cond": {}, "uncond": {}, "guidance_scale": 2.0} if guided else {}
    try:
        runs()[family](model, seed=0, device="cuda", model_dtype=torch.bfloat16, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


METHODS = {
    "diffusion": (gk.Diffusion(), lambda method, *batch: method.loss(*batch, noise=Noise(0))),
    "gamma": (gk.Diffusion(), lambda method, *b: method.loss(*b, noise=Noise(0), weighting=[0.5] * 1000)),
    "flow": (gk.FlowMatching(), lambda method, *batch: method.loss(*batch, noise=Noise(0))),
    "coupled": (gk.RectifiedFlow(), lambda method, model, x: method.loss(model, x, x, noise=Noise(0))),
    "teacher": (gk.Consistency(), lambda method, *batch: method.teacher_loss(*batch, noise=Noise(0))),
    "distillation": (gk.Consistency(), lambda method, model, x: method.loss(model, x, teacher=model, noise=Noise(0))),
}


@pytest.mark.cuda
@pytest.mark.skipif(not cuda_works(), reason=NO_CUDA)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_in_a_loss_waits_for_the_device(name):
    method, loss = METHODS[name]
    x = torch.randn(SHAPE, device="cuda")
    weight = torch.ones((), device="cuda", requires_grad=True)
    loss(method, lambda x, t: weight * x, x).backward()  # puts its tables on the device
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss(method, lambda x, t: weight * x, x).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
