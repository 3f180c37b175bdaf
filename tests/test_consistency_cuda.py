"""Training steps of consistency models on a GPU: nothing in them waits for the device."""

from __future__ import annotations

import pytest
import torch
from conftest import NO_CUDA, cuda_works
from torch import nn
from watching import unsynchronised

import genkern as gk
from genkern.methods import PathTeacher, metrics
from genkern.training import EMA, EMASet, Guard, PowerDecay

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not cuda_works(), reason=NO_CUDA)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.drop = nn.Linear(8, 8), nn.Dropout(0.1)

    def forward(self, x, t, r=None):
        return self.drop(torch.tanh(self.mix(x))) * (1 + 0.1 * (t if r is None else t + r)[:, None])


FLOW = gk.FlowMatching()
CONSISTENCY, NARROW = gk.Consistency(), gk.Consistency(0.05, 10.0)  # which keep their tables on the device
TRIG, MEAN = gk.TrigFlow(), gk.MeanFlow()
LOSSES = {
    "CD": lambda net, teacher, x, noise: CONSISTENCY.loss(net, x, teacher=teacher, noise=noise),
    "CD, DPM-Solver++": lambda net, teacher, x, noise: CONSISTENCY.loss(
        net, x, teacher=teacher, solver="dpmpp_2s", noise=noise
    ),
    "CD, a flow's teacher": lambda net, teacher, x, noise: NARROW.loss(
        net, x, teacher=PathTeacher(teacher, FLOW), noise=noise
    ),
    "CD, metric": lambda net, teacher, x, noise: CONSISTENCY.loss(
        net, x, teacher=teacher, metric=metrics.AdaptiveL2(), noise=noise
    ),
    "CT": lambda net, teacher, x, noise: CONSISTENCY.training_loss(net, x, noise=noise),
    "iCT": lambda net, teacher, x, noise: CONSISTENCY.improved_loss(net, x, noise=noise),
    "ECT": lambda net, teacher, x, noise: CONSISTENCY.tuning_loss(net, x, stage=3, noise=noise),
    "sCM, training": lambda net, teacher, x, noise: TRIG.loss(net, x, noise=noise),
    "sCM, distillation": lambda net, teacher, x, noise: TRIG.loss(net, x, teacher=teacher, noise=noise),
    "MeanFlow": lambda net, teacher, x, noise: MEAN.loss(net, x, noise=noise),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_training_step_does_not_wait_for_the_device(name):
    """The loss, its gradient, the guard, a fused optimiser, and the averages."""
    net, teacher, x = Net().cuda(), Net().cuda().eval(), torch.randn(64, 8, device="cuda")
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    average, several, guard = EMA(net, 0.9), EMASet(net, (0.99, PowerDecay(0.1))), Guard("cuda")

    def step(k):
        optimizer.zero_grad(set_to_none=True)
        loss = LOSSES[name](net, teacher, x, gk.Noise(0, stream=k))
        loss.backward()
        guard.watch(k, loss, net.parameters())
        guard.step(optimizer)
        average.update(net, guard=guard)
        several.update(net)

    step(0)  # tables are copied, and the optimiser's state is made, once
    with unsynchronised():
        step(1)
