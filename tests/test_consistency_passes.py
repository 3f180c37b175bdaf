"""What a training step of a consistency model launches around its networks: passes over whole tensors, small
operations on coefficients, and nothing whose result the host waits for."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import genkern as gk
from genkern import methods
from genkern.noise import Noise

SHAPE = (6, 64)
# Operations that launch nothing, and those that the host would wait for.
FREE = {"detach", "view", "view_as", "expand", "unbind", "select", "slice", "unsqueeze", "alias", "empty", "empty_like",
        "_unsafe_view", "split", "as_strided", "t", "_reshape_alias", "lift_fresh"}  # fmt: skip
WAITS = {"item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}


class Launches(TorchDispatchMode):
    """Names of the operations, by whether a tensor of the data's size is among what they read and write."""

    def __init__(self):
        super().__init__()
        self.full, self.small, self.tensors = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name not in FREE:
            shapes = [t.shape for t in pytree.tree_leaves((args, kwargs, found)) if isinstance(t, torch.Tensor)]
            (self.full if SHAPE in shapes else self.small).append(name)
            self.tensors += shapes.count(SHAPE)
        return found


class Returns:
    """A network that returns one tensor, so that what is counted is around it."""

    def __init__(self, gradient=False):
        self.value = torch.randn(SHAPE).requires_grad_(gradient)

    def __call__(self, x, t):
        return self.value if torch.is_grad_enabled() else self.value.detach()


CONSISTENCY, OTHER = gk.Consistency(), Returns()
CD = {"teacher": OTHER, "target": OTHER}
# (method, its options, passes over whole tensors, tensors that these read and write, small operations)
LOSSES = {
    "CD": ("loss", CD, 5, 19, 16),
    "CD, DPM-Solver++": ("loss", CD | {"solver": "dpmpp_2s"}, 5, 19, 16),
    "CD, Euler": ("loss", CD | {"solver": "euler"}, 4, 14, 16),
    "CT": ("training_loss", {"target": OTHER}, 3, 9, 16),
    "iCT": ("improved_loss", {}, 3, 9, 24),
    "ECT": ("tuning_loss", {"stage": 3}, 3, 9, 60),
}


@pytest.mark.parametrize("name", LOSSES)
def test_passes_and_small_operations_of_a_loss(name, kernels, monkeypatch):
    """Forward and backward. Tables are kept under the mode that counts, too."""

    def kept(tables, key, make):
        if key not in tables:
            tables[key] = make()
        return tables[key]

    for module in (methods.consistency_distillation, methods.consistency_training):
        monkeypatch.setattr(module, "kept", kept)
    method, options, full, tensors, small = LOSSES[name]
    student, x = Returns(True), torch.randn(SHAPE)
    loss = getattr(CONSISTENCY, method)
    loss(student, x, **options)  # tables are made once
    with Launches() as launches:
        torch.autograd.grad(loss(student, x, noise=Noise(2), **options), student.value)
    assert not WAITS & {*launches.full, *launches.small}
    assert (len(launches.full), launches.tensors) == (full, tensors)
    assert len(launches.small) <= small
