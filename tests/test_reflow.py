"""Reflow and distillation as one call: closed forms of Gaussians, what is resumed, what is refused."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
from torch import nn

import genkern as gk
from genkern import flows, training
from genkern.methods._pair_settings import told
from genkern.noise import Noise

pytest.importorskip("safetensors")

FLOW, M, S = gk.RectifiedFlow(), 1.5, 0.4
SHAPE = (512, 1)
PAIRS = {"steps": 16, "sampler": "rk4", "shard_size": 200}


class Gaussian(nn.Module):
    """The exact velocity of N(0, 1) -> N(M, S^2) under the independent coupling, and a learned affine part beside it:
    weight (x - t M) + shift + gain x. Trained, it can be any affine field at t = 0, where the exact one is M - x."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))

    def forward(self, x, t, y=None):
        Gaussian.calls += len(x) > 1  # but for a pair that is drawn again to compare it
        scale, shift, gain = self.weight
        t = t[:, None]
        exact = M + (t * S**2 - (1 - t)) / ((1 - t) ** 2 + (t * S) ** 2) * (x - t * M)
        found = scale * exact + shift + gain * x
        return found if y is None else found + 0.1 * y[:, None]


def fast(steps, **more):
    return {"steps": steps, "batch_size": 64, "lr": 3e-2, "warmup": 10, "ema_decay": 0.9, **more}


def test_a_distilled_student_is_the_flows_end_in_one_step(tmp_path, device):
    """z1 = M + S z0 is affine, so that the student of one step is exact: v(z, 0) = M + (S - 1) z."""
    student = FLOW.distill(Gaussian().to(device), tmp_path, SHAPE, fit=fast(300), **PAIRS)
    z = torch.randn(100, 1, device=device)
    one = FLOW.sample(student, x0=z, steps=1)
    torch.testing.assert_close(one, M + S * z, rtol=0, atol=2e-2)
    undistilled = FLOW.sample(Gaussian().to(device), x0=z, steps=1)  # without it, one step ends at the mean
    torch.testing.assert_close(undistilled, torch.full_like(z, M))


def test_distillation_is_the_loss_at_the_students_times_alone():
    model, (x0, x1), noise = Gaussian(), torch.randn(2, 8, 1), Noise(3)
    drawn = flows.Steps(4)(gk.ops.uniform((8,), noise=noise.at(gk.noise.Purpose.TIMES), dtype=torch.float64))
    got = FLOW.distill_loss(model, x1, x0, student_steps=4, noise=noise)
    torch.testing.assert_close(got, FLOW.loss(model, x1, x0, t=drawn.float(), noise=noise))
    one = FLOW.distill_loss(model, x1, x0)
    torch.testing.assert_close(one, (x1 - x0 - model(x0, torch.zeros(8))).square().mean())


def test_times_of_steps_are_those_of_an_even_grid():
    u = torch.tensor([1e-9, 0.2499, 0.25, 0.6, 0.999, 1.0 - 2.0**-53], dtype=torch.float64)
    assert flows.Steps(4)(u).tolist() == [0.0, 0.0, 0.25, 0.5, 0.75, 0.75]
    with pytest.raises(ValueError, match="count: expected an integer >= 1, got 0"):
        flows.Steps(0)


def test_a_metric_of_distillation_is_of_the_students_end():
    """x_t + (1 - t) v - x1 = (1 - t) (v - (x1 - x0))."""
    model, (x0, x1), noise = Gaussian(), torch.randn(2, 8, 1), Noise(3)

    def squared(end, target):
        return (end - target).square().mean(1)

    got = FLOW.distill_loss(model, x1, x0, student_steps=3, metric=squared, noise=noise)
    expected = FLOW.distill_loss(model, x1, x0, student_steps=3, weight=lambda t: (1 - t) ** 2, noise=noise)
    torch.testing.assert_close(got, expected)


def test_rounds_of_reflow_keep_the_marginal_and_straighten(tmp_path):
    class Corrected(nn.Module):
        """The exact first flow, and a small network beside it."""

        def __init__(self):
            super().__init__()
            self.fit = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1))
            self.exact = Gaussian()

        def forward(self, x, t):
            return self.exact(x, t) + self.fit(torch.cat([x, t[:, None]], 1))

    model = Corrected()
    nn.init.zeros_(model.fit[2].weight)
    nn.init.zeros_(model.fit[2].bias)
    second, third = FLOW.reflow(model, tmp_path, SHAPE, rounds=2, fit=fast(200, lr=2e-2), **PAIRS)
    z = torch.randn(400, 1)

    def of(network):
        end, path = FLOW.sample(network, x0=z, steps=50, sampler="heun", return_trajectory=True)
        return end, float(flows.straightness(path).mean())

    (_, bent), (end, straight), (last, straighter) = of(model), of(second), of(third)
    assert straighter < straight < 0.5 * bent
    for found in (end, last):
        assert float((found - M - S * z).abs().mean()) < 0.05
    folders = sorted(f"{file.parent.name}/{file.name}" for file in tmp_path.glob("*/*"))
    assert folders == [f"{k}-rectified/{name}" for k in (2, 3) for name in ("network.safetensors", "pairs")]
    pairs = [gk.PairStore(tmp_path / f"{k}-rectified" / "pairs").read(0).x0 for k in (2, 3)]
    assert not torch.equal(*pairs)  # a round has its own sources


