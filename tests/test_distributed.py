"""Losses, noise and samplers in two processes: every process has the mean of the gradients, forward-mode passes
included, its part of the noise and its own device, and all stop at the same step where one of them has a number that is
not finite."""

from __future__ import annotations

import contextlib
import copy
import sys

import pytest
import torch
from processes import BACKENDS, PROCESSES, run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import genkern as gk
from genkern import flows, ranks
from genkern.noise import Noise, Purpose
from genkern.training import Guard, fit
from genkern.training.guard import LAG, SLOTS

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux"),
]
BATCH = 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.drop = nn.Linear(2, 2, dtype=torch.float64), nn.Dropout(0.2)

    def forward(self, x, t, r=None):
        return self.drop(torch.tanh(self.mix(x))) * (1 + 0.1 * (t if r is None else t + r)[:, None])


LOSSES = {
    "CD": lambda net, x, noise: gk.Consistency().loss(net, x, teacher=lambda x, t: 0.5 * x, noise=noise),
    "ECT": lambda net, x, noise: gk.Consistency().tuning_loss(net, x, stage=3, noise=noise),
    "sCM": lambda net, x, noise: gk.TrigFlow().loss(net, x, noise=noise),
    "MeanFlow": lambda net, x, noise: gk.MeanFlow().loss(net, x, noise=noise),
    "flow matching": lambda net, x, noise: gk.FlowMatching().loss(net, x, noise=noise),
}


def parallel(net, device):
    return DistributedDataParallel(net, [device] if device.type == "cuda" else None)


def gradients(rank, device, folder):
    """Of each loss, reduced, and alone."""
    found = {}
    for name, loss in LOSSES.items():
        torch.manual_seed(0)
        net = Net().to(device)
        alone = copy.deepcopy(net)
        wrapped = parallel(net, device)
        ids = torch.arange(rank * BATCH, (rank + 1) * BATCH)
        for k in range(2):  # a second step waits for a first one that was not reduced
            torch.manual_seed(10 * k + rank)
            x = torch.randn(BATCH, 2, dtype=torch.float64).to(device)
            noise = Noise(3, stream=k, sample_ids=ids)
            for called in (wrapped, alone):
                torch.manual_seed(100 + 10 * k + rank)  # dropout
                loss(called, x, noise).backward()
        found[name] = [[p.grad for p in m.parameters()] for m in (net, alone)]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_two_processes_are_in_step_and_the_mean_of_both(backend, tmp_path):
    first, second = run(gradients, backend, tmp_path)
    for name in LOSSES:
        (mine, alone), (other, others_alone) = first[name], second[name]
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True)), name
        assert not torch.equal(alone[0], others_alone[0]), name
        for got, a, b in zip(mine, alone, others_alone, strict=True):
            torch.testing.assert_close(got, (a + b) / 2)


class Copy:
    """Of a flag, on its way: it has arrived by now, or only when waited for."""

    def __init__(self, arrived):
        self.arrived = arrived

    def query(self):
        return self.arrived

    def synchronize(self):
        self.arrived = True


class Device(Guard):
    """A guard whose copies arrive as those of a device that is fast or slow."""

    def __init__(self, fast):
        super().__init__("cpu")
        self._on_cuda, self._copies, self._fast = True, torch.zeros(SLOTS), fast

    def _event(self):
        return Copy(self._fast)


def guarded(rank, device, folder):
    """What ends a training in which the second process's loss becomes infinite, its gradient finite."""
    found, gpu = {}, device.type == "cuda"
    # On a GPU every guard's copies are on their way for a while; on the CPU one is made to have such.
    trainings = {"wrapped": (None, True), "bare": (None, False)}
    trainings |= {"device": (Guard(device) if gpu else Device(rank == 0), False)}
    for name, (guard, wrap) in trainings.items():
        torch.manual_seed(0)
        net, done = nn.Linear(2, 1).to(device), []
        called = parallel(net, device) if wrap else net

        def loss(x, k, called=called):
            return called(x).square().mean() + (float("inf") if k == 3 and rank == 1 else 0.0)

        x = torch.full((4, 2), 1.0 + (rank if wrap else 0), device=device)
        try:
            fit(net.parameters(), loss, [x] * 30, steps=30, guard=guard, warmup=0, after_step=done.append)
        except FloatingPointError as error:
            found[name] = (str(error), len(done), list(net.parameters()))
    one = torch.tensor(1.0, device=device)
    alone = Guard(device, alone=True)
    if rank:  # the other does not enter
        alone.watch(0, one, [])
        found["alone"] = alone.finish()
    groups = [torch.distributed.new_group([each]) for each in range(PROCESSES)]
    of_one = Guard(device, group=groups[rank])
    of_one.watch(0, one * (float("inf") if rank else 1.0), [])
    found["groups"] = [of_one.finish(), of_one.shared]
    if gpu:
        found["ahead"] = ahead(device)
    return found


def ahead(device):
    """The steps of a busy device that a host under a guard of all processes does not wait for, of the first LAG."""
    guard, one = Guard(device), torch.tensor(1.0, device=device)
    guard.watch(0, one, [])  # the group makes its connections
    guard.finish()
    torch.cuda.synchronize(device)
    torch.cuda._sleep(1 << 29)  # some 0.3 s
    for k in range(1, LAG + 1):
        guard.watch(k, one, [])
    found = sum(not event.query() for _, _, event in guard._under_way)
    assert guard.finish() is None
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_infinite_in_one_process_ends_the_training_of_both_at_the_same_step(backend, tmp_path):
    found, late = run(guarded, backend, tmp_path), 3 + LAG
    start = "loss or gradient: expected finite numbers in every process, got others at step 3 of 30 (the loss of this "
    at_once = 3 if backend == "gloo" else late
    for name, steps in (("wrapped", at_once), ("bare", at_once), ("device", late)):
        (first, done, mine), (second, others_done, others) = (each[name] for each in found)
        assert first.startswith(start) and second == start + "process was inf)", name
        assert not first.endswith("inf)"), name
        assert done == others_done == steps, name
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True)), name
    assert found[1]["alone"] is None
    assert [each["groups"] for each in found] == [[None, False], [0, False]]
    if backend == "nccl":
        assert [each["ahead"] for each in found] == [LAG, LAG]


