"""Guidance by an energy: on a Gaussian with a linear measurement it gives the posterior, in closed form.

Data N(mu, s^2), c = data + tau n. Given x_t = alpha data + sigma e, with v = alpha^2 s^2 + sigma^2,

    data | x_t ~ N(y, r),      y = mu + alpha s^2 / v (x_t - alpha mu),      r = s^2 sigma^2 / v
    -log p(c | x_t) = (c - y)^2 / (2 (r + tau^2)) + const
    data | c ~ N(p (mu / s^2 + c / tau^2), p),      1 / p = 1 / s^2 + 1 / tau^2

and the probability-flow ODE is affine in its initial state, so that three states give its mean and variance.
"""

from __future__ import annotations

import pytest
import torch
from analytic import DenoiserNetwork, PathNetwork, gaussian
from test_samplers import SHAPE, conditioned, rotating

import genkern as gk

F64 = torch.float64
MU, S, C, TAU = 0.6, 0.8, -0.9, 0.5
P = 1.0 / (1.0 / S**2 + 1.0 / TAU**2)
MEAN = P * (MU / S**2 + C / TAU**2)
DATA = gaussian(MU, S, 1)
START = torch.tensor([[0.0], [1.0], [-1.0]], dtype=F64)


def settings():
    """sample(), the scale of its initial state, alpha and sigma of what the network is told, and the grid's error."""

    def of_path(method, name):
        network = PathNetwork(DATA, method.path, name)
        return network, lambda t: tuple(float(f(t[0].item())) for f in (method.path.alpha, method.path.sigma))

    diffusion, v, flow = gk.Diffusion(), gk.Diffusion("continuous_vp", prediction="v"), gk.FlowMatching()
    many = {"steps": 300}
    consistency = gk.Consistency()
    return {
        "epsilon": (diffusion.sample, many, 1.0, *of_path(diffusion, "epsilon"), 1.5e-2),
        "v": (v.sample, {"steps": 200, "sampler": "dpmpp_2m"}, 1.0, *of_path(v, "v"), 1.5e-2),
        "euler": (flow.sample, many, 1.0, *of_path(flow, "velocity"), 1.5e-2),
        "heun": (flow.sample, {"steps": 200, "sampler": "heun"}, 1.0, *of_path(flow, "velocity"), 1.5e-2),
        "edm": (
            consistency.sample_ode, {"steps": 100}, 80.0, DenoiserNetwork(DATA),
            lambda t: (1.0, float((4.0 * t[0]).exp())), 1.5e-2,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", settings())
@pytest.mark.parametrize("through", [False, True])
def test_exact_energy_gives_the_exact_posterior(name, through):
    sample, options, scale, network, scales, tolerance = settings()[name]

    def energy(x, t, y):
        alpha, sigma = scales(t)
        v = alpha**2 * S**2 + sigma**2
        if not through:  # a classifier, of the state alone
            y = MU + alpha * S**2 / v * (x - alpha * MU)
        return ((C - y) ** 2 / (2.0 * (S**2 * sigma**2 / v + TAU**2))).sum(1)

    more = {"guide": energy, "guide_through": through, "dtype": F64, "model_dtype": F64}
    x = sample(network, noise=scale * START, **more, **options)
    mean, plus, minus = x[:, 0].tolist()
    assert mean == pytest.approx(MEAN, abs=tolerance)
    assert (plus - minus) / 2 == pytest.approx(P**0.5, abs=tolerance)
    assert plus + minus == pytest.approx(2 * mean, abs=1e-9)


def quadratic(x, t, y, target=0.5):
    target = target.reshape(-1, 1, 1) if isinstance(target, torch.Tensor) else target
    return ((y - target) ** 2).flatten(1).sum(1)


CASES = {
    "ddim": (gk.Diffusion(), {"eta": 0.7}),
    "unipc": (gk.Diffusion(prediction="v"), {"sampler": "unipc"}),
    "heun": (gk.FlowMatching(sigma_min=0.1), {"sampler": "heun"}),
    "consistency": (gk.Consistency(), {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_steered_output_is_the_formula_written_by_autograd(name, through, guided, path):
    """m' = m - w sigma^2 / (alpha b) grad E, in a network of its own, which is not told of a guide."""
    method, options = CASES[name]
    w = torch.tensor([0.0, 0.5, 1.0, 2.0, -1.0], dtype=F64)
    cond, null = torch.linspace(0.1, 0.5, 5), torch.full((5,), 0.7)
    w = w * (1e-5 if name == "ddim" else 1.0)  # at first its y is 157 x

    def network(x, t, y):
        return torch.sin(x * y.reshape(-1, 1, 1).to(x.dtype) + 0.1 * t.reshape(-1, 1, 1).to(x.dtype))

    def plain(x, t):
        if not guided:
            return network(x, t, cond)
        return network(x, t, null) + 2.0 * (network(x, t, cond) - network(x, t, null))

    def parts(t):
        """a, b, c_in, alpha, sigma at what the network is told."""
        t = float(t[0].double())
        if name == "consistency":
            s, f = float(torch.tensor(4.0 * t, dtype=F64).exp()), method.function
            return *f.data(s), float(f.c_in(s)), 1.0, s
        prediction = getattr(method, "prediction", "velocity")
        return *method.path.data(prediction, t), 1.0, float(method.path.alpha(t)), float(method.path.sigma(t))

    def manual(seen, t):
        a, b, c_in, alpha, sigma = parts(t)
        if alpha == 0.0 or sigma == 0.0:
            return plain(seen, t)
        with torch.enable_grad():
            x = (seen / c_in).requires_grad_()
            m = plain(c_in * x, t)
            y = a * x + b * (m if through else m.detach())
            own = quadratic(x, t, y if through else y.detach() + 0.3 * x)
            (g,) = torch.autograd.grad(own.sum(), x)
        return m.detach() - w.reshape(-1, 1, 1) * sigma**2 / (alpha * b) * g

    def energy(x, t, y):
        return quadratic(x, t, y if through else y + 0.3 * x).sum()

    given = {"cond": {"y": cond}, **({"uncond": {"y": null}, "guidance_scale": 2.0} if guided else {})}
    options = {"steps": 4, "seed": 3, "dtype": F64, "model_dtype": F64, **options}
    got = method.sample(network, SHAPE, guide=energy, guide_scale=w, guide_through=through, **given, **options)
    wanted = method.sample(manual, SHAPE, **options)
    # Times are told in float64, but for the discrete ones; ln(s) / 4 is read back.
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "more", [{}, {"model_dtype": torch.bfloat16}, {"guidance_rescale": 0.5}, {"apg": gk.APG(momentum=-0.5)}]
)
def test_guide_is_split_with_the_batch(name, more):
    method, options = CASES[name]
    target, w = torch.linspace(-1.0, 1.0, 5), torch.linspace(0.0, 0.3, 5)
    options = {"steps": 3, "seed": 1, "guide": quadratic, "guide_cond": {"target": target}, "guide_scale": w, **options}
    if "apg" in more and name == "heun":
        return
    if "apg" in more or "guidance_rescale" in more:
        options |= {"cond": {"y": torch.ones(5)}, "uncond": {"y": torch.full((5,), 0.5)}, "guidance_scale": 2.0}

    def model(x, t, y=None):
        return rotating(x, t) if y is None else conditioned(rotating(x, t), t, y)

    whole = method.sample(model, SHAPE, **options, **more)
    assert whole.isfinite().all() and not whole.requires_grad
    assert torch.equal(method.sample(model, SHAPE, batch_size=2, **options, **more), whole)


def test_scale_of_zero_and_constant_weights_change_nothing_else():
    options = {"steps": 4, "seed": 2, "eta": 0.5}
    plain = gk.Diffusion().sample(rotating, SHAPE, **options)
    torch.testing.assert_close(
        gk.Diffusion().sample(rotating, SHAPE, guide=quadratic, guide_scale=0.0, **options), plain
    )
    weight = torch.nn.Linear(4, 4)
    gk.Diffusion().sample(lambda x, t: weight(x), SHAPE, steps=2, guide=quadratic)
    assert weight.weight.grad is None


def test_guide_is_refused_where_no_gradient_is_taken():
    with torch.no_grad():
        plain = gk.Diffusion().sample(rotating, SHAPE, steps=2, seed=0, guide=quadratic)
    assert torch.equal(plain, gk.Diffusion().sample(rotating, SHAPE, steps=2, seed=0, guide=quadratic))
    words = "guide: expected None under torch.inference_mode"
    with torch.inference_mode(), pytest.raises(ValueError, match=words):
        gk.Diffusion().sample(rotating, SHAPE, steps=2, guide=quadratic)


def test_without_the_network_no_activations_are_kept():
    seen = []

    def model(x, t):
        seen.append(torch.is_grad_enabled() and x.requires_grad)
        return rotating(x, t)

    for through in (True, False):
        gk.Diffusion().sample(
            model, SHAPE, steps=1, guide=lambda x, t, y: (x * y).sum(), guide_through=through, guide_scale=0.1
        )
    assert seen == [True, False]


def test_guided_loops_run_uncaptured_and_say_so(captures):
    loop = gk.Loop(gk.Diffusion(), rotating)
    options = {"steps": 3, "seed": 1, "guide": quadratic}
    with pytest.warns(UserWarning, match="rotating runs uncaptured: a guide takes a gradient after every network call"):
        got = loop.sample(SHAPE, **options)
    assert torch.equal(got, gk.Diffusion().sample(rotating, SHAPE, **options)) and loop.captured == 0
    assert torch.equal(loop.sample(SHAPE, steps=3, seed=1), gk.Diffusion().sample(rotating, SHAPE, steps=3, seed=1))
    assert loop.captured == 1 and loop.refusal is None


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"guide_scale": 2.0}, ValueError, "guide_scale: expected None without guide, got 2.0"),
        ({"guide_cond": {}}, ValueError, "guide_cond: expected None without guide"),
        ({"guide": 3}, TypeError, "guide: expected a callable, got int"),
        ({"guide": quadratic, "guide_through": 1}, TypeError, "guide_through: expected a bool, got int"),
        ({"guide": quadratic, "guide_scale": "x"}, TypeError, "guide_scale: expected a number"),
        (
            {"guide": quadratic, "guide_cond": {"target": torch.ones(2)}},
            ValueError,
            r"guide_cond\['target'\]: expected",
        ),
        ({"guide": quadratic, "differentiable": True}, ValueError, "guide: expected None with differentiable=True"),
        ({"guide": lambda x, t, y: 1.0}, TypeError, "guide: expected it to return a tensor of float32, .* got float"),
        (
            {"guide": lambda x, t, y: x},
            ValueError,
            r"guide: expected it to return shape \(\) or \(5,\), .* got \(5, 3, 4\)",
        ),
        ({"guide": lambda x, t, y: x.detach().sum()}, ValueError, "guide: expected an energy that depends on x"),
        (
            {"guide": lambda x, t, y: y.sum(), "guide_through": False},
            ValueError,
            "guide: expected an energy that depends",
        ),
    ],
)
def test_bad_guide_is_named(options, error, words):
    with pytest.raises(error, match=words):
        gk.Diffusion().sample(rotating, SHAPE, steps=2, **options)
