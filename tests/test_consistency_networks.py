"""The losses of consistency models and of MeanFlow around an image network, in the precisions that it may have."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import genkern as gk


class Images(nn.Module):
    """Convolutions, a norm, attention and dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.last, self.drop = nn.Conv2d(8, 3, 3, padding=1), nn.Dropout(0.1)

    def forward(self, x, t, r=None):
        told = t if r is None else t + r
        h = functional.silu(self.norm(self.first(x))) * (1 + told.to(x.dtype)[:, None, None, None])
        tokens = self.drop(h).flatten(2).transpose(1, 2)
        seen = functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.last(h + seen.transpose(1, 2).reshape(h.shape))


class Sum(nn.Module):
    """A network that takes an empty batch."""

    def forward(self, x, t, r=None):
        return 0.5 * x + t[:, None, None, None].to(x.dtype)


LOSSES = {
    "CD": lambda net, x: gk.Consistency().loss(net, x, teacher=net),
    "CD, DPM-Solver++": lambda net, x: gk.Consistency().loss(net, x, teacher=net, solver="dpmpp_2s"),
    "CT": lambda net, x: gk.Consistency().training_loss(net, x),
    "iCT": lambda net, x: gk.Consistency().improved_loss(net, x),
    "ECT": lambda net, x: gk.Consistency().tuning_loss(net, x, stage=3),
    "ECT, adaptive": lambda net, x: gk.Consistency().tuning_loss(
        net, x, stage=3, metric=gk.methods.metrics.AdaptiveL2()
    ),
    "sCM, training": lambda net, x: gk.TrigFlow().loss(net, x),
    "sCM, distillation": lambda net, x: gk.TrigFlow().loss(net, x, teacher=net),
    "MeanFlow": lambda net, x: gk.MeanFlow().loss(net, x),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_float32_and_gradients_finite_in_every_precision(name, model_dtype, dtype, device):
    torch.manual_seed(0)
    net, x = Images().to(device, model_dtype), torch.randn(4, 3, 8, 8, device=device, dtype=dtype)
    loss = LOSSES[name](net, x)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert any(p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batch_has_loss_0(name, device):
    loss = LOSSES[name](Sum(), torch.zeros(0, 3, 8, 8, device=device))
    assert loss.item() == 0.0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_loss_and_gradients_finite_and_near_those_of_float32(name, dtype, device):
    """At float32 parameters and data of the deviation that the methods take for theirs. The noise is the same."""
    torch.manual_seed(0)
    net, x = Images().to(device).eval(), 0.5 * torch.randn(64, 3, 8, 8, device=device)
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)  # the seed of the noise is drawn from it
        net.zero_grad()
        with torch.autocast(device.type, dtype, enabled=enabled):
            loss = LOSSES[name](net, x)
        scale = 1024.0 if enabled and dtype == torch.float16 else 1.0  # as a gradient scaler's
        (scale * loss).backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters()]) / scale))
    (loss, gradient), (cast, cast_gradient) = found
    assert cast.dtype == torch.float32 and cast.isfinite() and cast_gradient.isfinite().all()
    torch.testing.assert_close(cast, loss, rtol=0.1, atol=0.0)
    assert torch.nn.functional.cosine_similarity(cast_gradient, gradient, dim=0) > 0.9
