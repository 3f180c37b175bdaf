"""Trainings that are cut off: they go on inside, with the bits of one that was not, or say why not."""

from __future__ import annotations

import copy
import os
import re

import pytest
import torch
from torch import nn

import genkern as gk
from genkern import files, training
from genkern.training import EMA, Checkpoint, fit, fit_pairs

pytest.importorskip("safetensors")

FLOW, SHAPE, PAIRS = gk.RectifiedFlow(), (60, 2), {"steps": 2, "shard_size": 40}
FIT = {"steps": 12, "batch_size": 16, "lr": 1e-2, "warmup": 3, "ema_decay": 0.9, "checkpoint_every": 3}


class Cut(Exception):
    pass


class Net(nn.Module):
    """With random numbers of torch's generator, a buffer that it writes, and a part that is not trained."""

    cut_at, calls = None, 0  # the call in training that raises; how many there were

    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("mean", torch.zeros(8))
        self.last.bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, x, t):
        if self.training:
            if Net.calls == Net.cut_at:
                raise Cut
            Net.calls += 1
        found = self.first(torch.cat([x, t[:, None]], 1).to(self.first.weight.dtype))
        if self.training:
            self.mean.lerp_(found.detach().mean(0), 0.1)
        return self.last(self.drop(torch.tanh(found - self.mean)))


@pytest.fixture(autouse=True)
def _uncut():
    Net.cut_at, Net.calls = None, 0


def cut(call, *arguments, at=7, **options):
    """A call that ends in the forward pass of a step."""
    Net.cut_at, Net.calls = at, 0
    with pytest.raises(Cut):
        call(*arguments, **options)
    Net.cut_at, Net.calls = None, 0


