"""Losses in two processes: every process has the mean of the gradients, forward-mode passes included, and all stop at
the same step where one of them has a number that is not finite."""

from __future__ import annotations

import copy
import datetime
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import genkern as gk
from genkern.noise import Noise
from genkern.training import Guard, fit
from genkern.training.guard import LAG, SLOTS

PROCESSES, BATCH = 2, 6


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
}


def process(rank, folder):
    """Of the two: writes the gradients of each loss, reduced, and alone."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    found = {}
    try:
        for name, loss in LOSSES.items():
            torch.manual_seed(0)
            net = Net()
            alone = copy.deepcopy(net)
            wrapped = DistributedDataParallel(net)
            ids = torch.arange(rank * BATCH, (rank + 1) * BATCH)
            for k in range(2):  # a second step waits for a first one that was not reduced
                torch.manual_seed(10 * k + rank)
                x, state = torch.randn(BATCH, 2, dtype=torch.float64), torch.get_rng_state()
                noise = Noise(3, stream=k, sample_ids=ids)
                loss(wrapped, x, noise).backward()
                torch.set_rng_state(state)
                loss(alone, x, noise).backward()
            found[name] = [[p.grad for p in m.parameters()] for m in (net, alone)]
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


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


def guarded(rank, folder):
    """Of the two: writes what ends a training in which the second one's loss becomes infinite, its gradient finite."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=PROCESSES, timeout=datetime.timedelta(seconds=20)
    )
    found = {}
    try:
        for name, guard, wrap in (("wrapped", None, True), ("bare", None, False), ("device", Device(rank == 0), False)):
            torch.manual_seed(0)
            net, done = nn.Linear(2, 1), []
            called = DistributedDataParallel(net) if wrap else net

            def loss(x, k, called=called):
                return called(x).square().mean() + (float("inf") if k == 3 and rank == 1 else 0.0)

            x = torch.full((4, 2), 1.0 + (rank if wrap else 0))
            try:
                fit(net.parameters(), loss, [x] * 30, steps=30, guard=guard, warmup=0, after_step=done.append)
            except FloatingPointError as error:
                found[name] = (str(error), len(done), [p.detach() for p in net.parameters()])
        alone = Guard("cpu", alone=True)
        found["alone"] = alone.watch(0, torch.tensor(1.0), []) if rank else None  # the other does not enter
        groups = [torch.distributed.new_group([each]) for each in range(PROCESSES)]
        of_one = Guard("cpu", group=groups[rank])
        found["groups"] = [of_one.watch(0, torch.tensor(float("inf") if rank else 1.0), []), of_one.shared]
        torch.save(found, f"{folder}/guard{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux")
def test_a_loss_that_is_infinite_in_one_process_ends_the_training_of_both_at_the_same_step(tmp_path):
    torch.multiprocessing.spawn(guarded, (str(tmp_path),), nprocs=PROCESSES)
    found = [torch.load(tmp_path / f"guard{rank}.pt") for rank in range(PROCESSES)]
    start = "loss or gradient: expected finite numbers in every process, got others at step 3 of 30 (the loss of this "
    for name, steps in (("wrapped", 3), ("bare", 3), ("device", 3 + LAG)):
        (first, done, mine), (second, others_done, others) = (each[name] for each in found)
        assert first.startswith(start) and second == start + "process was inf)", name
        assert not first.endswith("inf)"), name
        assert done == others_done == steps, name
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True)), name
    assert found[1]["alone"] is None
    assert [each["groups"] for each in found] == [[None, False], [0, False]]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.skipif(sys.platform != "linux", reason="processes are started as on Linux")
def test_gradients_of_two_processes_are_in_step_and_the_mean_of_both(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))
    for name in LOSSES:
        (mine, alone), (other, others_alone) = first[name], second[name]
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True)), name
        assert not torch.equal(alone[0], others_alone[0]), name
        for got, a, b in zip(mine, alone, others_alone, strict=True):
            torch.testing.assert_close(got, (a + b) / 2)
