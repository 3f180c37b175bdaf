"""Pairs on disk: what they are a function of, what a cut leaves behind, what is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import genkern as gk
from genkern import files, flows
from genkern.noise import Noise, Purpose

safetensors = pytest.importorskip("safetensors.torch")

FLOW = gk.RectifiedFlow()
SHAPE = (11, 3)
OPTIONS = {"steps": 3, "seed": 5, "shard_size": 4}


class Net(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x, t, y=None):
        v = torch.sin(self.scale * x) + t[:, None]
        return v if y is None else v + y[:, None]


def whole(store):
    return store.batch(range(len(store)))


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_pairs_on_disk_are_the_flows_own_pairs(tmp_path, device):
    store = FLOW.write_pairs(Net().to(device), tmp_path, SHAPE, **OPTIONS)
    x0, x1 = (x.cpu() for x in FLOW.pairs(Net().to(device), SHAPE, steps=3, noise=Noise(5, stream=1)))
    found = whole(store)
    assert torch.equal(found.x0, x0) and found.sample_ids.tolist() == list(range(11))
    assert torch.equal(found.x0, gk.ops.randn(SHAPE, noise=Noise(5, stream=1).at(Purpose.INITIAL)))
    torch.testing.assert_close(found.x1, x1)
    assert (len(store), store.shards, [len(store.ids(k)) for k in range(3)]) == (11, 3, [4, 4, 3])


def test_a_shard_is_a_safetensors_file_that_says_what_it_is(tmp_path):
    store = FLOW.write_pairs(Net(), tmp_path, SHAPE, cond={"y": torch.arange(11.0)}, **OPTIONS)
    tensors = safetensors.load_file(tmp_path / "pairs-00001.safetensors")
    assert sorted(tensors) == ["cond.y", "sample_ids", "x0", "x1"]
    assert tensors["sample_ids"].tolist() == tensors["cond.y"].tolist() == [4, 5, 6, 7]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["count"], manifest["shard_size"]) == (11, 4)
    assert manifest["settings"]["steps"] == 3 and manifest["settings"]["seed"] == 5
    assert store.settings == manifest["settings"]


@pytest.mark.parametrize("world_size", [2, 5])
def test_shards_of_several_processes_are_those_of_one(world_size, tmp_path):
    one = FLOW.write_pairs(Net(), tmp_path / "one", SHAPE, **OPTIONS)
    for rank in reversed(range(world_size)):
        several = FLOW.write_pairs(Net(), tmp_path / "several", SHAPE, rank=rank, world_size=world_size, **OPTIONS)
        assert bool(several.missing()) is (rank > 0)
    assert contents(one.path) == contents(several.path)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import test_pair_store as t
write, names = os.replace, []
def replace(source, target):
    if str(target).endswith("00001.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(source, target)
os.replace = replace
t.FLOW.write_pairs(t.Net(), sys.argv[1], t.SHAPE, **t.OPTIONS)
"""


def test_a_process_killed_while_it_writes_leaves_whole_shards_and_is_resumed(tmp_path, request):
    expected = contents(FLOW.write_pairs(Net(), tmp_path / "whole", SHAPE, **OPTIONS).path)
    cut, tests = tmp_path / "cut", str(request.path.parent)
    code = subprocess.run([sys.executable, "-c", KILLED, str(cut), tests], cwd=request.config.rootpath).returncode
    assert code == -9
    left = contents(cut)
    unfinished = next(name for name in left if name.endswith(".tmp"))
    assert len(left.pop(unfinished)) > 0
    assert left == {name: expected[name] for name in ("manifest.json", "pairs-00000.safetensors")}
    os.utime(cut / unfinished, (0, 0))  # long ago
    calls = []

    class Counting(Net):
        def forward(self, x, t):
            calls.append(len(x))
            return super().forward(x, t)

    assert FLOW.write_pairs(Counting(), cut, SHAPE, **OPTIONS).missing() == []
    assert calls == [1, 1, 1, 4, 4, 4, 3, 3, 3]  # the first pair again, then three steps of each missing shard
    assert contents(cut) == expected


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_drawn_again(kept, tmp_path):
    store = FLOW.write_pairs(Net(), tmp_path, SHAPE, **OPTIONS)
    expected, file = contents(tmp_path), store.file(2)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    again = gk.PairStore(tmp_path)
    assert again.missing() == again.verify() == [2]
    with pytest.raises(FileNotFoundError, match=r"pairs: expected shard 2 of 3 in .*, which is missing or cut off"):
        again.batch([9])
    assert again.batch([0, 7]).sample_ids.tolist() == [0, 7]
    FLOW.write_pairs(Net(), tmp_path, SHAPE, **OPTIONS)
    assert contents(tmp_path) == expected


