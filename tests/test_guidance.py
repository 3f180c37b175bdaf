"""Guidance: its forms against the papers' formulas in float64, what the network is called with, captured and split."""

from __future__ import annotations

import pytest
import torch
from test_samplers import SHAPE, Recorder, conditioned, every_family, runs

import genkern as gk

F64 = torch.float64
NULL = {"y": torch.linspace(0.05, 0.2, 5)}
CONDS = [{"y": torch.linspace(0.1, 0.5, 5)}, {"y": torch.full((5,), 0.3)}]
SCALES = [2.5, torch.tensor([0.0, 1.0, 2.0, 3.5, -1.0])]


def curved(x, t, y):
    """A conditional network that is not linear in its condition; elementwise in each sample."""
    return torch.sin(2.0 * x + 3.0 * y.reshape(-1, 1, 1).to(x.dtype)) + 0.1 * x.flip(-1)


def wide(w):
    return w.to(F64).reshape(-1, 1, 1) if isinstance(w, torch.Tensor) else w


def std(m):
    """As in section 3.4 of arXiv:2305.08891, over all dimensions of a sample."""
    return m.flatten(1).std(1).reshape(-1, 1, 1)


FORMS = {
    "rescale": {"guidance_rescale": 0.7},
    "composed": {},
    "apg": {"apg": gk.APG()},
    "apg with all": {"apg": gk.APG(eta=0.3, norm=1.5, momentum=-0.5)},
}


def call(form, w):
    cond, scale = (CONDS, [w, 0.7]) if form == "composed" else (CONDS[0], w)
    return {"cond": cond, "uncond": NULL, "guidance_scale": scale, **FORMS[form]}


class Manual:
    """The formulas as the papers write them, in float64, as a network of its own; along: its time -> (a, b)."""

    def __init__(self, form, w, network, along):
        self.form, self.w, self.network, self.along, self.sum = form, wide(w), network, along, 0.0

    def __call__(self, x, t):
        u, c, second = (self.network(x, t, each["y"].to(F64)) for each in (NULL, *CONDS))
        plain = u + self.w * (c - u)
        if self.form == "rescale":
            return 0.7 * plain * std(c) / std(plain) + 0.3 * plain
        if self.form == "composed":
            return plain + 0.7 * (second - u)
        apg = FORMS[self.form]["apg"]
        a, b = self.along(t)
        y_c, y_u = a * x + b * c, a * x + b * u
        self.sum = (y_c - y_u) + apg.momentum * self.sum
        size = self.sum.flatten(1).norm(dim=1).reshape(-1, 1, 1)
        diff = self.sum * (apg.norm / size).clamp(max=1.0)
        unit = torch.nn.functional.normalize(y_c.flatten(1)).reshape(y_c.shape)
        parallel = (diff * unit).flatten(1).sum(1).reshape(-1, 1, 1) * unit
        y = y_c + (self.w - 1.0) * (diff - parallel + apg.eta * parallel)
        return (y - a * x) / b


