"""Losses in two processes: every process has the mean of the gradients, forward-mode passes included."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import genkern as gk
from genkern.noise import Noise

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