def test_a_byte_that_changed_on_the_disk_is_found(tmp_path):
    store = FLOW.write_pairs(Net(), tmp_path, SHAPE, **OPTIONS)
    assert store.verify() == []
    data = bytearray(store.file(1).read_bytes())
    data[-3] ^= 1
    store.file(1).write_bytes(data)
    assert (store.missing(), store.verify()) == ([], [1])


def test_a_shard_in_anothers_place_counts_as_missing(tmp_path):
    store = FLOW.write_pairs(Net(), tmp_path, SHAPE, **OPTIONS)
    store.file(1).write_bytes(store.file(0).read_bytes())
    assert store.missing() == [1]
    other = FLOW.write_pairs(Net(), tmp_path / "other", SHAPE, steps=4, seed=5, shard_size=4)
    store.file(1).write_bytes(other.file(1).read_bytes())
    assert store.missing() == [1]


@pytest.mark.parametrize("changed, words", [
    ({"steps": 4}, "steps 3, asked for 4"),
    ({"seed": 6}, "seed 5, asked for 6"),
    ({"shard_size": 5}, "shard_size 4, asked for 5"),
    ({"shape": (12, 3)}, "count 11, asked for 12"),
    ({"model": Net(1.5)}, "model '[0-9a-f]{64}', asked for '[0-9a-f]{64}'"),
    ({"sampler": "heun"}, "sampler 'euler', asked for 'heun'"),
    ({"cond": {"y": torch.zeros(11)}}, r"cond None, asked for \{'y'"),
])  # fmt: skip
def test_a_store_of_other_settings_is_refused(changed, words, tmp_path):
    given = {"model": Net(), "shape": SHAPE, **OPTIONS}
    FLOW.write_pairs(path=tmp_path, **given)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"path: expected a folder of the same settings, .* has pairs of {words}"):
        FLOW.write_pairs(path=tmp_path, **{**given, **changed})
    assert contents(tmp_path) == before


class Shifted:
    def __init__(self, by):
        self.by = by

    def sources(self, ids):
        return self.by + torch.arange(3.0).expand(len(ids), 3)


def same_named(by, key="y"):
    """Functions that have one qualified name whatever they do, by the argument they are."""
    return {
        "x0": lambda ids: torch.full((len(ids), 3), float(by)),
        "cond": lambda ids: {key: torch.full((len(ids),), by)},
        "model": lambda x, t, **_: by * x,
    }


@pytest.mark.parametrize("name, values", [
    ("x0", [same_named(by)["x0"] for by in (1, 2)]),
    ("x0", [Shifted(by).sources for by in (1.0, 2.0)]),
    ("cond", [same_named(by)["cond"] for by in (1, 2)]),
    ("cond", [same_named(1, key)["cond"] for key in ("y", "z")]),
    ("model", [same_named(by)["model"] for by in (1, 2)]),
])  # fmt: skip
@pytest.mark.parametrize("lost", [[], [0], [0, 1, 2]])
def test_functions_of_one_name_are_told_apart_by_the_first_pair_there(lost, name, values, tmp_path):
    given = {"model": lambda x, t, **_: x, "shape": SHAPE, "path": tmp_path, **OPTIONS}
    store = FLOW.write_pairs(**{**given, name: values[0]})
    for shard in lost:
        store.file(shard).unlink()
    before = contents(tmp_path)
    if len(lost) < 3:
        with pytest.raises(ValueError, match="expected a folder of the same settings, .* has another .* of pair [04] "):
            FLOW.write_pairs(**{**given, name: values[1]})
        assert contents(tmp_path) == before
    FLOW.write_pairs(**{**given, name: values[0] if len(lost) < 3 else values[1]})
    assert gk.PairStore(tmp_path).missing() == []


