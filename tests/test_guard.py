"""NaN in training: found, named, and kept out of the parameters, the optimiser's state and the averages."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from conftest import NO_CUDA, cuda_works
from torch import nn
from watching import Calls

import genkern as gk
from genkern.noise import Noise
from genkern.training import EMA, EMASet, Guard, PowerDecay, fit

SHAPE = (6, 2)


class Late(Guard):
    """A host that looks at nothing before the end, as one that is far ahead of its device."""

    watched = 0

    def watch(self, step, loss, parameters):
        super().watch(step, loss, parameters)
        self.watched = step + 1
        return None

    @property
    def behind(self):
        return self.watched


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 2)

    def forward(self, x, t, r=None):
        return torch.tanh(self.mix(x)) * (1 + 0.1 * t[:, None])


class Breaks(nn.Module):
    """A network whose call of a number, and all after it, return NaN."""

    def __init__(self, call):
        super().__init__()
        self.inner, self.call, self.calls = Net(), call, 0

    def forward(self, x, t):
        self.calls += 1
        return self.inner(x, t) * (math.nan if self.calls > self.call else 1.0)


def tensors(*models):
    return [t.detach().clone() for m in models for t in m.parameters()]


def alike(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(broken, guard, device, steps=6, break_at=3):
    """fit() on a distillation whose target, teacher or data break at a step: the network, its average, both after every
    step, and the error's message."""
    net, at = Net().to(device), {"target": 99, "teacher": 99} | {broken: break_at}
    target, teacher = (Breaks(at[name]).to(device) for name in ("target", "teacher"))
    average, seen = EMA(net, 0.9), []

    def batches():
        for k in range(steps):
            yield torch.randn(SHAPE, device=device) * (math.nan if broken == "data" and k >= break_at else 1.0)

    def loss(x, k):
        return gk.Consistency().loss(net, x, teacher=teacher, target=target, solver="euler", noise=Noise(0, k))

    def update(k):
        average.update(net, guard=guard)
        seen.append(tensors(net, average.module))

    with pytest.raises(FloatingPointError) as error:
        fit(net.parameters(), loss, batches(), steps=steps, guard=guard, warmup=0, after_step=update)
    return net, average, seen, str(error.value)


@pytest.mark.parametrize("kind", [Guard, Late])
@pytest.mark.parametrize("broken, reason", [
    ("target", "target: expected finite numbers in its output"),
    ("teacher", "teacher: expected finite numbers in its output"),
    ("data", "teacher: expected finite numbers in its input"),
])  # fmt: skip
def test_what_was_not_finite_is_named_and_parameters_and_average_are_those_of_the_last_good_step(
    broken, reason, kind, device
):
    net, average, seen, message = run(broken, kind(device), device)
    assert re.match(rf"loss: expected finite numbers, got nan at step 3 of 6 \({reason}", message), message
    assert alike(tensors(net, average.module), seen[2])
    assert not alike(seen[1], seen[2])
    if kind is Late:
        assert len(seen) == 6


def test_a_step_under_the_flag_leaves_the_optimisers_state(device):
    """As many good steps have the same state, its count among it."""
    nets = [Net().to(device)]
    nets.append(copy.deepcopy(nets[0]))
    states = []
    for net, factors in zip(nets, ([1.0, 1.0, math.nan, 1.0], [1.0, 1.0]), strict=True):
        optimizer, guard, x = torch.optim.AdamW(net.parameters(), fused=True), Guard(device), torch.ones(3, 2)
        for k, factor in enumerate(factors):
            optimizer.zero_grad()
            loss = (net(x.to(device), torch.zeros(3, device=device)) * factor).square().sum()
            loss.backward()
            guard.watch(k, loss, net.parameters())
            guard.step(optimizer)
        states.append([*tensors(net), *(v for s in optimizer.state.values() for v in s.values())])
        assert guard.finish() == (2 if len(factors) == 4 else None)
    assert alike(*states)


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is(fused, device):
    p = nn.Parameter(torch.zeros(2, device=device))
    optimizer, guard = torch.optim.SGD([p], lr=1.0, fused=fused), Guard(device)
    loss = p.sqrt().sum()  # 0, of infinite slope
    loss.backward()
    guard.watch(5, loss, [p])
    guard.step(optimizer)
    assert guard.finish() == 5
    assert torch.equal(p, torch.zeros_like(p))
    with pytest.raises(FloatingPointError, match="gradient: expected finite numbers, got others, of a loss of 0, at s"):
        fit([p], lambda batch, k: p.sqrt().sum(), [0], steps=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_number_of_a_gradient_of_any_type_is_enough(dtype, value, device):
    net, guard, loss = nn.Linear(5, 5).to(device, dtype), Guard(device), torch.ones((), device=device)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    guard.watch(0, loss, net.parameters())
    net.weight.grad[2, 3] = value
    guard.watch(1, loss, net.parameters())
    assert guard.finish() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_averages_under_a_guard_move_as_without_it_until_the_flag(dtype, device):
    net, guard = Net().to(device, dtype), Guard(device)
    one, two = (EMASet(net, (0.5, PowerDecay(0.1))) for _ in range(2))
    for _ in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn(p.shape))
        one.update(net)
        two.update(net, guard=guard)
    for a, b in zip(one.averages, two.averages, strict=True):
        for x, y in zip(a.state_dict()["parameters"].values(), b.state_dict()["parameters"].values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    before = tensors(*(a.module for a in two.averages))
    guard.watch(0, torch.tensor(math.inf, device=device), [])
    two.update(net, guard=guard)
    assert alike(before, tensors(*(a.module for a in two.averages)))


def test_a_loss_that_asks_for_gradients_itself_is_diagnosed_too(device):
    net = Breaks(2).to(device)

    def loss(x, k):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net.inner(x, x[:, 0]).sum(), x, create_graph=True)
        return gk.FlowMatching().loss(net, x, noise=Noise(0, k)) + slope.square().mean()

    words = r"loss: expected finite numbers, got nan at step 2 of 4 \(model: expected finite numbers in its output"
    with pytest.raises(FloatingPointError, match=words):
        fit(net.parameters(), loss, [torch.ones(SHAPE, device=device)] * 4, steps=4)


