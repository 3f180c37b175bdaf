"""Dynamic thresholding: against the paper's formula in float64, in every sampler that predicts data, captured, split
and differentiated; and how many passes it and guidance take."""

from __future__ import annotations

import math

import pytest
import torch
from test_guidance import CONDS, NULL, curved, wide
from test_samplers import SHAPE
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from watching import FREE, Launches

import genkern as gk
from genkern import eager
from genkern.samplers import DDPM

F64 = torch.float64
SAMPLERS = {
    "ddim": {}, "ddpm": {}, "dpmpp_2m": {}, "dpmpp_3m": {}, "dpmpp_2m_sde": {}, "unipc": {},
    "fixed large": {"sampler": DDPM(variance="fixed_large")}, "eta": {"sampler": "ddim", "eta": 0.5},
}  # fmt: skip
THRESHOLDS = [gk.DynamicThreshold(), gk.DynamicThreshold(0.8, 1.7), gk.DynamicThreshold(0.5, 1.0)]
PREDICTIONS = [*zip(("epsilon", "v", "sample"), THRESHOLDS, strict=True), ("score", THRESHOLDS[1])]
GUIDED = {"cond": CONDS[0], "uncond": NULL, "guidance_scale": torch.tensor([0.0, 1.0, 4.0, 7.5, -1.0])}
FORMS = {
    "alone": {}, "guided": GUIDED, "one scale": {**GUIDED, "guidance_scale": 3.0},
    "rescaled": {**GUIDED, "guidance_rescale": 0.7}, "apg": {**GUIDED, "apg": gk.APG(0.2, 5.0, -0.5)},
    "interval": {**GUIDED, "guidance_rescale": 0.7, "guidance_interval": (300, 800)},
    "composed": {"cond": CONDS, "uncond": NULL, "guidance_scale": [1.5, 2.0]},
}  # fmt: skip


def thresholded(y, threshold):
    """Section 2.3 of arXiv:2205.11487, capped as diffusers does."""
    s = torch.quantile(y.abs().flatten(1), threshold.ratio, dim=1).clamp(1.0, threshold.max_value)
    s = s.reshape(-1, *[1] * (y.ndim - 1))
    return torch.minimum(torch.maximum(y, -s), s) / s


class Data:
    """A network of the data itself, thresholded: what a sampler is to see where it thresholds another's prediction."""

    def __init__(self, network, method, threshold):
        self.network, self.method, self.threshold = network, method, threshold

    def __call__(self, x, t, **cond):
        a, b = self.method.path.data(self.method.prediction, float(t[0]))
        return thresholded(a * x + b * self.network(x, t, **cond), self.threshold)


def plain(x, t, y=None):
    return curved(x, t, torch.full((len(x),), 0.3) if y is None else y)


def options_of(name):
    return {"steps": 5, "seed": 3, "sampler": name} | SAMPLERS[name]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction, threshold", PREDICTIONS)
def test_it_is_the_papers_formula_in_every_sampler_that_predicts_data(name, prediction, threshold, path):
    method, data = gk.Diffusion(prediction=prediction), gk.Diffusion(prediction="sample")
    options = options_of(name) | {"dtype": F64, "model_dtype": F64}
    got = method.sample(plain, SHAPE, **options, clip=threshold)
    expected = data.sample(Data(plain, method, threshold), SHAPE, **options)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))
    assert not torch.allclose(got, method.sample(plain, SHAPE, **options))


@pytest.mark.parametrize("form", ["guided", "rescaled"])
def test_what_is_guided_is_thresholded(form, path):
    threshold, method, data = THRESHOLDS[1], gk.Diffusion(), gk.Diffusion(prediction="sample")
    options = options_of("dpmpp_2m") | {"dtype": F64, "model_dtype": F64}
    w = wide(GUIDED["guidance_scale"])

    def guided(x, t):
        u, c = (curved(x, t, each["y"].to(F64)) for each in (NULL, CONDS[0]))
        m = u + w * (c - u)
        std = [v.flatten(1).std(1).reshape(-1, 1, 1) for v in (c, m)]
        return m * (0.7 * std[0] / std[1] + 0.3) if form == "rescaled" else m

    got = method.sample(curved, SHAPE, **options, **FORMS[form], clip=threshold)
    expected = data.sample(Data(guided, method, threshold), SHAPE, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def test_one_for_the_largest_value_is_a_plain_clamp():
    options = {"steps": 4, "seed": 1, "sampler": "ddim"}
    plain_clamp = gk.Diffusion().sample(plain, SHAPE, **options, clip=1.0)
    assert torch.equal(gk.Diffusion().sample(plain, SHAPE, **options, clip=gk.DynamicThreshold(0.9, 1.0)), plain_clamp)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "eta"])
