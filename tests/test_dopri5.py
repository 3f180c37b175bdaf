"""Dormand-Prince 5(4): torchdiffeq's steps, one step for each sample, and what a solve costs and refuses."""

from __future__ import annotations

import math

import pytest
import torch
from analytic import PathNetwork, gaussian, mixture
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import genkern as gk
from genkern.samplers import Dopri5, adaptive, dopri5, embedded

F64 = torch.float64
FLOW = gk.FlowMatching()


def column(t, x):
    return t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def field(x, t):
    return (3 * x + 8 * column(t, x)).sin() * 2


def mild(x, t):
    return (x + 2 * column(t, x)).sin()


def rational(x, t):
    """Additions and multiplications alone, which have the same bits in any batch."""
    return x * (1 - 0.3 * x * x) * (2 - 3 * column(t, x))


class Logged(torch.nn.Module):
    """The field as torchdiffeq calls it, with the steps that it has accepted."""

    def __init__(self):
        super().__init__()
        self.steps, self.calls = [], 0

    def forward(self, t, x):
        self.calls += 1
        return field(x, t.expand(x.shape[0]))

    def callback_accept_step(self, t, x, dt):
        self.steps.append((float(t), float(dt)))


def test_tableau_has_order_five_and_an_error_of_order_four():
    """The conditions on quadrature, sum b c^k = 1 / (k + 1), the sums of the rows, and sum b_i a_ij c_j = 1 / 6."""
    a, c = [(), *dopri5.A, dopri5.B[:6]], dopri5.NODES
    for weights, order in ((dopri5.B, 5), (dopri5.B_STAR, 4)):
        for k in range(order):
            assert sum(w * t**k for w, t in zip(weights, c, strict=True)) == pytest.approx(1 / (k + 1))
        inner = [sum(w * c[j] for j, w in enumerate(row)) for row in a]
        assert sum(w * s for w, s in zip(weights, inner, strict=True)) == pytest.approx(1 / 6)
    assert [sum(row) for row in a] == pytest.approx(list(c))


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0], [-0.5, 0.3, 0.35, 2.0], [0.7, 0.2, 0.1]])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_steps_are_those_of_torchdiffeq(times, tolerance):
    odeint = pytest.importorskip("torchdiffeq").odeint
    x, theirs, grid = torch.randn(6, 4, dtype=F64), Logged(), torch.tensor(times, dtype=F64)
    options = {"step_t": grid[1:]}  # steps that end at the times, as ours do
    wanted = odeint(theirs, x, grid, rtol=tolerance, atol=tolerance, method="dopri5", options=options)
    got, trajectory, stats = Dopri5(tolerance, tolerance).solve(
        field, x, times, return_trajectory=True, return_stats=True
    )
    accepted = stats.accepted[:, 0]
    steps = torch.tensor(theirs.steps, dtype=F64)
    torch.testing.assert_close(stats.t[accepted, 0], steps[:, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stats.dt[accepted, 0].abs(), steps[:, 1].abs(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(trajectory, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(trajectory[-1], got)
    assert (stats.calls, stats.calls_after_end) == (theirs.calls, 0)


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("forward", [True, False])
def test_float32_ends_within_ten_tolerances_of_torchdiffeq(control, forward, device):
    odeint = pytest.importorskip("torchdiffeq").odeint
    x, tolerance = torch.randn(64, 4, device=device), 1e-4
    start = {"x0": x} if forward else {"x1": x, "direction": "backward"}
    got = FLOW.sample(mild, sampler=Dopri5(tolerance, tolerance, control), **start)
    grid = torch.tensor([0.0, 1.0] if forward else [1.0, 0.0], device=device)
    wanted = odeint(
        lambda t, x: mild(x, t.expand(x.shape[0])), x, grid, rtol=tolerance, atol=tolerance, method="dopri5"
    )[-1]
    assert (got - wanted).abs().max() < 10 * tolerance


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_error_on_the_affine_map_of_a_gaussian_falls_with_the_tolerance(control):
    mean, std, z = 1.5, 0.4, torch.randn(16, 2, dtype=F64)

    def network(x, t):  # PathNetwork for a time a sample
        t = column(t, x)
        return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2) * (x - t * mean)

    at = torch.full((16,), 0.3, dtype=F64)
    torch.testing.assert_close(network(z, at), PathNetwork(gaussian(mean, std), FLOW.path, "velocity")(z, at))
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        x = FLOW.sample(network, x0=z, sampler=Dopri5(tolerance, tolerance, control), dtype=F64)
        errors.append(float((x - (mean + std * z)).abs().max()))
    assert errors[0] > 20 * errors[1] > 400 * errors[2]
    assert errors[2] < 10 * 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sample_has_its_own_steps_in_any_batch(dtype, device, path):
    pair, x = Dopri5(1e-5, 1e-5, "sample"), torch.randn(9, 5, device=device, dtype=dtype) * 2
    got, stats = pair.solve(rational, x, [0.0, 1.0], return_stats=True)
    counts = (stats.dt != 0).sum(0)
    assert counts.min() < counts.max()
    for low, high in ((0, 1), (3, 5), (2, 9)):
        part, own = pair.solve(rational, x[low:high], [0.0, 1.0], return_stats=True)
        assert torch.equal(part, got[low:high])
        most = min(len(own.dt), len(stats.dt))
        assert torch.equal(own.dt[:most], stats.dt[:most, low:high])
    for sizes in (1, 4):
        again = FLOW.sample(rational, x0=x, sampler=pair, batch_size=sizes, dtype=dtype)
        assert torch.equal(again, got)


def test_one_sample_has_the_same_steps_under_both_controls():
    x = torch.randn(1, 6, dtype=F64)
    one, two = (
        Dopri5(1e-6, 1e-6, control).solve(mild, x, [0.0, 1.0], return_stats=True) for control in ("batch", "sample")
    )
    torch.testing.assert_close(one[1].t, two[1].t, rtol=0, atol=0.01)  # the powers of one are rounded to 8 bits
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=1e-6)


def test_network_is_told_each_samples_time():
    seen = []

    def network(x, t):
        seen.append(t)
        return rational(x, t)

    FLOW.sample(network, x0=torch.randn(3, 2), sampler=Dopri5(control="sample"))
    assert {t.shape for t in seen} == {(3,)} and {t.dtype for t in seen} == {torch.float32}
    assert any(len(t.unique()) > 1 for t in seen)
    assert all(0.0 <= float(t.min()) and float(t.max()) <= 1.0 for t in seen)


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_reading_the_flag_late_moves_nothing(control):
    pair, x, grid = Dopri5(control=control), torch.randn(4, 3), torch.tensor([0.0, 0.6, 1.0]).double().numpy()

    def solved(lag):
        state = embedded.Integration(pair, x, True)

        def velocity(seen, t):
            return field(seen, t), None

        return adaptive.walk(
            state, lambda: state.begin(velocity), lambda: state.attempt(velocity), grid, keep=True, log=True, lag=lag
        )

    (end, kept, stats), (late_end, late_kept, late) = solved(0), solved(1)
    assert torch.equal(end, late_end) and all(map(torch.equal, kept, late_kept))
    assert stats.calls_after_end == 0 and late.calls_after_end == 12 and late.calls == stats.calls + 12
    assert (late.dt == 0).all(1).sum() == 2 and not late.accepted[(late.dt == 0)].any()


class Passes(TorchDispatchMode):
    """Counts the operations that read or write as many elements as the state has."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in op._schema.arguments)
        full = any(isinstance(t, torch.Tensor) and t.numel() >= self.size for t in tree_leaves((args, kwargs, out)))
        if full and not view and "empty" not in str(op):
            self.names.append(str(op))
        return out


def test_passes_of_an_accepted_step():
    """Six rows, the norm of the error, and the choice of the state and the slope."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    x = torch.randn(16, 64)

    def nothing(x, t):  # a network that makes no pass
        return x

    counts = []
    for end in (1e-4, 1.0):  # what the first step costs, and what further ones do
        with Passes(x.numel()) as ours:
            stats = Dopri5().solve(nothing, x, [0.0, end], return_stats=True)[1]
        assert stats.accepted.all()
        counts.append((len(ours.names), len(stats.t)))
    assert counts[0][1] == 1 and counts[1][1] > 3
    assert (counts[1][0] - counts[0][0]) / (counts[1][1] - 1) <= 9
    logged = Logged()
    logged.forward = lambda t, x: x
    with Passes(x.numel()) as theirs:
        odeint(logged, x, torch.tensor([0.0, 1.0]), rtol=1e-5, atol=1e-5, method="dopri5")
    assert len(theirs.names) > 5 * counts[1][0]


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_what_the_network_returns_may_be_its_own_memory(control):
    """Its input, a view of it, or one tensor that every call writes anew."""
    x, own = torch.randn(4, 4), torch.empty(4, 4)
    options = {"x0": x, "sampler": Dopri5(control=control)}

    def reused(x, t):
        return own.copy_(x.flip(1))

    assert torch.equal(FLOW.sample(lambda x, t: x, **options), FLOW.sample(lambda x, t: x.clone(), **options))
    flipped = FLOW.sample(lambda x, t: x.flip(1), **options)
    assert torch.equal(FLOW.sample(reused, **options), flipped)
    assert torch.equal(FLOW.sample(lambda x, t: x.t(), **options), FLOW.sample(lambda x, t: x.t().clone(), **options))
    torch.testing.assert_close(FLOW.sample(lambda x, t: x, **options), x * math.e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("scale", [3.0, torch.linspace(0.5, 3.0, 6)])
def test_guided_solve_is_that_of_the_guided_field(control, scale):
    x, y = torch.randn(6, 4), torch.rand(6)

    def network(x, t, y):
        return torch.sin(x) * y.reshape(-1, 1).to(x.dtype)

    options = {"x0": x, "sampler": Dopri5(control=control), "seed": 0}
    got = FLOW.sample(network, cond={"y": y}, uncond={"y": 0 * y + 0.5}, guidance_scale=scale, **options)
    w = torch.as_tensor(scale).expand(6).reshape(-1, 1)
    expected = FLOW.sample(lambda x, t: torch.sin(x) * (0.5 + w * (y.reshape(-1, 1) - 0.5)), **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_network_sees_its_dtype_and_keeps_the_state_in_float32(model_dtype):
    seen = []

    def network(x, t):
        seen.append(x.dtype)
        return rational(x, t)

    x = torch.randn(4, 8)
    got = FLOW.sample(network, x0=x, sampler=Dopri5(1e-2, 1e-2), model_dtype=model_dtype)
    assert set(seen) == {model_dtype} and got.dtype == torch.float32
    torch.testing.assert_close(got, FLOW.sample(rational, x0=x, sampler=Dopri5()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_captured_solve_has_the_bits_of_the_uncaptured_one(control, model_dtype, captures):
    model = torch.nn.Linear(4, 4).to(model_dtype).eval()

    def network(x, t, y):
        return model(x).sin() * y.reshape(-1, 1)

    pair, flow = Dopri5(1e-3, 1e-3, control), gk.FlowMatching()
    loop = gk.Loop(flow, network)
    for seed in range(3):
        options = {"cond": {"y": torch.rand(5)}, "uncond": {"y": torch.rand(5)}, "guidance_scale": 2.0 + seed}
        options |= {"sampler": pair, "model_dtype": model_dtype, "seed": seed, "times": [0.0, 0.5, 1.0]}
        options |= {"return_trajectory": True, "return_stats": True}
        x, trajectory, stats = flow.sample(network, (5, 4), **options)
        for other in (loop.sample((5, 4), **options), flow.sample(network, (5, 4), **options, cuda_graph=True)):
            assert torch.equal(other[0], x) and torch.equal(other[1], trajectory)
            assert torch.equal(other[2].dt, stats.dt) and other[2].calls == stats.calls
    assert len(captures) == 2 and loop.captured == 1 and loop.refusal is None


def test_rectified_pairs_and_noise_are_those_of_the_other_samplers():
    flow = gk.RectifiedFlow()
    x0, x1 = flow.pairs(rational, (5, 3), sampler="dopri5", seed=4)
    assert torch.equal(flow.sample(rational, (5, 3), sampler="dopri5", seed=4), x1)
    torch.testing.assert_close(flow.sample(rational, x0=x0, sampler="rk4", steps=50), x1, rtol=1e-3, atol=1e-3)


def test_mixture_ends_where_rk4_does():
    class Fields(PathNetwork):
        def __call__(self, x, t):
            return super().__call__(x, t)

    network = Fields(mixture(), FLOW.path, "velocity")
    options = {"dtype": F64, "seed": 0}
    x = FLOW.sample(network, (16, 2), sampler=Dopri5(1e-8, 1e-8), **options)
    torch.testing.assert_close(x, FLOW.sample(network, (16, 2), sampler="rk4", steps=400, **options), atol=1e-6, rtol=0)


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_no_samples_or_no_elements_need_no_call(control):
    pair = Dopri5(control=control)
    for shape in ((0, 3), (3, 0)):
        x, trajectory, stats = pair.solve(None or field, torch.empty(shape), [0, 1], return_trajectory=True,
                                          return_stats=True)  # fmt: skip
        assert x.shape == shape and trajectory.shape == (2, *shape) and stats.calls == 0
        assert FLOW.sample(field, shape, sampler=pair).shape == shape


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_solve_that_does_not_end_is_an_error(control):
    x = torch.tensor([[0.1], [3.0]])
    with pytest.raises(RuntimeError, match=r"max_steps: expected t = 1 within 3 steps, got to t = 0\."):
        Dopri5(1e-9, 1e-9, control, max_steps=3).solve(field, x, [0.0, 1.0])
    with pytest.raises(RuntimeError, match="dt: expected a step that moves t, got one too small at t = 0.33"):
        Dopri5(control=control).solve(lambda x, t: x * x, x, [0.0, 1.0])  # 3 / (1 - 3 t)
    with pytest.raises(RuntimeError, match="dt: expected a step that moves t"):
        Dopri5(control=control).solve(lambda x, t: x * math.nan, x, [0.0, 1.0])


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_log_density_is_that_of_the_gaussian(control):
    mean, std = 1.5, 0.4
    pair, x = Dopri5(1e-8, 1e-8, control), mean + std * torch.randn(6, 2, dtype=F64)

    def affine(x, t):
        t = column(t, x)
        return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2) * (x - t * mean)

    wanted = torch.distributions.Normal(mean, std)
    got = FLOW.log_prob(affine, x, sampler=pair, dtype=F64)
    torch.testing.assert_close(got, wanted.log_prob(x).sum(1), rtol=0, atol=1e-6)
    drawn, found = FLOW.sample_with_log_prob(affine, (6, 2), sampler=pair, dtype=F64, seed=1)
    assert torch.equal(drawn, FLOW.sample(affine, (6, 2), sampler=pair, dtype=F64, seed=1))
    torch.testing.assert_close(found, wanted.log_prob(drawn).sum(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_guided_log_density_is_the_one_of_rk4(control):
    x, y = torch.randn(5, 3, dtype=F64), torch.rand(5, dtype=F64)

    def network(x, t, y):
        return torch.sin(x + column(t, x)) * y.reshape(-1, 1)

    options = {"cond": {"y": y}, "uncond": {"y": 0 * y + 0.5}, "guidance_scale": 1.5, "dtype": F64}
    for divergence in ({}, {"divergence": "hutchinson", "probes": 2, "seed": 3}):
        wanted = FLOW.log_prob(network, x, steps=60, **options, **divergence)
        for more in ({}, {"batch_size": 2}, {"times": [1.0, 0.4, 0.0]}):
            got = FLOW.log_prob(network, x, sampler=Dopri5(1e-9, 1e-9, control), **options, **divergence, **more)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7)


def network(x, t):
    return x


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: Dopri5(rtol=-1e-3), ValueError, "rtol: expected a finite number >= 0, got -0.001"),
        (lambda: Dopri5(atol=0.0), ValueError, "atol: expected a number > 0, got 0.0"),
        (lambda: Dopri5(control="all"), ValueError, "control: expected one of 'batch', 'sample', got 'all'"),
        (lambda: Dopri5(max_steps=0), ValueError, "max_steps: expected"),
        (lambda: Dopri5().solve(network, torch.zeros(2, 2, dtype=torch.bfloat16), [0, 1]), TypeError, "x: expected"),
        (lambda: Dopri5().solve(None, torch.zeros(2, 2), [0, 1]), TypeError, "field: expected a callable"),
        (lambda: Dopri5().solve(network, torch.zeros(2, 2), [0, 1, 0]), ValueError, "times: expected strictly"),
        (lambda: Dopri5().solve(lambda x, t: x[:1], torch.zeros(2, 2), [0, 1]), ValueError, "field: expected output"),
        (lambda: FLOW.sample(network, (2, 2), sampler="dopri5", steps=5), ValueError, "steps: expected None"),
        (lambda: FLOW.sample(network, (2, 2), sampler="dopri5", along=FLOW.path), ValueError, "along: expected None"),
        (lambda: FLOW.sample(network, (2, 2), return_stats=True), ValueError, "return_stats: expected False"),
        (lambda: FLOW.sample(network, (2, 2), sampler="dopri5", differentiable=True), ValueError, "differentiable: "),
        (lambda: FLOW.sample(network, (2, 2), sampler="dopri5", callback=print), ValueError, "callback: expected none"),
        (lambda: FLOW.sample(network, (2, 2), sampler="dopri5", mask=torch.zeros(2, 2)), ValueError, "mask: expected"),
        (lambda: FLOW.sample(network, (2, 2), sampler="dopri5", cond=[{}]), ValueError, "cond: expected one"),
        (lambda: FLOW.log_prob(network, torch.zeros(2, 2), sampler="dopri5", steps=3), ValueError, "steps: expected"),
        (lambda: FLOW.log_prob(network, torch.zeros(2, 2), sampler=Dopri5(), differentiable=True), ValueError,
         "differentiable: expected False"),
    ],
)  # fmt: skip
def test_bad_argument_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_nothing_in_the_loop_waits_for_the_device(control):
    x = torch.randn(16, 4, device="cuda")
    pair, times = Dopri5(control=control), [0.0, 0.5, 1.0]
    wanted = pair.solve(rational, x, times)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, stats = pair.solve(rational, x, times, return_stats=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, wanted) and stats.calls_after_end == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_captured_solve_on_a_device_has_the_bits_of_the_uncaptured_one(control):
    model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).cuda()

    def network(x, t):
        return model(x)

    loop = gk.Loop(FLOW, network)
    for seed in range(3):
        options = {"sampler": Dopri5(control=control), "seed": seed, "device": "cuda"}
        assert torch.equal(loop.sample((8, 4), **options), FLOW.sample(network, (8, 4), **options))
    assert loop.captured == 1
