"""The running average of a model's parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import genkern as gk


def model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)


def change(net):
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
        net[1].running_mean.add_(1.0)
        net[1].num_batches_tracked.add_(1)


def test_average_is_the_recursion_in_float32():
    net = model()
    ema = gk.training.EMA(net, decay=0.9)
    expected = [p.detach().double() for p in net.parameters()]
    for _ in range(5):
        change(net)
        ema.update(net)
        expected = [0.9 * a + 0.1 * p.detach().double() for a, p in zip(expected, net.parameters(), strict=True)]
    for a, e in zip(ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)


def test_small_updates_of_a_bfloat16_model_are_not_lost():
    net = nn.Linear(2, 2, dtype=torch.bfloat16)
    nn.init.ones_(net.weight)
    ema = gk.training.EMA(net, decay=0.999)
    nn.init.constant_(net.weight, 1.5)
    for _ in range(1000):
        ema.update(net)
    expected = 1.5 - 0.5 * 0.999**1000
    torch.testing.assert_close(
        ema.state_dict()["parameters"]["weight"], torch.full((2, 2), expected), rtol=1e-4, atol=0
    )
    assert ema.module.weight.dtype == torch.bfloat16
    torch.testing.assert_close(ema.module.weight, torch.full((2, 2), expected, dtype=torch.bfloat16))


def test_buffers_are_copied():
    net = model()
    ema = gk.training.EMA(net)
    change(net)
    ema.update(net)
    assert torch.equal(ema.module[1].running_mean, net[1].running_mean)
    assert int(ema.module[1].num_batches_tracked) == 1


def test_model_is_untouched_and_the_average_without_gradient():
    net = model()
    before = [p.clone() for p in net.parameters()]
    ema = gk.training.EMA(net, decay=0.5)
    change(net)
    after = [p.clone() for p in net.parameters()]
    ema.update(net)
    assert all(torch.equal(p, a) for p, a in zip(net.parameters(), after, strict=True))
    assert not any(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in net.parameters())


def test_swap_puts_the_average_in_and_the_model_back():
    net = model()
    ema = gk.training.EMA(net, decay=0.5)
    average = [p.clone() for p in ema.module.parameters()]
    change(net)
    own = [p.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match="inside"), ema.swap(net):
        assert all(torch.equal(p, a) for p, a in zip(net.parameters(), average, strict=True))
        raise RuntimeError("inside")
    assert all(torch.equal(p, o) for p, o in zip(net.parameters(), own, strict=True))
    assert float(net[1].running_mean[0]) == 1.0


def test_copy_to_writes_the_average_into_a_model():
    net = model()
    ema = gk.training.EMA(net)
    change(net)
    ema.copy_to(net)
    assert all(torch.equal(p, a) for p, a in zip(net.parameters(), ema.module.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_restored_and_goes_on_as_before(dtype):
    net = model(dtype)
    ema = gk.training.EMA(net, decay=0.9)
    change(net)
    ema.update(net)
    other = gk.training.EMA(model(dtype), decay=0.1)
    other.load_state_dict(ema.state_dict())
    change(net)
    for average in (ema, other):
        average.update(net)
    mine, theirs = (average.state_dict() for average in (ema, other))
    assert mine["decay"] == theirs["decay"] == 0.9
    for kind in ("parameters", "buffers"):
        assert all(torch.equal(theirs[kind][name], value) for name, value in mine[kind].items())


def test_average_follows_its_module_to_another_dtype():
    net = model().double()
    ema = gk.training.EMA(model(), decay=0.0)
    ema.module.double()
    ema.update(net)
    assert all(torch.equal(a, p) for a, p in zip(ema.module.parameters(), net.parameters(), strict=True))


def test_decay_of_one_update_alone():
    net = model()
    ema = gk.training.EMA(net, decay=0.999)
    change(net)
    ema.update(net, decay=0.0)
    assert all(torch.equal(a, p) for a, p in zip(ema.module.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decay_is_refused(decay):
    with pytest.raises(ValueError, match="decay: expected"):
        gk.training.EMA(model(), decay=decay)


def test_model_of_other_parameters_is_refused_and_nothing_changed():
    ema = gk.training.EMA(model())
    before = ema.state_dict()
    with pytest.raises(ValueError, match="model: expected the parameters of the averaged model"):
        ema.update(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="state: expected the parameters of the averaged model"):
        ema.load_state_dict(gk.training.EMA(nn.Linear(3, 4)).state_dict())
    after = ema.state_dict()
    assert all(torch.equal(after["parameters"][n], v) for n, v in before["parameters"].items())


def tensors(net):
    return [t.detach().clone() for t in (*net.parameters(), *net.buffers())]


class Other(nn.Module):
    """The parameters of model(), and other buffers."""

    def __init__(self, last=(4,)):
        super().__init__()
        self.first, self.bias, self.scale, self.shift = (
            nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (4,), (4,), last)
        )
        self.register_buffer("mean", torch.zeros(5))


@pytest.mark.parametrize("last, kind", [((4,), "buffers"), ((5,), "parameters")])
@pytest.mark.parametrize("method", ["update", "copy_to", "swap"])
def test_another_model_is_refused_before_anything_is_written(method, last, kind):
    ema, other = gk.training.EMA(model(), decay=0.5), Other(last)
    held, given = tensors(ema.module), tensors(other)
    with pytest.raises(ValueError, match=f"model: expected the {kind} of the averaged model, .*, got "):
        found = getattr(ema, method)(other)
        if method == "swap":
            with found:
                pass
    assert all(torch.equal(a, b) for a, b in zip(tensors(ema.module), held, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(other), given, strict=True))


def test_swap_puts_the_model_back_where_the_copy_fails(monkeypatch):
    net = model()
    ema = gk.training.EMA(net, decay=0.5)
    change(net)
    own = tensors(net)

    def fails(other):
        with torch.no_grad():
            other[0].weight.zero_()
        raise RuntimeError("half way")

    monkeypatch.setattr(ema, "copy_to", fails)
    with pytest.raises(RuntimeError, match="half way"), ema.swap(net):
        pass
    assert all(torch.equal(a, b) for a, b in zip(tensors(net), own, strict=True))


def test_what_is_no_module_is_named():
    with pytest.raises(TypeError, match="model: expected a torch module, got dict"):
        gk.training.EMA(model()).update({})