def test_captured_and_split_loops_have_the_same_bits(name, form, captures):
    method, threshold = gk.Diffusion(prediction="v"), THRESHOLDS[0]

    def model(x, t, y=None):
        return plain(x, t, y)

    for seed in range(2):
        options = options_of(name) | FORMS[form] | {"seed": seed, "model_dtype": torch.bfloat16, "clip": threshold}
        whole = method.sample(model, SHAPE, **options)
        assert whole.isfinite().all()
        for way in ({"batch_size": 2}, {"cuda_graph": True}, {"cuda_graph": True, "batch_size": 3}):
            assert torch.equal(method.sample(model, SHAPE, **options, **way), whole), way
    assert captures


@pytest.mark.parametrize("form", ["alone", "guided", "rescaled"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc"])
def test_the_gradient_is_that_of_the_formula(name, form):
    method, threshold = gk.Diffusion(), gk.DynamicThreshold(0.7)
    options = options_of(name) | FORMS[form] | {"dtype": F64, "model_dtype": F64, "clip": threshold, "steps": 3}
    weight = torch.tensor(1.3, dtype=F64, requires_grad=True)

    def sample(weight, **more):
        return method.sample(lambda x, t, y=None: weight * plain(x, t, y), SHAPE, **options, **more)

    kept = sample(weight, differentiable=True)
    torch.testing.assert_close(kept, sample(weight.detach()), rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(lambda w: sample(w, differentiable=True).square().sum(), (weight,), atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("by_sample", [False, True])
def test_ddim_step_takes_it_with_the_networks_epsilon(prediction, by_sample, path):
    x, m, u = 2.0 * torch.randn(3, *SHAPE, dtype=F64)
    threshold, w = gk.DynamicThreshold(0.8, 3.0), torch.linspace(0.5, 4.0, 5, dtype=F64)
    scales = [0.3, 0.95, 0.6, 0.8]
    given = [torch.full((5,), c, dtype=F64) for c in scales] if by_sample else scales
    options = {"prediction": prediction, "uncond": u, "guidance_scale": w}
    kept = gk.ops.ddim_step(x, m.requires_grad_(), *given, **options, clip=threshold, return_pred=True)
    with torch.no_grad():
        x_s, y = gk.ops.ddim_step(x, m, *given, **options, return_pred=True)
        expected = x_s + 0.6 * (thresholded(y, threshold) - y), thresholded(y, threshold)
        found = gk.ops.ddim_step(x, m, *given, **options, clip=threshold, return_pred=True)
    for of in (found, kept):
        torch.testing.assert_close(of, expected, rtol=1e-12, atol=1e-12)

    def run(m):
        return gk.ops.ddim_step(x[:2, :1], m, 0.3, 0.95, 0.6, 0.8, prediction=prediction, clip=threshold)

    assert torch.autograd.gradcheck(run, (m.detach()[:2, :1].requires_grad_(),))


def test_ddim_step_on_numpy_arrays_refuses_it():
    x = torch.zeros(2, 3).numpy()
    with pytest.raises(TypeError, match="clip: expected None, .* beside NumPy arrays, got DynamicThreshold"):
        gk.ops.ddim_step(x, x, 0.3, 0.95, 0.6, 0.8, clip=gk.DynamicThreshold())


def test_consistency_models_take_it_too():
    threshold = gk.DynamicThreshold(0.7)
    found = gk.Consistency().sample(lambda x, t: 40.0 * x, SHAPE, seed=1, times=[80.0], clip=threshold, dtype=F64)
    plain = gk.Consistency().sample(lambda x, t: 40.0 * x, SHAPE, seed=1, times=[80.0], dtype=F64)
    torch.testing.assert_close(found, thresholded(plain, threshold))


def test_samples_with_a_nan_are_nan_and_leave_the_others_alone():
    def broken(x, t):
        return torch.where(torch.arange(len(x)).reshape(-1, 1, 1) == 2, math.nan, plain(x, t))

    options = {"steps": 3, "seed": 0, "clip": gk.DynamicThreshold()}
    found, whole = gk.Diffusion().sample(broken, SHAPE, **options), gk.Diffusion().sample(plain, SHAPE, **options)
    assert found[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(found[keep], whole[keep])


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"ratio": 1.5}, ValueError, "ratio: expected a number from 0 to 1, got 1.5"),
        ({"ratio": "a"}, TypeError, "ratio: expected a number"),
        ({"max_value": 0.5}, ValueError, "max_value: expected a finite number >= 1, got 0.5"),
        ({"max_value": math.nan}, ValueError, "max_value: expected"),
    ],
)
def test_bad_numbers_are_named(options, error, words):
    with pytest.raises(error, match=words):
        gk.DynamicThreshold(**options)


def test_it_is_refused_where_no_data_are_predicted():
    with pytest.raises(ValueError, match="clip: expected None with a sampler that predicts no data, got DynamicThresh"):
        sampler = gk.samplers.Euler()
        gk.Diffusion("cosine_log_snr").sample(plain, SHAPE, steps=2, sampler=sampler, clip=gk.DynamicThreshold())


class Passes(TorchDispatchMode):
    """The operations that read or write a tensor as large as a state."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names, self.off = size, [], False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, found)) if isinstance(t, torch.Tensor)]
        views = ("chunk", "split", "view", "slice", "detach", "alias", "empty", "expand", "unbind")
        if not self.off and any(t.numel() >= self.size for t in tensors):
            name = op.name().replace("_numbers", "").partition("::")[2].partition(".")[0]
            if not any(word in name for word in views):
                self.names.append(name)
        return found


@pytest.mark.parametrize(
    "form, clip, expected",
    [
        ("guided", None, ["map"]),
        ("guided", 1.0, ["map"]),
        ("guided", gk.DynamicThreshold(), ["stat_quantile", "map"]),
        ("alone", gk.DynamicThreshold(), ["stat_quantile", "map"]),
        ("rescaled", None, ["stat", "map"]),
        ("rescaled", gk.DynamicThreshold(), ["stat", "stat_quantile", "map"]),
        ("apg", None, ["stat", "map", "map"]),
        ("composed", None, ["cat", "map", "map"]),  # cat: the network's input
    ],
)
def test_a_step_is_as_few_passes_as_this(form, clip, expected, kernels, monkeypatch):
    monkeypatch.setattr(eager, "face", None)  # whose calls go past the dispatcher
    shape, counted = (5, 3, 400), []

    def model(x, t, y=None):
        counted.append(len(passes.names))
        passes.off = True
        out = plain(x, t, y)
        passes.off = False
        return out

    passes = Passes(math.prod(shape))
    with passes:
        gk.Diffusion().sample(model, shape, steps=3, seed=0, sampler="ddim", clip=clip, **FORMS[form])
    first, second, third = counted
    if form == "composed":  # the input is put together before the call
        assert passes.names[first:second] == ["map", "map", "cat"]
    else:
        assert passes.names[first:second] == passes.names[second:third] == expected


# (form, clip, small operations of a step that is captured, and of one that is not)
SMALL = [
    ("guided", None, 0, 0), ("guided", THRESHOLDS[1], 9, 3), ("rescaled", None, 13, 9),
    ("rescaled", THRESHOLDS[1], 19, 12), ("apg", None, 11, 11),
]  # fmt: skip


@pytest.mark.parametrize("form, clip, captured, other", SMALL)
@pytest.mark.parametrize("captures", ["steps"], indirect=True)
def test_small_operations_between_a_statistic_and_the_step(form, clip, captured, other, captures, kernels, monkeypatch):
    """Of torch, on numbers of samples."""
    monkeypatch.setattr(eager, "face", None)  # whose calls go past the dispatcher
    shape, begun = (5, 3, 400), []
    found = torch.randn(10, 3, 400)

    def model(x, t, y=None):
        begun.append(len(launches.small))
        return found[: len(x)]

    def step(**options):
        gk.Diffusion().sample(model, shape, steps=3, seed=0, sampler="ddim", clip=clip, **FORMS[form], **options)

    launches = Launches(shape)
    with launches:
        step()
    assert begun[2] - begun[1] <= other
    step(cuda_graph=True)
    graph = captures[-1].graphs[-1]
    sizes = [max((t.numel() for t in tree_leaves(call[1:]) if isinstance(t, torch.Tensor)), default=0)
             for call in graph.calls]  # fmt: skip
    names = [call[0].overloadpacket.__name__ for call in graph.calls]
    small = [name for name, size in zip(names, sizes, strict=True) if size < math.prod(shape) and name not in FREE]
    assert len(small) <= captured
    assert any(name.startswith("map") for name in names)


def test_a_step_without_noise_draws_none_whatever_its_path_values_are():
    x, m = torch.randn(2, 3, 8).unbind()
    alpha_t, alpha_s = torch.tensor([0.6, 0.5, 0.7]), torch.tensor([0.8, 0.7, 0.9])
    torch.manual_seed(0)
    first = torch.rand(())
    torch.manual_seed(0)
    sigma_t, sigma_s = (1 - alpha_t**2).sqrt(), (1 - alpha_s**2).sqrt()
    gk.ops.ddim_step(x, m, alpha_t, sigma_t, alpha_s, sigma_s, clip=gk.DynamicThreshold(0.9))
    assert torch.rand(()) == first