def test_what_is_whole_is_not_made_again(tmp_path):
    options = {"rounds": 2, "fit": fast(5), **PAIRS}
    first = FLOW.reflow(Gaussian(), tmp_path, SHAPE, **options)
    Gaussian.calls = 0
    again = FLOW.reflow(Gaussian(), tmp_path, SHAPE, **options)
    assert Gaussian.calls == 0
    assert [torch.equal(a.weight, b.weight) for a, b in zip(first, again, strict=True)] == [True, True]
    assert [(network.training, network.weight.requires_grad) for network in again] == [(False, True)] * 2
    (tmp_path / "3-rectified" / "network.safetensors").unlink()
    *_, last = FLOW.reflow(Gaussian(), tmp_path, SHAPE, **options)
    assert Gaussian.calls == 5  # training alone
    assert torch.equal(last.weight, first[1].weight)


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[:40], lambda data: b"",
    lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
], ids=["a byte less", "the header alone", "nothing", "a bit"])  # fmt: skip
def test_a_network_that_is_not_whole_is_trained_again(damage, tmp_path):
    options = {"fit": fast(5), **PAIRS}
    (first,) = FLOW.reflow(Gaussian(), tmp_path, SHAPE, **options)
    file = tmp_path / "2-rectified" / "network.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    for calls in (5, 0):  # mended, then whole
        Gaussian.calls = 0
        (again,) = FLOW.reflow(Gaussian(), tmp_path, SHAPE, **options)
        assert Gaussian.calls == calls
        assert torch.equal(again.weight, first.weight)


def test_a_network_on_disk_is_one_that_safetensors_loads(tmp_path):
    class Tied(Frozen):
        def __init__(self):
            super().__init__()
            self.again = self.head

    model = Tied()
    (found,) = FLOW.reflow(model, tmp_path, SHAPE, fit=fast(2), **PAIRS)
    from safetensors.torch import load_model

    loaded = Tied()
    load_model(loaded, tmp_path / "2-rectified" / "network.safetensors")
    assert torch.equal(loaded.again.weight, found.head.weight)
    (again,) = FLOW.reflow(model, tmp_path, SHAPE, fit=fast(2), **PAIRS)
    assert torch.equal(again.again.weight, found.head.weight)


class Frozen(nn.Module):
    """A flow whose first part is not trained."""

    def __init__(self):
        super().__init__()
        self.base, self.head = Gaussian().requires_grad_(False), nn.Linear(1, 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, x, t):
        return self.base(x, t) + self.head(x)


def test_parameters_that_are_frozen_stay_so_in_every_round_and_student(tmp_path):
    model, options = Frozen(), {"fit": fast(5, weight_decay=0.5), **PAIRS}
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for _ in range(2):  # trained, and read from the disk
        found = FLOW.reflow(model, tmp_path, SHAPE, rounds=2, **options)
        found.append(FLOW.distill(found[-1], tmp_path / "student", SHAPE, **options))
        for network in found:
            assert network.base.weight.tolist() == [1.0, 0.0, 0.0]
            assert not torch.equal(network.head.weight, model.head.weight)
            assert {name: p.requires_grad for name, p in network.named_parameters()} == before
    with pytest.raises(ValueError, match="path: expected a network of the same settings"):
        FLOW.reflow(copy.deepcopy(model).requires_grad_(True), tmp_path, SHAPE, **options)


def test_where_nothing_requires_a_gradient_all_is_trained(tmp_path):
    average = training.EMA(Gaussian()).module
    (found,) = FLOW.reflow(average, tmp_path, SHAPE, fit=fast(5), **PAIRS)
    assert not torch.equal(found.weight, average.weight) and not found.weight.requires_grad


@pytest.mark.parametrize("make", ["write_pairs", "distill", "reflow"])
def test_samples_of_the_same_seed_do_not_start_from_the_pairs(make, tmp_path):
    more = {} if make == "write_pairs" else {"fit": fast(1)}
    getattr(FLOW, make)(Gaussian(), tmp_path, SHAPE, seed=0, **more, **PAIRS)
    store = gk.PairStore(next(tmp_path.rglob("manifest.json")).parent)
    _, path = FLOW.sample(Gaussian(), SHAPE, steps=1, seed=0, return_trajectory=True)
    assert path[0].shape == SHAPE
    assert not torch.isin(store.batch(range(512)).x0, path[0]).any()