def test_another_error_of_the_second_call_is_told_beside_the_first():
    p, calls = nn.Parameter(torch.ones(2)), []

    def loss(x, k):
        calls.append(k)
        if len(calls) > 1:
            raise KeyError("once")
        return p.sum() * math.nan

    words = r"got nan at step 0 of 1 \(called once more, the loss raised KeyError: 'once'\)"
    with pytest.raises(FloatingPointError, match=words):
        fit([p], loss, [0], steps=1)


@pytest.mark.parametrize("watched, where", [(True, " at step 0"), (False, "")])
def test_a_guard_that_found_a_bad_step_is_refused(watched, where, device):
    p, guard = nn.Parameter(torch.ones(2, device=device)), Guard(device)
    if watched:
        guard.watch(0, p.sum() * math.nan, [p])
    else:
        guard.flag.fill_(1.0)
    with pytest.raises(
        ValueError, match=f"guard: expected one that has found no bad step, got one that found one{where}$"
    ):
        fit([p], lambda batch, k: p.sum(), range(3), steps=3, guard=guard)
    assert torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_gradients_are_skipped(dtype, device):
    parameters, guard = [nn.Parameter(torch.ones(n, device=device, dtype=dtype)) for n in (0, 2)], Guard(device)
    for step, value, bad in ((0, 1.0, None), (1, math.nan, 1)):
        for p in parameters:
            p.grad = torch.full_like(p, value)
        guard.watch(step, torch.ones((), device=device), parameters)
        assert guard.finish() == bad
    alone = Guard(device)
    alone.watch(0, torch.ones((), device=device), parameters[:1])  # of its type there is no other
    assert alone.finish() is None


def test_launches_of_a_guarded_step_do_not_grow_with_the_parameters():
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    net(torch.randn(2, 3)).sum().backward()
    guard, average, loss = Guard("cpu"), EMA(net, 0.9), torch.ones(())
    with Calls() as watched:
        guard.watch(0, loss, net.parameters())
    with Calls() as moved:
        average.update(net, guard=guard)
    free = ("detach", "_local_scalar_dense")  # the CPU's look at the flag
    assert [name for name in watched.names if name not in free] == [
        "clone", "_amp_foreach_non_finite_check_and_unscale_"
    ]  # fmt: skip
    names = [name for name in moved.names if name not in free]
    assert names == ["_foreach_sub", "_foreach_mul_", "rsub", "_foreach_mul_", "_foreach_add_"]


class Bad(nn.Module):
    def forward(self, x, t, r=None):
        return x * math.nan


@pytest.mark.parametrize("name", ["TrigFlow", "MeanFlow"])
def test_debug_names_the_network_of_a_forward_mode_pass(name, device):
    with gk.debug(values=True), pytest.raises(FloatingPointError, match="model: expected finite numbers in its output"):
        getattr(gk, name)().loss(Bad(), torch.zeros(SHAPE, device=device))


def test_tangent_that_is_not_finite_is_named_on_the_cpu():
    words = "tangent: expected finite numbers, got nan at index 0, of the model's output and its derivative"
    with pytest.raises(FloatingPointError, match=words):
        gk.TrigFlow().loss(Bad(), torch.zeros(SHAPE))


@pytest.mark.cuda
@pytest.mark.skipif(not cuda_works(), reason=NO_CUDA)
def test_the_host_looks_later_and_finds_the_first_bad_step():
    net, guard = nn.Linear(64, 64).cuda(), Guard("cuda")
    good, bad = torch.tensor(1.0, device="cuda"), torch.tensor(math.nan, device="cuda")
    for k in range(200):
        guard.watch(k, bad if k == 70 else good, net.parameters())
    assert guard.finish() == 70