def alike(a, b):
    one, other = (dict(m.state_dict()) for m in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def at_first(seed, call, *arguments, **options):
    torch.manual_seed(seed)
    return call(*arguments, **options)


@pytest.mark.parametrize("make, more", [("reflow", {}), ("distill", {"student_steps": 2})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_call_that_was_cut_off_goes_on_inside_the_training_with_the_same_bits(make, more, dtype, device, tmp_path):
    model, options = Net(dtype).to(device), {**more, "fit": FIT, **PAIRS}

    def run(path):
        found = getattr(FLOW, make)(model, path, SHAPE, **options)
        return found if isinstance(found, nn.Module) else found[0]

    whole = at_first(3, run, tmp_path / "whole")
    assert Net.calls == 12 and not list(tmp_path.rglob("training.safetensors"))
    torch.manual_seed(3)
    cut(run, tmp_path / "cut", at=2)  # before the first checkpoint
    torch.manual_seed(3)
    cut(run, tmp_path / "cut", at=7)
    cut(run, tmp_path / "cut", at=4)  # another time, in step 6 + 4
    (left,) = tmp_path.rglob("training.safetensors")
    assert files.read_tensors(left)[1]["losses"].shape == (9,)
    torch.manual_seed(99)  # what the process draws otherwise
    resumed = run(tmp_path / "cut")
    assert Net.calls == 3
    assert alike(resumed, whole) and not alike(resumed, model)
    assert not left.exists()


def test_later_rounds_go_on_inside_too(tmp_path):
    options = {"rounds": 2, "fit": FIT, **PAIRS}
    whole = at_first(3, FLOW.reflow, Net(), tmp_path / "whole", SHAPE, **options)
    torch.manual_seed(3)
    cut(FLOW.reflow, Net(), tmp_path / "cut", SHAPE, at=12 + 11, **options)
    resumed = FLOW.reflow(Net(), tmp_path / "cut", SHAPE, **options)
    assert Net.calls == 3
    assert all(alike(a, b) for a, b in zip(resumed, whole, strict=True))


def test_losses_are_those_of_all_steps_and_batches_begin_at_the_first_that_is_left(tmp_path):
    asked = []

    def run(folder, **more):
        net = Net()
        checkpoint = Checkpoint(folder / "c", {"of": "test"}, network=net, average=EMA(net, 0.9), every=2)

        def batches(start):
            asked.append(start)
            return (torch.full((4, 2), 0.1 * k) for k in range(start, 7))

        def loss(x, k):
            return net(x, x[:, 0]).square().mean()

        return fit(net.parameters(), loss, batches, steps=7, checkpoint=checkpoint, warmup=0, **more)

    whole = at_first(3, run, tmp_path / "whole")
    torch.manual_seed(3)
    cut(run, tmp_path / "cut", at=5)
    assert run(tmp_path / "cut") == whole
    assert asked == [0, 0, 4] and len(whole) == 7
    with pytest.raises(ValueError, match="steps: expected 6 or more, as .* has, got 5"):
        Checkpoint(tmp_path / "cut/c", {"of": "test"}, network=(net := Net()), average=EMA(net)).restore(
            torch.optim.AdamW(net.parameters()), 5
        )
    with pytest.raises(TypeError, match="batches: expected a function of a step beside a checkpoint, got list"):
        fit(net.parameters(), None, [], steps=1, checkpoint=Checkpoint(tmp_path / "d", {}, network=net))


def test_batches_from_a_step_on_are_those_that_come_then(tmp_path):
    store = FLOW.write_pairs(Net().eval(), tmp_path, SHAPE, **PAIRS)
    for size, world_size in ((7, 1), (16, 2)):
        for start in (0, 1, 11):
            given = {"seed": 5, "rank": 0, "world_size": world_size}
            all_of, some = store.batches(size, **given), store.batches(size, start=start, **given)
            for _ in range(start):
                next(all_of)
            for _ in range(5):
                assert torch.equal(next(some).sample_ids, next(all_of).sample_ids)
    with pytest.raises(ValueError, match="start: expected an integer >= 0, got -1"):
        next(store.batches(7, start=-1))


def other_net():
    found = Net()
    with torch.no_grad():
        found.last.bias += 1.0
    return found


@pytest.mark.parametrize("change, words", [
    ({"lr": 2e-2}, "lr 0.01, asked for 0.02;"), ({"seed": 1}, "seed 0, asked for 1;"),
    ({"loss_options": {"kind": "l1"}}, "loss_options {}, asked for {'kind': 'l1'};"),
    ({"network": other_net}, "network '[0-9a-f]{64}', asked for '[0-9a-f]{64}';"),
    ({"frozen": "last.weight"}, "frozen .'last.bias'., asked for .'last.bias', 'last.weight'.;"),
    ({"pairs": {"seed": 1}}, "pairs '[0-9a-f]{64}', asked for '[0-9a-f]{64}';"),
    ({"loss": FLOW.distill_loss}, "loss '.*loss', asked for '.*distill_loss';"),
    ({"steps": 13, "lr": 2e-2}, "lr .*; steps 12, asked for 13;"),
])  # fmt: skip
def test_a_checkpoint_of_another_training_is_refused_and_nothing_is_changed(change, words, tmp_path):
    change = dict(change)
    file, flow = tmp_path / "c", Net().eval()
    store = FLOW.write_pairs(flow, tmp_path / "pairs", SHAPE, **PAIRS)
    cut(fit_pairs, Net(), FLOW.loss, store, checkpoint=file, **FIT)
    network, loss, before = change.pop("network", Net)(), change.pop("loss", FLOW.loss), file.read_bytes()
    if "frozen" in change:
        network.get_parameter(change.pop("frozen")).requires_grad_(False)
    if "pairs" in change:
        store = FLOW.write_pairs(flow, tmp_path / "others", SHAPE, **PAIRS, **change.pop("pairs"))
    untouched, state = copy.deepcopy(network), torch.get_rng_state()
    whole = rf"checkpoint: expected one of the same training, {re.escape(str(file))} has {words} without that file"
    with pytest.raises(ValueError, match=whole):
        fit_pairs(network, loss, store, checkpoint=file, **{**FIT, **change})
    assert Net.calls == 0 and alike(network, untouched) and file.read_bytes() == before
    assert torch.equal(state, torch.get_rng_state())


def test_reflow_refuses_the_checkpoint_of_other_options(tmp_path):
    cut(FLOW.reflow, Net(), tmp_path, SHAPE, fit=FIT, **PAIRS)
    with pytest.raises(ValueError, match="checkpoint: expected one of the same training, .* lr 0.01, asked for 0.02;"):
        FLOW.reflow(Net(), tmp_path, SHAPE, fit={**FIT, "lr": 2e-2}, **PAIRS)
    FLOW.reflow(Net(), tmp_path, SHAPE, fit={**FIT, "checkpoint_every": 5}, **PAIRS)  # how often changes nothing
    assert Net.calls == 6


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path):
    def checkpoint(net):
        return Checkpoint(tmp_path / "c", {}, network=net), torch.optim.AdamW(net.parameters())

    one, optimizer = checkpoint(nn.Linear(2, 2))
    one.save(optimizer, [torch.zeros(())])
    for net in (nn.Linear(2, 3), nn.Linear(2, 2).double(), nn.Sequential(nn.Linear(2, 2))):
        before, (other, optimizer) = copy.deepcopy(net), checkpoint(net)
        with pytest.raises(ValueError, match="checkpoint: expected tensors of this network, .* has another network"):
            other.restore(optimizer, 5)
        assert alike(net, before)


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[:40], lambda data: b"", lambda data: b"\x00" * len(data),
    lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
], ids=["a byte less", "the header's beginning", "nothing", "zeros", "a bit"])  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_noticed(damage, tmp_path):
    options = {"fit": FIT, **PAIRS}
    (whole,) = at_first(3, FLOW.reflow, Net(), tmp_path / "whole", SHAPE, **options)
    cut(FLOW.reflow, Net(), tmp_path / "cut", SHAPE, **options)
    (left,) = tmp_path.rglob("training.safetensors")
    left.write_bytes(damage(left.read_bytes()))
    Net.calls = 0
    with pytest.warns(UserWarning, match="checkpoint: expected a whole file, got .*training.safetensors, which is cut"):
        (found,) = at_first(3, FLOW.reflow, Net(), tmp_path / "cut", SHAPE, **options)
    assert Net.calls == 12 and alike(found, whole)


