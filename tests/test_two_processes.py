"""Two processes of torch.distributed: one coupling, one store of pairs and one training, as of one process."""

from __future__ import annotations

import pytest
import torch
import two_processes as two
from processes import BACKENDS, device_of, run

import genkern as gk
from genkern import flows, training
from genkern.noise import Noise, Purpose
from genkern.ops import randn

pytest.importorskip("safetensors")
pytest.importorskip("scipy")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)


@pytest.fixture(scope="module", params=BACKENDS)
def results(request, tmp_path_factory):
    """What both processes found, the folder that they wrote into, and the device of one process."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run(two.body, request.param, folder), device_of(request.param)


@pytest.mark.parametrize("name", two.COUPLINGS)
def test_each_has_its_part_of_the_coupling_of_the_whole_batch(name, results):
    _, found_by, device = results
    x0, x1, y, u = two.data(2 * two.N, device)
    seen = (x0[:, :1], x1[:, :1]) if name == "features" else (x0, x1)
    expected = x0[two.COUPLINGS[name](*seen, {"y": y}, u)]
    found = torch.cat([each[name] for each in found_by]).to(device)
    assert torch.equal(found, expected)
    alone = [two.COUPLINGS[name](*(v[part] for v in seen), {"y": y[part]}, u[part]) for part in halves()]
    assert not torch.equal(found, torch.cat([x0[part][index] for part, index in zip(halves(), alone, strict=True)]))


def halves():
    return slice(0, two.N), slice(two.N, 2 * two.N)


def test_without_processes_it_is_the_coupling_itself():
    x0, x1, y, u = two.data(8, "cpu")
    for name, coupling in two.COUPLINGS.items():
        seen = (x0[:, :1], x1[:, :1]) if name == "features" else (x0, x1)
        found = two.gathered(name).sources(x0, x1, {"y": y}, u)
        assert torch.equal(found, x0[coupling(*seen, {"y": y}, u)])


def test_loss_of_two_processes_is_that_of_one_batch(results):
    _, found, device = results
    _, x1, _, _ = two.data(2 * two.N, device)
    expected = two.FLOW.loss(two.Net().to(device), x1, coupling=flows.Optimal(), noise=Noise(7), reduction="none")
    torch.testing.assert_close(torch.cat([each["loss"] for each in found]), expected.cpu())


def test_an_error_reaches_every_process(results):
    first, second = results[1]
    for each in (first, second):
        words = "ValueError: x0: expected no gradient among several processes, got sources that require one"
        assert each["gradient"] == words
        assert torch.equal(each["unasked"], each["optimal"])
        assert each["sizes"] == "ValueError: x0: expected as many samples in every process, got [6, 5]"
    assert first["failing"] == "ArithmeticError: no plan"
    assert second["failing"] == "RuntimeError: coupling: the first process could not solve it; its own error says why"


def test_pairs_of_two_processes_are_those_of_one(results, tmp_path):
    folder, found, device = results
    one = two.FLOW.write_pairs(two.Net().to(device), tmp_path, (20, 2), **two.PAIRS)
    assert [each["missing"] for each in found] == [[], []]  # they wait for each other
    names = sorted(file.name for file in one.path.iterdir())
    assert names == sorted(file.name for file in (folder / "pairs").iterdir())
    assert all((one.path / name).read_bytes() == (folder / "pairs" / name).read_bytes() for name in names)
    several = gk.PairStore(folder / "pairs")
    ids = torch.cat([several.read(shard).sample_ids for shard in range(several.shards)])
    assert torch.equal(ids, torch.arange(20))  # no repeat and no gap
    assert torch.equal(one.read(0).x0, randn((8, 2), noise=Noise(3, stream=1).at(Purpose.INITIAL)))


def test_the_first_process_answers_for_all(results):
    assert [each["answer"] for each in results[1]] == ["of 0", "of 0"]


def test_training_of_two_processes_is_that_of_one(results, tmp_path):
    _, found, device = results
    network = two.Net().to(device)
    store = two.FLOW.write_pairs(two.Net().to(device), tmp_path / "pairs", (20, 2), **two.PAIRS)
    training.fit_pairs(network, two.FLOW.loss, store, **two.FIT)
    (reflowed,) = two.FLOW.reflow(two.Net().to(device), tmp_path / "reflow", (20, 2), fit=two.FIT, **two.PAIRS)
    trained = {"network": network, "resumed": network, "reflowed": reflowed, "mended": reflowed}
    for key, of in trained.items():
        expected = {name: value.cpu() for name, value in two.parameters(of).items()}
        for each in found:
            torch.testing.assert_close(each[key], expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(expected["mix.weight"], two.Net().mix.weight)


@pytest.mark.parametrize("name", two.OPTIONS)
def test_options_of_a_loss_are_of_the_whole_batch(name, results, tmp_path):
    _, found, device = results
    store = two.FLOW.write_pairs(two.Net().to(device), tmp_path, (20, 2), **two.PAIRS)
    expected = {key: value.cpu() for key, value in two.fitted(store, two.OPTIONS[name], device).items()}
    for each in found:
        torch.testing.assert_close(each[name], expected, rtol=1e-3, atol=1e-4)


def test_a_reduction_to_no_number_is_refused(tmp_path):
    store = two.FLOW.write_pairs(two.Net(), tmp_path, (20, 2), **two.PAIRS)
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum', got 'none'"):
        two.fitted(store, {"reduction": "none"}, "cpu")