def test_objects_in_the_settings_are_told_by_what_they_are():
    beta, stratified = flows.Beta(2.0, 3.0), gk.methods.times.Stratified(of=flows.LogitNormal(0.5))
    half, third = (functools.partial(torch.full, (1,), fill_value=v) for v in (0.5, 1 / 3))
    assert told(half) != told(third) and told(half)["partial"][1:] == [[[1]], {"fill_value": 0.5}]
    before = told({"times": beta, "metric": nn.Linear(1, 1), "of": stratified})
    beta(torch.rand(3))  # keeps a table of the device
    assert told(beta) == before["times"] == {"Beta": {"alpha": 2.0, "beta": 3.0}}
    assert told(flows.LogitNormal(0.5)) == {"LogitNormal": {"mean": 0.5, "std": 1.0}}
    assert before["of"] != told(gk.methods.times.Stratified(of=flows.LogitNormal(0.6)))
    assert re.fullmatch("Linear [0-9a-f]{64}", before["metric"])


def test_a_training_that_failed_goes_on_from_its_pairs(tmp_path):
    def fails(network, store, k):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        FLOW.reflow(Gaussian(), tmp_path, SHAPE, train=fails, **PAIRS)
    Gaussian.calls = 0
    FLOW.reflow(Gaussian(), tmp_path, SHAPE, fit=fast(3), **PAIRS)
    assert Gaussian.calls == 3


def test_training_may_be_the_callers(tmp_path):
    seen = []

    def train(network, store, k):
        seen.append((network.training, network.weight.requires_grad, len(store), store.missing(), k))
        with torch.no_grad():
            network.weight.copy_(torch.tensor([0.0, 0.5, 0.0]))
        return network

    model = Gaussian()
    (found,) = FLOW.reflow(model, tmp_path, SHAPE, train=train, **PAIRS)
    assert seen == [(True, True, 512, [], 2)]
    assert found.weight.tolist() == [0.0, 0.5, 0.0] and model.weight.tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="fit: expected None beside train"):
        FLOW.reflow(model, tmp_path, SHAPE, train=train, fit=fast(1), **PAIRS)


def test_conditions_reach_the_loss_and_guidance_is_of_the_first_round(tmp_path):
    y = torch.arange(512) % 3
    given = {"cond": {"y": y}, "uncond": {"y": torch.zeros_like(y)}, "guidance_scale": 2.0}
    networks = FLOW.reflow(Gaussian(), tmp_path, SHAPE, rounds=2, fit=fast(2), **given, **PAIRS)
    stores = [gk.PairStore(tmp_path / f"{k}-rectified" / "pairs") for k in (2, 3)]
    assert [store.settings["guidance_scale"] for store in stores] == [2.0, None]
    assert all(torch.equal(store.batch(range(512)).cond["y"], y) for store in stores)
    expected = FLOW.sample(Gaussian(), x0=stores[0].read(0).x0, steps=16, sampler="rk4", cond={"y": 2.0 * y[:200]})
    torch.testing.assert_close(stores[0].read(0).x1, expected)  # the network is linear in y
    assert len(networks) == 2


def test_dropout_and_the_models_mode_are_left_alone(tmp_path):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.drop = Gaussian(), nn.Dropout(0.5)

        def forward(self, x, t):
            return self.drop(self.net(x, t))

    model = Dropping().train()
    FLOW.reflow(model, tmp_path, SHAPE, fit=fast(1), **PAIRS)
    pairs = gk.PairStore(tmp_path / "2-rectified" / "pairs").read(0)
    torch.testing.assert_close(pairs.x1, FLOW.sample(model.net, x0=pairs.x0, steps=16, sampler="rk4"))
    assert model.training and model.drop.training


@pytest.mark.parametrize("change, words", [
    ({"fit": fast(6)}, "path: expected a network of the same settings"),
    ({"steps": 17}, "path: expected a folder of the same settings, .* steps 16, asked for 17"),
    ({"seed": 1}, "path: expected a folder of the same settings, .* seed 0, asked for 1"),
])  # fmt: skip
def test_a_folder_of_other_settings_is_refused(change, words, tmp_path):
    given = {"fit": fast(5), **PAIRS}
    FLOW.reflow(Gaussian(), tmp_path, SHAPE, **given)
    with pytest.raises(ValueError, match=words):
        FLOW.reflow(Gaussian(), tmp_path, SHAPE, **{**given, **change})


@pytest.mark.parametrize("options, error, words", [
    ({"rounds": 0}, ValueError, "rounds: expected an integer >= 1, got 0"),
    ({"fit": {"epochs": 3}}, TypeError, "fit: expected steps, batch_size, .*, got 'epochs'"),
    ({"model": lambda x, t: x}, TypeError, "model: expected a torch.nn.Module, got function"),
    ({"train": lambda *_: None}, TypeError, "train: expected the trained network from it, got NoneType"),
])  # fmt: skip
def test_a_bad_argument_of_reflow_is_named(options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        FLOW.reflow(**{"model": Gaussian(), "path": tmp_path, "shape": SHAPE, **PAIRS, **options})


def test_pairs_that_are_not_all_there_are_not_trained_on(tmp_path):
    store = FLOW.write_pairs(Gaussian(), tmp_path, SHAPE, rank=0, world_size=2, **PAIRS)
    before = copy.deepcopy(network := Gaussian())
    with pytest.raises(ValueError, match="pairs: expected all 3 shards in .*, 1 are missing"):
        training.fit_pairs(network, FLOW.loss, store, steps=2)
    assert torch.equal(network.weight, before.weight)