def test_a_write_that_is_cut_off_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    store = FLOW.write_pairs(Net().eval(), tmp_path / "pairs", SHAPE, **PAIRS)
    whole = at_first(3, fit_pairs, Net(), FLOW.loss, store, **FIT)
    replace, written = os.replace, []

    def second(source, target):
        written.append(target)
        if len(written) == 2:
            raise Cut
        replace(source, target)

    monkeypatch.setattr(os, "replace", second)
    with pytest.raises(Cut):
        at_first(3, fit_pairs, Net(), FLOW.loss, store, checkpoint=tmp_path / "c", **FIT)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c", "pairs"]
    assert alike(fit_pairs(Net(), FLOW.loss, store, checkpoint=tmp_path / "c", **FIT), whole)
    assert len(written) == 4 and Net.calls == 12 + 6 + 9  # of steps 6 and 9


def test_a_bad_step_is_in_no_checkpoint(tmp_path, device):
    net = Net().to(device)

    def batches(start):
        return [torch.full((4, 2), float("nan") if k == 5 else 0.3, device=device) for k in range(start, 12)]

    kept = Checkpoint(tmp_path / "c", {}, network=net, every=3)
    with pytest.raises(FloatingPointError, match="at step 5 of 12"):
        fit(net.parameters(), lambda x, k: net(x, x[:, 0]).sum(), batches, steps=12, checkpoint=kept)
    assert len(files.read_tensors(tmp_path / "c")[1]["losses"]) == 3


@pytest.mark.parametrize("value, error", [(-1, ValueError), (2.5, TypeError)])
def test_a_bad_interval_is_named(value, error, tmp_path):
    with pytest.raises(error, match=f"checkpoint_every: expected an integer.*, got {value}"):
        FLOW.reflow(Net(), tmp_path, SHAPE, fit={"checkpoint_every": value}, **PAIRS)
    assert not list(tmp_path.iterdir())


def test_no_checkpoint_is_written_where_none_is_asked_for(tmp_path):
    cut(FLOW.reflow, Net(), tmp_path, SHAPE, fit={**FIT, "checkpoint_every": 0}, **PAIRS)
    assert not list(tmp_path.rglob("training.safetensors"))
    assert training.Checkpoint is Checkpoint


def test_a_path_that_is_no_file_and_a_network_without_parameters_are_named(tmp_path):
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.raises(ValueError, match=re.escape(f"checkpoint: expected a file, got {tmp_path}: ")):
        Checkpoint(tmp_path, {}, network=net).restore(optimizer, 5)
    with pytest.raises(ValueError, match="network: expected parameters, got none"):
        Checkpoint(tmp_path / "c", {}, network=nn.Identity())