COUNT, SIZE = 12, 5
DIVISIONS = {  # of sample ids: two parts each
    "halves": (range(6), range(6, 12)),
    "uneven": (range(1), range(1, 12)),
    "in turn": (range(0, 12, 2), range(1, 12, 2)),
    "backward": (range(11, 3, -1), range(3, -1, -1)),
}


def noises(ids, device):
    """Normals, uniforms, noised data, times, states of a sampler with noise: of these samples, in any process."""
    ids = torch.tensor(list(ids))
    noise, x = Noise(7, stream=1 << 40, sample_ids=ids), torch.linspace(-1.0, 1.0, COUNT * SIZE).reshape(COUNT, SIZE)
    shape, mine, seen = (len(ids), SIZE), x[ids].to(device), []

    def model(x, t):
        seen.append(t)
        return 0.5 * x

    gk.FlowMatching().loss(model, mine, noise=noise)
    return {
        "normal": gk.ops.randn(shape, noise=noise, device=device),
        "half": gk.ops.randn(shape, noise=noise, device=device, dtype=torch.bfloat16),
        "uniform": gk.ops.uniform(shape, noise=noise.at(Purpose.TIMES), device=device),
        "noised": gk.ops.add_noise(mine, 0.6, 0.8, noise=noise),
        "times": seen[0],
        "sampled": gk.FlowMatching().sample(model, shape, steps=4, sampler="sde", noise=noise, device=device),
    }


def divided(rank, device, folder):
    return {name: noises(parts[rank], device) for name, parts in DIVISIONS.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_has_the_same_bits_however_samples_are_divided_over_processes(backend, tmp_path):
    whole, found = noises(range(COUNT), torch.device("cpu")), run(divided, backend, tmp_path)
    for name, parts in DIVISIONS.items():
        for each, ids in zip(found, parts, strict=True):
            for kind, expected in whole.items():
                assert torch.equal(each[name][kind], expected[list(ids)]), (name, kind)


def elsewhere(rank, device, folder):
    """What a process finds on its own device while the current device is the first one's."""
    gpu, found = device.type == "cuda", {}
    with torch.cuda.device(0) if gpu else contextlib.nullcontext():
        found["first"] = ranks.of_first(lambda: f"of {rank}", device)
        ranks.barrier(device)
        guard = Guard(device)
        guard.watch(0, torch.full((), float("inf") if rank else 1.0, device=device), [])
        found["bad"] = guard.finish()
        torch.manual_seed(0)
        net = nn.Linear(SIZE, SIZE).to(device).eval().requires_grad_(False)
        flow = gk.RectifiedFlow()
        loop = gk.Loop(flow, lambda x, t: net(x).sin())
        with contextlib.nullcontext() if gpu else pytest.warns(UserWarning, match="runs uncaptured"):
            drawn = [loop.sample((4, SIZE), steps=3, seed=seed, device=device) for seed in range(3)]
        found["sampled"] = [flow.sample(loop.model, (4, SIZE), steps=3, seed=k, device=device) for k in range(3)]
        found["captured"] = (loop.captured, [torch.equal(a, b) for a, b in zip(drawn, found["sampled"], strict=True)])
        found["devices"] = {str(x.device) for x in drawn}
        x0, x1, u = (torch.linspace(a, 7.0, 4 * SIZE).reshape(4, SIZE).sin().to(device) for a in (0.1, 0.4, 0.9))
        coupling, labels = flows.Gathered(flows.Optimal("y")), {"y": torch.arange(4) % 2}  # labels are on the CPU
        found["coupled"] = coupling.sources(x0 + rank, x1 - rank, labels, u[:, 0])
        pairs = flow.write_pairs(
            lambda x, t: net(x), folder / "pairs", (10, SIZE), steps=2, shard_size=3, device=device
        )
        found["missing"] = pairs.missing()
        found["current"] = torch.cuda.current_device() if gpu else 0
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_process_works_on_its_own_device_whichever_is_the_current_one(backend, tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("safetensors")
    found = run(elsewhere, backend, tmp_path)
    first, second = found
    assert [each["first"] for each in found] == ["of 0", "of 0"]
    assert [each["bad"] for each in found] == [0, 0]
    assert [each["captured"] for each in found] == [(int(backend == "nccl"), [True] * 3)] * 2
    assert all(torch.equal(a, b) for a, b in zip(first["sampled"], second["sampled"], strict=True))
    names = ("cuda:0", "cuda:1") if backend == "nccl" else ("cpu", "cpu")
    assert [each["devices"] for each in found] == [{name} for name in names]
    assert [each["missing"] for each in found] == [[], []]
    assert [each["current"] for each in found] == [0, 0]
    x0, x1 = (torch.linspace(a, 7.0, 4 * SIZE).reshape(4, SIZE).sin() for a in (0.1, 0.4))
    all_x0, all_x1 = torch.cat([x0, x0 + 1]), torch.cat([x1, x1 - 1])
    index = flows.Optimal("y")(all_x0, all_x1, {"y": torch.arange(4).repeat(2) % 2}, torch.zeros(8))
    torch.testing.assert_close(torch.cat([each["coupled"] for each in found]), all_x0[index])
