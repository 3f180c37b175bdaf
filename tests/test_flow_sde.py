"""The stochastic samplers of flows: their marginals on Gaussians in closed form, their formulas, their log-density."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import PathNetwork, gaussian, mixture
from torch.distributions import Normal

import genkern as gk
from genkern import check
from genkern.noise import Noise, Purpose
from genkern.samplers import CPS, Euler, EulerMaruyama, OnPath, Overshoot

F64 = torch.float64
FLOW = gk.FlowMatching()
MEAN, STD = 0.8, 0.5
SHAPE = (5, 3, 4)
NAMES = ("sde", "flow_grpo", "cps", "overshoot")


def marginal(flow, t):
    """Mean and variance at t of data N(MEAN, STD^2)."""
    alpha, sigma = flow.path.alpha(t), flow.path.sigma(t)
    return alpha * MEAN, alpha**2 * STD**2 + sigma**2


def ends(sampler, times, flow=FLOW, mean=MEAN, std=STD, start=None):
    """Mean and variance at the last of the times, exactly: the perfect network of a Gaussian is affine in x, and so is
    every step, so that both follow from the rows alone."""
    network = PathNetwork(gaussian(mean, std, dim=1), flow.path, "velocity")
    m, v = marginal(flow, times[0]) if start is None else start
    for stage in sampler.stages(OnPath(flow.path, "velocity"), torch.tensor(times, dtype=F64).numpy()):
        t = torch.full((2,), stage.model_time, dtype=F64)
        at_zero, at_one = network(torch.tensor([[0.0], [1.0]], dtype=F64), t).flatten().tolist()
        gain = stage.out.x + stage.out.m * (at_one - at_zero)
        m, v = gain * m + stage.out.m * at_zero, gain**2 * v + stage.out.z**2
    return m, v


def grid(first, last, n):
    return [first + (last - first) * k / n for k in range(n + 1)]


@pytest.mark.parametrize("path", ["cond_ot", "cosine"])
@pytest.mark.parametrize(
    "make, first, last",
    [
        (lambda n: EulerMaruyama(1.0), 0.0, 1.0),
        (lambda n: EulerMaruyama(1.0), 0.95, 0.0),
        (lambda n: EulerMaruyama(0.7, "flow_grpo"), 0.2, 0.95),
        (lambda n: EulerMaruyama(0.7, "flow_grpo"), 0.95, 0.2),
        (lambda n: Overshoot(0.5), 0.0, 1.0),
        (lambda n: Overshoot(2.0), 0.0, 1.0),
        (lambda n: CPS(2.0 / math.sqrt(n)), 0.0, 1.0),  # noise of an SDE: its variance goes as the step
    ],
)
def test_mean_and_variance_have_order_one(make, first, last, path):
    flow = gk.FlowMatching(path)
    wanted = marginal(flow, last)
    errors = [
        [abs(got - exact) for got, exact in zip(ends(make(n), grid(first, last, n), flow), wanted, strict=True)]
        for n in (200, 400)
    ]
    for coarse, fine in zip(*errors, strict=True):
        assert fine < 0.02
        if coarse > 1e-12:  # on a straight path the mean is exact
            assert math.log2(coarse / fine) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_cps_is_exact_on_a_point_at_any_number_of_steps(steps, eta):
    mean, variance = ends(CPS(eta), grid(0.0, 0.9, steps), mean=MEAN, std=0.0, start=(0.0, 1.0))
    assert mean == pytest.approx(0.9 * MEAN) and variance == pytest.approx(0.1**2)


def test_flow_grpo_adds_variance_near_the_noise_that_cps_does_not():
    """From x_0 the first steps have the gain 1 - eta^2 / 2 and the variance eta^2: an excess of eta^4 / 4."""
    n, eta = 1000, 0.7
    excess = ends(EulerMaruyama(eta, "flow_grpo"), grid(0.0, 1.0, n)[:2])[1] - marginal(FLOW, 1 / n)[1]
    assert excess == pytest.approx(eta**4 / 4, rel=0.02)
    assert abs(ends(CPS(eta), grid(0.0, 1.0, n)[:2])[1] - marginal(FLOW, 1 / n)[1]) < 0.01


@pytest.mark.parametrize("sampler", [EulerMaruyama(0.0), EulerMaruyama(0.0, "flow_grpo"), CPS(0.0), Overshoot(0.0)])
def test_without_noise_it_is_eulers_method(sampler):
    table, euler = (s.stages(OnPath(FLOW.path, "velocity"), torch.tensor([0.0, 0.3, 1.0]).double().numpy())
                    for s in (sampler, Euler()))  # fmt: skip
    for one, two in zip(table, euler, strict=True):
        assert (one.out.x, one.out.m) == pytest.approx((two.out.x, two.out.m)) and one.out.z == pytest.approx(0.0)


@pytest.mark.parametrize("sampler", ["sde", "overshoot", CPS(0.2)])
def test_samples_have_the_moments_of_the_mixture(sampler):
    data, n = mixture(), 10_000
    network = PathNetwork(data, FLOW.path, "velocity")
    x = FLOW.sample(network, (n, 2), steps=60, sampler=sampler, dtype=F64, seed=0)
    weights = data.weights[:, None]
    mean, second = (weights * data.means).sum(0), (weights * (data.means**2 + data.stds[:, None] ** 2)).sum(0)
    error = 4 * float((second - mean**2).max().sqrt()) / math.sqrt(n)  # four standard errors
    assert (x.mean(0) - mean).abs().max() < 0.02 + error
    assert (x.square().mean(0) - second).abs().max() < 0.04 + 4 * error


def tensors(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=g, dtype=F64).to(dtype) for _ in range(3)]


def of(time):
    return time.reshape(-1, 1, 1) if isinstance(time, torch.Tensor) else time


def gauss(name, x, v, t, s):
    """Mean and standard deviation as the papers have them: tau = 1 - t runs from the noise at 1 to the data at 0, and
    their network predicts u = -v."""
    tau, tau_s, u = 1 - of(t), 1 - of(s), -v
    root = lambda a: torch.as_tensor(a, dtype=F64).sqrt()  # noqa: E731
    if name == "flow_grpo":  # arXiv:2505.05470, eq. (9); at tau = 1 the code takes the next tau below the bar
        dt, below = tau_s - tau, torch.as_tensor(1 - tau, dtype=F64)
        std = 0.7 * root(tau / torch.where(below == 0, torch.as_tensor(1 - tau_s, dtype=F64), below))
        return x * (1 + std**2 / (2 * tau) * dt) + u * (1 + std**2 * (1 - tau) / (2 * tau)) * dt, std * root(-dt)
    if name == "cps":  # arXiv:2509.05952
        std = torch.as_tensor(tau_s * math.sin(0.7 * math.pi / 2), dtype=F64)
        return (x - tau * u) * (1 - tau_s) + (x + u * (1 - tau)) * root(tau_s**2 - std**2), std
    if name == "sde":  # arXiv:2401.08740, w = sigma
        score = -(x - of(t) * v) / tau
        return x + (tau - tau_s) * (v + tau / 2 * score), root(tau * (tau - tau_s))
    o = torch.as_tensor(2 * of(s) - of(t), dtype=F64).clamp(max=1.0)  # arXiv:2411.19415, c = 1
    return of(s) / o * (x + (o - of(t)) * v), root(tau_s**2 - (of(s) / o * (1 - o)) ** 2)


TIMES = [(0.0, 0.1), (0.4, 0.5), (torch.tensor([0.0, 0.2, 0.5, 0.7, 0.8], dtype=F64), 0.9)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("t, s", TIMES)
def test_step_is_the_papers_and_its_density_the_gaussians(name, t, s, path):
    x, v, u = tensors(F64)
    mean, std = gauss(name, x, u + 2.0 * (v - u), t, s)
    options = {"sampler": name, "uncond": u, "guidance_scale": 2.0}
    x_s, log_prob = FLOW.step(x, v, t, s, noise=Noise(3), **options)
    torch.testing.assert_close(x_s, mean + std * gk.ops.randn(SHAPE, noise=Noise(3), dtype=F64), rtol=1e-6, atol=1e-6)
    wanted = Normal(mean, std.expand(SHAPE)).log_prob(x_s).flatten(1).sum(1)
    torch.testing.assert_close(log_prob, wanted)
    same, mean_log = FLOW.step(x, v, t, s, x_s=x_s, reduction="mean", **options)
    assert same is x_s
    torch.testing.assert_close(mean_log, wanted / 12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_scoring_has_the_bits_of_sampling_in_any_batch(name, dtype, device):
    x, v, _ = (each.to(device) for each in tensors(dtype))
    t = torch.linspace(0.0, 0.8, 5, device=device)
    x_s, sampled = FLOW.step(x, v, t, 0.9, sampler=name, noise=Noise(1))
    _, scored = FLOW.step(x, v.clone().requires_grad_(), t, 0.9, sampler=name, x_s=x_s)
    assert torch.equal(scored, sampled)
    for part in (slice(0, 2), slice(4, 5)):
        _, alone = FLOW.step(x[part], v[part], t[part], 0.9, sampler=name, x_s=x_s[part])
        assert torch.equal(alone, sampled[part])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_gaussian_with_the_state_held_constant(name, path):
    x, v, _ = tensors(F64)
    one, two = v.clone().requires_grad_(), v.clone().requires_grad_()
    x_s, log_prob = FLOW.step(x, one, 0.4, 0.5, sampler=name, noise=Noise(3))
    mean, std = gauss(name, x, two, 0.4, 0.5)
    wanted = Normal(mean, std.expand(SHAPE)).log_prob(x_s.detach()).flatten(1).sum(1)
    weights = torch.linspace(-1.0, 2.0, 5, dtype=F64)
    (got,), (expected,) = (
        torch.autograd.grad((each * weights).sum(), m) for each, m in ((log_prob, one), (wanted, two))
    )
    assert not x_s.requires_grad
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_sampler_is_its_steps_one_after_another(name):
    model, x, seed = torch.nn.Linear(4, 4), torch.randn(SHAPE), 5
    times = [0.0, 0.3, 0.4, 0.9]
    with torch.no_grad():
        got = FLOW.sample(lambda x, t: model(x), x0=x, times=times, sampler=name, seed=seed)
        for k, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            x, _ = FLOW.step(x, model(x), t, s, sampler=name, noise=Noise(seed).at(Purpose.STEP, k))
    assert torch.equal(x, got)


@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_depend_on_their_batch_and_end_without_noise(name):
    model = torch.nn.Linear(4, 4)

    def network(x, t):
        return torch.stack([model(each) for each in x])

    x = FLOW.sample(network, SHAPE, steps=4, sampler=name, seed=1)
    assert torch.equal(FLOW.sample(network, SHAPE, steps=4, sampler=name, seed=1, batch_size=2), x)
    assert not torch.equal(FLOW.sample(network, SHAPE, steps=4, sampler=name, seed=2), x)
    if name in ("cps", "overshoot"):  # (1 - t) z: the others' last step starts from t < 1
        table = (CPS() if name == "cps" else Overshoot()).stages(
            OnPath(FLOW.path, "velocity"), torch.tensor([0.5, 1.0]).double().numpy()
        )
        assert table[-1].out.z == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_along_another_path_it_is_that_paths_sampler(name):
    """A network trained on the straight path, asked along the cosine one, against one trained there."""
    other = gk.FlowMatching("cosine")
    data = gaussian(MEAN, STD)
    one, two = (PathNetwork(data, flow.path, "velocity") for flow in (FLOW, other))
    options = {"times": [0.1, 0.3, 0.6, 0.9], "sampler": name, "seed": 2, "dtype": F64}
    x0 = torch.randn(6, 2, dtype=F64)
    got = FLOW.sample(one, x0=x0, along=other.path, **options)
    torch.testing.assert_close(got, other.sample(two, x0=x0, **options))


def test_captured_sampler_has_the_bits_of_the_uncaptured_one(captures):
    model = torch.nn.Linear(4, 4).eval()

    def network(x, t):
        return model(x)

    for name in NAMES:
        for seed in range(2):
            options = {"steps": 4, "sampler": name, "seed": seed}
            wanted = FLOW.sample(network, SHAPE, **options)
            assert torch.equal(FLOW.sample(network, SHAPE, **options, cuda_graph=True), wanted)


X, V, _ = tensors(torch.float32)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: EulerMaruyama(-1.0), ValueError, "eta: expected a finite number >= 0"),
        (lambda: EulerMaruyama(1.0, "grpo"), ValueError, "diffusion: expected one of 'sigma', 'flow_grpo', got 'grpo'"),
        (lambda: CPS(1.5), ValueError, "eta: expected a number from 0 to 1, got 1.5"),
        (lambda: Overshoot(-1.0), ValueError, "c: expected a finite number >= 0"),
        (lambda: FLOW.sample(torch.sin, x1=X, direction="backward", sampler="cps"), ValueError, "times: .* toward"),
        (lambda: FLOW.step(X, V, 0.5, 0.4), ValueError, "t, s: expected t < s, toward the data, got 0.5 and 0.4"),
        (lambda: FLOW.step(X, V, 0.5, 1.5), ValueError, "s: expected a number from 0 to 1, got 1.5"),
        (lambda: FLOW.step(X, V, 0.5, 1.0, sampler="cps"), ValueError, "std: expected > 0: a step without noise"),
        (lambda: FLOW.step(X, V, 0.5, 0.6, sampler="heun"), ValueError, "sampler: expected one of 'sde'"),
        (lambda: FLOW.step(X, V, 0.5, 0.6, sampler=Euler()), TypeError, "sampler: expected 'sde'"),
        (lambda: FLOW.step(X, V, 0.5, 0.6, x_s=X, noise=Noise(0)), ValueError, "noise: expected None beside x_s"),
        (lambda: FLOW.step(None, V, 0.5, 0.6), TypeError, "x_t: expected a torch tensor, got NoneType"),
        (
            lambda: FLOW.log_prob(torch.sin, X, sampler=CPS()),
            ValueError,
            "times: expected increasing|sampler: expected",
        ),
        (
            lambda: gk.Consistency().sample_ode(torch.sin, (2, 2), sampler=CPS()),
            ValueError,
            "sampler: expected a solver",
        ),
    ],
)
def test_bad_argument_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def times(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.float32, device=device)


@pytest.mark.parametrize("t, s, words", [
    (times(0.1, 0.5, 0.6, 0.2, 0.3), 0.5, "0.5 and 0.5 at index 1"),
    (0.5, times(0.6, 0.7, 0.4, 0.8, 0.9), "0.5 and 0.4 at index 2"),
    (times(0.1, 0.2, 0.3, 0.4, 0.9), times(0.2, 0.3, 0.4, 0.5, 0.8), "0.9 and 0.8 at index 4"),
    (torch.tensor(0.25), times(0.5, 0.5, 0.5, 0.5, 0.125), "0.25 and 0.125 at index 4"),
])  # fmt: skip
def test_step_away_from_the_data_is_refused_in_any_sample(t, s, words, device):
    x, v = X.to(device), V.to(device)
    moved = (time.to(device) if isinstance(time, torch.Tensor) and time.ndim else time for time in (t, s))
    with gk.debug(values=True), pytest.raises(ValueError, match=f"^t, s: expected t < s, toward the data, got {words}"):
        FLOW.step(x, v, *moved)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="t, s: expected t < s"):
            FLOW.step(X, V, t, s)


def test_times_on_the_cpu_are_looked_at_beside_a_state_that_is_not(device):
    with pytest.raises(ValueError, match="t, s: expected t < s, toward the data, got 0.5 and 0.25 at index 0"):
        FLOW.step(X.to(device), V.to(device), torch.tensor(0.5), torch.tensor(0.25))


def test_times_that_are_not_looked_at_are_not_refused(monkeypatch):
    for asked in (check, check.values):
        monkeypatch.setattr(asked, "visible", lambda value: not isinstance(value, torch.Tensor))  # as on a device
    t = times(0.1, 0.5, 0.6, 0.2, 0.3)
    assert all(torch.isfinite(found[[0, 3, 4]]).all() for found in FLOW.step(X, V, t, 0.5))