def test_buffers_that_are_not_persistent_are_part_of_the_settings(tmp_path):
    class Held(Net):
        def __init__(self, by):
            super().__init__()
            self.register_buffer("by", torch.tensor(by), persistent=False)

    FLOW.write_pairs(Held(1.0), tmp_path, SHAPE, **OPTIONS)
    with pytest.raises(ValueError, match="path: expected a folder of the same settings, .* has pairs of model"):
        FLOW.write_pairs(Held(1.001), tmp_path, SHAPE, **OPTIONS)


def test_a_pair_that_another_device_rounds_otherwise_is_the_same(tmp_path):
    FLOW.write_pairs(lambda x, t: x.sin(), tmp_path, SHAPE, **OPTIONS)
    FLOW.write_pairs(lambda x, t: 1.001 * x.sin(), tmp_path, SHAPE, **OPTIONS)


def test_conditions_and_guidance_are_kept_in_the_pairs(tmp_path):
    y, w = torch.arange(11.0), torch.linspace(1.0, 3.0, 11)
    given = {"cond": {"y": y}, "uncond": {"y": torch.zeros(11)}, "guidance_scale": w}
    found = whole(FLOW.write_pairs(Net(), tmp_path / "given", SHAPE, **given, **OPTIONS))
    assert torch.equal(found.cond["y"], y)
    assert torch.equal(found.guidance_scale, w.double())
    torch.testing.assert_close(found.x1, FLOW.sample(Net(), SHAPE, steps=3, noise=Noise(5, stream=1), **given))
    called = {"cond": lambda ids: {"y": ids.float()}, "uncond": lambda ids: {"y": torch.zeros(len(ids))}}
    store = FLOW.write_pairs(Net(), tmp_path / "called", SHAPE, **called, guidance_scale=2.0, **OPTIONS)
    assert torch.equal(whole(store).cond["y"], y)
    assert whole(store).guidance_scale.tolist() == [2.0] * 11
    assert store.settings["guidance_scale"] == 2.0