def families():
    """Methods with one network call at each time, and how their networks read: y = a x + b m."""
    diffusion, v, flow = gk.Diffusion(), gk.Diffusion(prediction="v"), gk.FlowMatching()

    def of_flow(t):
        return 1.0, 1.0 - float(t[0])

    return {
        "ddim": (diffusion, {"eta": 0.7}, lambda t: diffusion.path.data("epsilon", float(t[0]))),
        "unipc": (v, {"sampler": "unipc"}, lambda t: v.path.data("v", float(t[0]))),
        "flow": (flow, {}, of_flow),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("w", SCALES)
@pytest.mark.parametrize("family", families())
def test_each_form_is_its_papers_formula(family, w, form, path):
    method, options, along = families()[family]
    options = {"steps": 5, "seed": 2, **options}
    got = method.sample(curved, SHAPE, **options, **call(form, w), dtype=F64, model_dtype=F64)
    expected = method.sample(Manual(form, w, curved, along), SHAPE, **options, dtype=F64, model_dtype=F64)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@every_family
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_captured_and_split_with_the_same_samples(family, form, captures):
    if "apg" in form and family == "rectified":
        return  # Heun's last call is at the data, which is refused below
    sample = runs()[family]

    def model(x, t, y):
        return curved(x, t, y)

    for seed, w in enumerate((SCALES[0], *SCALES)):  # the second call of a kind is replayed
        options = {**call(form, w), "model_dtype": torch.bfloat16, "seed": seed}
        whole = sample(model, **options)
        assert whole.isfinite().all()
        for way in ({"batch_size": 2}, {"cuda_graph": True}, {"cuda_graph": True, "batch_size": 2}):
            assert torch.equal(sample(model, **options, **way), whole)


@pytest.mark.parametrize("several", [2, 3, 6])
def test_several_conditions_are_one_call_of_all_batches(several):
    conds = [{"y": torch.full((5,), float(k)), "flag": "word"} for k in range(1, several + 1)]
    null = {"y": torch.zeros(5), "flag": "word"}
    model = Recorder(lambda x, t, y, flag: conditioned(x, t, y))
    scales = [0.1 * k for k in range(1, several + 1)]
    got = gk.FlowMatching().sample(
        model, SHAPE, steps=1, seed=0, cond=conds, uncond=null, guidance_scale=scales, dtype=F64
    )
    (seen,), (cond,) = model.inputs, model.cond
    assert seen.shape == (5 * (several + 1), 3, 4) and model.times[0].shape == (5 * (several + 1),)
    assert all(torch.equal(part, seen[:5]) for part in seen.split(5))
    assert cond["y"].tolist() == [float(k) for k in range(several + 1) for _ in range(5)] and cond["flag"] == "word"
    factor = 1.0 + sum(w * k for k, w in enumerate(scales, 1))  # x + v(x) with v = x sum_k w_k y_k
    torch.testing.assert_close(got, seen[:5] * factor)


@every_family
@pytest.mark.parametrize("form", [None, "rescale", "apg"])
def test_outside_the_interval_the_network_is_called_with_the_condition_alone(family, form, captures):
    if form == "apg" and family == "rectified":
        return
    sample, w = runs()[family], SCALES[1]
    options = {"cond": CONDS[0], "uncond": NULL, "guidance_scale": w, **(FORMS[form] if form else {})}
    for interval, guided in (((-1e9, 1e9), True), ((1e8, 1e9), False)):
        model = Recorder(curved)
        got = sample(model, seed=1, guidance_interval=interval, **options)
        assert {seen.shape[0] for seen in model.inputs} == {10 if guided else 5}
        plain = options if guided else {"cond": CONDS[0]}
        assert torch.equal(got, sample(lambda x, t, y: curved(x, t, y), seed=1, **plain))


@pytest.mark.parametrize(
    "method, options, interval, guided",
    [
        (gk.Diffusion(), {}, (300, 749), [False, True, True, False]),  # calls at 999, 749, 499, 249
        (gk.FlowMatching(), {}, (0.25, 0.5), [False, True, True, False]),
        (gk.RectifiedFlow(), {"sampler": "heun", "steps": 2}, (0.5, 0.9), [False, True, True, False]),
        (gk.Consistency(), {"times": [80.0, 10.0, 2.0, 1.0]}, (1.5, 20), [False, True, True, False]),
    ],
)
@pytest.mark.parametrize("form", [None, "rescale"])
def test_interval_is_in_the_familys_times(method, options, interval, guided, form, captures):
    model = Recorder(curved)
    given = {"cond": CONDS[0], "uncond": NULL, "guidance_scale": SCALES[1], "guidance_interval": interval, "seed": 4}
    given |= {"steps": 4} if "times" not in options else {}
    given |= options | (FORMS[form] if form else {})
    whole = method.sample(model, SHAPE, **given)
    assert [seen.shape[0] for seen in model.inputs] == [10 if on else 5 for on in guided]
    assert [t.shape[0] for t in model.times] == [10 if on else 5 for on in guided]
    for cond, on in zip(model.cond, guided, strict=True):
        assert torch.equal(cond["y"], torch.cat([NULL["y"], CONDS[0]["y"]]) if on else CONDS[0]["y"])

    def call(x, t, y):
        return curved(x, t, y)

    for more in ({"batch_size": 2}, {"cuda_graph": True}, {"cuda_graph": True, "batch_size": 3}):
        assert torch.equal(method.sample(call, SHAPE, **given, **more), whole)
    kept, exact = (method.sample(call, SHAPE, **given, dtype=F64, differentiable=d) for d in (True, False))
    torch.testing.assert_close(kept, exact, rtol=1e-12, atol=1e-12 * float(exact.abs().max()))


def test_rescale_of_one_gives_the_conditional_standard_deviation():
    seen = []

    def model(x, t, y):
        out = curved(x, t, y)
        seen.append(out)
        return out

    x0 = torch.randn(SHAPE, dtype=F64)
    x = gk.FlowMatching().sample(
        model, x0=x0, steps=1, cond=CONDS[0], uncond=NULL, guidance_scale=7.0, guidance_rescale=1.0, dtype=F64
    )
    torch.testing.assert_close(std(x - x0), std(seen[0][5:]))


def test_gradients_of_a_guided_output_that_is_zero_are_finite():
    weight = torch.tensor(0.7, dtype=F64, requires_grad=True)
    x0 = torch.randn(2, 3, 4, dtype=F64)

    def model(x, t, c):
        return weight * x * (1.0 + c.reshape(-1, 1, 1))  # m_u = 2 m_c, and 2 m_c - m_u = 0

    found = gk.FlowMatching().sample(
        model, x0=x0, steps=1, cond={"c": torch.zeros(2, dtype=F64)}, uncond={"c": torch.ones(2, dtype=F64)},
        guidance_scale=2.0, guidance_rescale=0.7, differentiable=True, dtype=F64,
    )  # fmt: skip
    (g,) = torch.autograd.grad(found.sum(), weight)
    assert found.isfinite().all() and g.isfinite()


@pytest.mark.parametrize("differentiable", [False, True])
def test_samples_without_spread_are_not_rescaled(differentiable):
    x0 = torch.full((5, 3, 41), 0.1, requires_grad=differentiable)
    options = {"steps": 1, "cond": CONDS[0], "uncond": NULL, "guidance_scale": 3.0, "differentiable": differentiable}
    plain = gk.FlowMatching().sample(conditioned, x0=x0, **options)
    found = gk.FlowMatching().sample(conditioned, x0=x0, **options, guidance_rescale=1.0)
    torch.testing.assert_close(found, plain)
    if differentiable:
        (slope,) = torch.autograd.grad(found.sum(), x0)
        assert slope.isfinite().all()


def test_one_condition_in_a_sequence_is_plain_guidance():
    options = {"uncond": NULL, "seed": 0, "dtype": F64, "steps": 4}
    plain = gk.Diffusion().sample(curved, SHAPE, cond=CONDS[0], guidance_scale=4.0, **options)
    one = gk.Diffusion().sample(curved, SHAPE, cond=[CONDS[0]], guidance_scale=[4.0], **options)
    torch.testing.assert_close(one, plain)


def test_apg_of_eta_one_is_plain_guidance():
    options = {"cond": CONDS[0], "uncond": NULL, "guidance_scale": 4.0, "seed": 0, "dtype": F64, "steps": 4}
    plain = gk.Diffusion().sample(curved, SHAPE, **options)
    torch.testing.assert_close(gk.Diffusion().sample(curved, SHAPE, **options, apg=gk.APG(eta=1.0)), plain)


@pytest.mark.parametrize("form", FORMS)
def test_forms_keep_the_gradient(form):
    weight = torch.tensor(1.3, requires_grad=True, dtype=F64)

    def model(x, t, y):
        return curved(weight * x, t, y)

    def loss(value):
        nonlocal weight
        weight = value
        x = gk.FlowMatching().sample(
            model, SHAPE, steps=3, seed=0, differentiable=True, dtype=F64, **call(form, SCALES[1])
        )
        return x.square().sum()

    assert torch.autograd.gradcheck(loss, (weight,), atol=1e-4, rtol=1e-4)


ONE = {"cond": CONDS[0], "uncond": NULL, "guidance_scale": 2.0}
TWO = {"cond": CONDS, "uncond": NULL, "guidance_scale": [1.0, 2.0]}


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"guidance_interval": (0, 1)}, ValueError, "guidance_interval: expected none without guidance_scale, got"),
        ({"guidance_rescale": 0.5}, ValueError, "guidance_rescale: expected none without guidance_scale, got 0.5"),
        ({"apg": gk.APG()}, ValueError, "apg: expected none without guidance_scale"),
        ({"cond": CONDS}, ValueError, "guidance_scale: expected a scale for each of the conditions, got None"),
        ({**ONE, "guidance_interval": 3}, ValueError, r"guidance_interval: expected \(lo, hi\), got 3"),
        ({**ONE, "guidance_interval": (2, 1)}, ValueError, r"guidance_interval: expected lo <= hi, got \(2.0, 1.0\)"),
        ({**ONE, "guidance_rescale": 1.5}, ValueError, "guidance_rescale: expected a number from 0 to 1, got 1.5"),
        ({**ONE, "apg": 0.5}, TypeError, "apg: expected a genkern.APG, got float"),
        (
            {**ONE, "apg": gk.APG(), "guidance_rescale": 0.5},
            ValueError,
            "guidance_rescale: expected 0 beside apg, got 0.5",
        ),
        ({**TWO, "guidance_interval": (0, 1)}, ValueError, "cond: expected one condition beside guidance_interval"),
        ({**TWO, "guidance_scale": 2.0}, ValueError, "guidance_scale: expected a sequence of 2, one a condition"),
        ({**TWO, "guidance_scale": [1.0]}, ValueError, "guidance_scale: expected a sequence of 2, .* got 1"),
        ({**TWO, "guidance_scale": [1.0, "a"]}, TypeError, r"guidance_scale\[1\]: expected a number"),
        ({**TWO, "cond": []}, ValueError, "cond: expected at least one condition, got an empty sequence"),
        ({**TWO, "cond": [CONDS[0], {"z": torch.zeros(5)}]}, ValueError, "uncond: expected the keys of cond"),
        ({**TWO, "cond": [CONDS[0], 3]}, TypeError, r"cond\[1\]: expected a mapping"),
    ],
)
def test_bad_guidance_is_named(options, error, words):
    with pytest.raises(error, match=words):
        gk.Diffusion().sample(curved, SHAPE, steps=2, **options)


