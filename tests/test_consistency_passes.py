"""What a training step of a consistency model launches around its networks: passes over whole tensors, small
operations on numbers of samples, and nothing whose result the host waits for."""

from __future__ import annotations

import pytest
import torch
from watching import Launches

import genkern as gk
from genkern import calls, methods
from genkern import kept as kept_tables
from genkern.noise import Noise

SHAPE = (6, 64)
WAITS = {"item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


class Along(torch.autograd.Function):
    """The second argument, with itself as the derivative along the first one's direction."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x, value):
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.value = inputs[1]

    @staticmethod
    def jvp(ctx, *tangents):
        return ctx.value.view_as(ctx.value)


class Returns:
    """A network that returns one tensor, so that what is counted is around it."""

    def __init__(self, gradient=False):
        self.value = torch.randn(SHAPE).requires_grad_(gradient)

    def __call__(self, x, t, r=None):
        if torch.is_grad_enabled():
            return self.value
        value = self.value.detach()
        return Along.apply(x, value) if calls.transformed() else value


@pytest.fixture
def tables_stay(monkeypatch):
    """Tables are kept under the mode that counts, too."""

    def kept(tables, key, make):
        if key not in tables:
            tables[key] = make()
        return tables[key]

    for module in (kept_tables, methods.consistency_distillation, methods.consistency_training):
        monkeypatch.setattr(module, "kept", kept)


CONSISTENCY, OTHER = gk.Consistency(), Returns()
CD = {"teacher": OTHER, "target": OTHER}
WEIGHT = torch.linspace(0.5, 1.5, SHAPE[0])
# (method, its options, passes over whole tensors, tensors that these read and write, small operations)
LOSSES = {
    "CD": (CONSISTENCY.loss, CD, 5, 19, 10),
    "CD, DPM-Solver++": (CONSISTENCY.loss, CD | {"solver": "dpmpp_2s"}, 5, 19, 10),
    "CD, Euler": (CONSISTENCY.loss, CD | {"solver": "euler"}, 4, 14, 10),
    "CT": (CONSISTENCY.training_loss, {"target": OTHER}, 3, 9, 10),
    "iCT": (CONSISTENCY.improved_loss, {}, 3, 9, 13),
    "ECT": (CONSISTENCY.tuning_loss, {"stage": 3}, 3, 9, 28),
    "EDM, the teacher": (CONSISTENCY.teacher_loss, {}, 3, 7, 12),
    "TrigFlow, the teacher": (gk.TrigFlow().teacher_loss, {}, 3, 7, 10),
    "pseudo-Huber": (gk.RectifiedFlow().loss, {"t": WEIGHT / 2, "kind": "pseudo_huber", "weight": WEIGHT}, 3, 7, 10),
}


@pytest.mark.parametrize("name", LOSSES)
def test_passes_and_small_operations_of_a_loss(name, kernels, tables_stay):
    """Forward and backward."""
    loss, options, full, tensors, small = LOSSES[name]
    student, x = Returns(True), torch.randn(SHAPE)
    loss(student, x, **options)  # tables are made once
    with Launches(SHAPE) as launches:
        torch.autograd.grad(loss(student, x, noise=Noise(2), **options), student.value)
    if name != "pseudo-Huber":  # whose times, given on the CPU, are looked at
        assert not WAITS & {*launches.full, *launches.small}
    assert (len(launches.full), launches.tensors) == (full, tensors)
    assert len(launches.small) <= small


# (method, its options, maps, reduces, small operations), torch's own of the forward mode among the small ones
FORWARD = {
    "sCM": (gk.TrigFlow().loss, {}, 2, 2, 19),
    "sCM, weighted": (gk.TrigFlow().loss, {"log_weight": lambda t: 0.1 * t, "weight": WEIGHT}, 2, 2, 28),
    "sCM, distilled": (gk.TrigFlow().loss, {"teacher": OTHER}, 3, 2, 17),
    "MeanFlow": (gk.MeanFlow().loss, {}, 2, 1, 20),
}


@pytest.mark.parametrize("name", FORWARD)
def test_passes_and_small_operations_of_a_loss_in_forward_mode(name, kernels, tables_stay):
    loss, options, maps, reduces, small = FORWARD[name]
    student, x = Returns(True), torch.randn(SHAPE)
    with Launches(SHAPE) as launches:
        torch.autograd.grad(loss(student, x, noise=Noise(2), **options), student.value)
    found = [sum(n.startswith(kind) for n in launches.full) for kind in ("map", "reduce")]
    assert not WAITS & {*launches.full, *launches.small}
    assert found == [maps, reduces]
    assert len(launches.small) <= small


def test_indices_stay_below_their_count_at_the_largest_numbers():
    for dtype, largest in ((torch.float32, 1.0 - 2.0**-24), (torch.float64, 1.0 - 2.0**-33)):
        u = torch.tensor([2.0**-33, 0.5, largest], dtype=dtype)
        for count in (1, 2, 3, 17, 18, 999, 1000, 4097, 1 << 20):
            found = methods._training.Batch.index_at(u, count)
            assert found.tolist() == [0, count // 2, count - 1]