@pytest.mark.parametrize("form", ["tensor", "callable"])
def test_pairs_start_from_any_source(form, tmp_path):
    source = torch.rand(SHAPE)
    x0 = source if form == "tensor" else lambda ids: source[ids]
    found = whole(FLOW.write_pairs(Net(), tmp_path, SHAPE, x0=x0, **OPTIONS))
    assert torch.equal(found.x0, source)
    torch.testing.assert_close(found.x1, FLOW.sample(Net(), x0=source, steps=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_flow_starts_from_the_source_as_it_is_stored(dtype, tmp_path):
    found = whole(FLOW.write_pairs(Net(), tmp_path, SHAPE, dtype=dtype, **OPTIONS))
    assert found.x0.dtype == found.x1.dtype == dtype
    torch.testing.assert_close(found.x1, FLOW.sample(Net(), x0=found.x0, steps=3).to(dtype))
    assert torch.isfinite(FLOW.loss(Net(), found.x1, found.x0, model_dtype=torch.float32))


def test_a_batch_is_in_the_order_that_was_asked_for(tmp_path):
    store = FLOW.write_pairs(Net(), tmp_path, SHAPE, **OPTIONS)
    order = [9, 0, 4, 4, 10]
    found, all_of_them = store.batch(order), whole(store)
    assert found.sample_ids.tolist() == order
    assert torch.equal(found.x1, all_of_them.x1[order])
    found.x1.zero_()  # what is mapped from the disk is not changed
    assert torch.equal(store.read(1).x1, all_of_them.x1[4:8])


def test_every_pair_is_seen_once_an_epoch_by_one_process_or_several(tmp_path):
    store = FLOW.write_pairs(Net(), tmp_path, (12, 3), **OPTIONS)
    batches = store.batches(4, seed=1)
    epochs = [[i for _ in range(3) for i in next(batches).sample_ids.tolist()] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12)) and epochs[0] != epochs[1]
    parts = [store.batches(2, seed=1, rank=r, world_size=2) for r in range(2)]
    assert [i for _ in range(3) for part in parts for i in next(part).sample_ids.tolist()] == epochs[0]


def test_a_store_is_a_dataset_of_torch(tmp_path):
    store = FLOW.write_pairs(Net(), tmp_path, SHAPE, cond={"y": torch.arange(11.0)}, **OPTIONS)
    loaded = list(torch.utils.data.DataLoader(pickle.loads(pickle.dumps(store)), batch_size=6))
    assert torch.equal(torch.cat([batch["x1"] for batch in loaded]), whole(store).x1)
    assert torch.equal(torch.cat([batch["cond"]["y"] for batch in loaded]), torch.arange(11.0))
    assert torch.equal(store[-1]["x0"], whole(store).x0[10])


def test_a_missing_package_and_a_missing_store_are_said(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="path: expected a folder of pairs, found no .*manifest.json"):
        gk.PairStore(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other", "version": 1}')
    with pytest.raises(ValueError, match="path: expected a manifest of pairs in .*, got format 'other', version 1"):
        gk.PairStore(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"need safetensors: pip install 'genkern\[reflow\]'"):
        FLOW.write_pairs(Net(), tmp_path / "new", SHAPE, **OPTIONS)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options, error, words", [
    ({"x0": torch.zeros(10, 3)}, ValueError, r"x0: expected dimension 0 to be the pairs, 11, got shape \(10, 3\)"),
    ({"cond": {"y": torch.zeros(3)}}, ValueError, r"cond\['y'\]: expected dimension 0 to be the pairs, 11"),
    ({"guidance_scale": torch.ones(2)}, ValueError, "guidance_scale: expected dimension 0 to be the pairs, 11"),
    ({"dtype": torch.float64}, ValueError, "dtype: expected torch.float32, torch.float16 or torch.bfloat16"),
    ({"rank": 1}, ValueError, "rank: expected rank and world_size, or neither, got 1 and None"),
    ({"rank": 2, "world_size": 2}, ValueError, "rank: expected an integer from 0 to 1, got 2"),
    ({"shape": (0, 3)}, ValueError, "count: expected an integer >= 1, got 0"),
    ({"steps": 0}, ValueError, "steps: expected an integer >= 1, got 0"),
    ({"guidance_scale": 2.0}, ValueError, "uncond: expected"),
    ({"x0": lambda ids: torch.zeros(1, 4)}, ValueError, "x0|initial state: expected shape"),
    ({"return_trajectory": True}, TypeError, "write_pairs.. got an unexpected keyword argument 'return_trajectory'"),
])  # fmt: skip
def test_a_bad_argument_is_named_and_nothing_is_made(options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        FLOW.write_pairs(Net(), tmp_path / "store", **{"shape": SHAPE, **OPTIONS, **options})
    assert not (tmp_path / "store").exists()


def test_a_shard_takes_its_own_pairs_alone(tmp_path):
    store = FLOW.write_pairs(Net(), tmp_path, SHAPE, **OPTIONS)
    before = contents(tmp_path)
    x, ids = torch.zeros(4, 3), torch.arange(4)
    with pytest.raises(ValueError, match="sample_ids: expected 4 to 7 of shard 1"):
        store.write(1, flows.Pairs(x, x, {}, ids))
    with pytest.raises(ValueError, match=r"x1: expected 4 pairs of shard 0, got shape \(3, 3\)"):
        store.write(0, flows.Pairs(x, x[:3], {}, ids))
    with pytest.raises(IndexError, match="indices: expected one or more integers from 0 to 10"):
        store.batch([11])
    assert contents(tmp_path) == before


def test_two_writers_of_a_shard_leave_each_others_files_alone(tmp_path):
    store = FLOW.write_pairs(Net(), tmp_path, SHAPE, **OPTIONS)
    expected, pairs = contents(tmp_path), store.batch(range(4))
    with files.replaced(store.file(0)) as one:
        one.write_bytes(expected[store.file(0).name])
        store.write(0, pairs)
        assert one.exists()
    assert contents(tmp_path) == expected


def test_files_have_the_mode_of_any_new_file(tmp_path):
    store = FLOW.write_pairs(Net(), tmp_path, SHAPE, **OPTIONS)
    (tmp_path / "new").touch()
    assert store.file(0).stat().st_mode == (tmp_path / "new").stat().st_mode


def test_what_fails_while_it_is_written_leaves_the_old_file(tmp_path):
    file = tmp_path / "a"
    file.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), files.replaced(file) as temporary:
        temporary.write_text("new")
        raise RuntimeError("stop")
    assert contents(tmp_path) == {"a": b"old"}