def test_apg_is_refused_where_a_call_says_nothing_of_the_data():
    with pytest.raises(ValueError, match="apg: expected a sampler all of whose network calls .* at t = 1"):
        gk.RectifiedFlow().sample(curved, SHAPE, steps=2, sampler="heun", **ONE, apg=gk.APG())
    for broken in ({"norm": 0.0}, {"momentum": 1.0}, {"eta": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(broken))}: expected"):
            gk.APG(**broken)


@pytest.mark.parametrize("form", [{"guidance_rescale": 0.7}, {"apg": gk.APG(norm=1.0)}], ids=str)
def test_a_constant_conditional_output_has_a_finite_gradient(form):
    scale = torch.ones((), requires_grad=True)

    def network(x, t, y):
        m = x * y[:, None] * scale
        return m if len(m) == 2 else torch.cat([m[:2], 0.0 * m[2:]])

    options = {"cond": {"y": torch.ones(2)}, "uncond": {"y": torch.full((2,), 0.5)}, "guidance_scale": 2.0}
    found = gk.FlowMatching().sample(
        network, x0=torch.randn(2, 4), steps=2, sampler="euler", differentiable=True, **options, **form
    )
    (gradient,) = torch.autograd.grad(found.sum(), scale)
    assert found.isfinite().all() and gradient.isfinite()
