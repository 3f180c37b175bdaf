"""Two processes of torch.distributed (gloo): one coupling, one store of pairs and one training, as of one process."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import torch
import two_processes as two

from genkern import flows, training
from genkern.noise import Noise, Purpose
from genkern.ops import randn

pytest.importorskip("safetensors")
pytest.importorskip("scipy")
if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes found, and the folder that they wrote into."""
    folder = tmp_path_factory.mktemp("two")
    script, root = pathlib.Path(two.__file__), pathlib.Path(two.__file__).parents[1]
    running = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(folder)], cwd=root, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", two.COUPLINGS)
def test_each_has_its_part_of_the_coupling_of_the_whole_batch(name, results):
    x0, x1, y, u = two.data(2 * two.N)
    seen = (x0[:, :1], x1[:, :1]) if name == "features" else (x0, x1)
    expected = x0[two.COUPLINGS[name](*seen, {"y": y}, u)]
    found = torch.cat([each[name] for each in results[1]])
    assert torch.equal(found, expected)
    alone = [two.COUPLINGS[name](*(v[part] for v in seen), {"y": y[part]}, u[part]) for part in halves()]
    assert not torch.equal(found, torch.cat([x0[part][index] for part, index in zip(halves(), alone, strict=True)]))


def halves():
    return slice(0, two.N), slice(two.N, 2 * two.N)


def test_without_processes_it_is_the_coupling_itself():
    x0, x1, y, u = two.data(8)
    for name, coupling in two.COUPLINGS.items():
        seen = (x0[:, :1], x1[:, :1]) if name == "features" else (x0, x1)
        found = two.gathered(name).sources(x0, x1, {"y": y}, u)
        assert torch.equal(found, x0[coupling(*seen, {"y": y}, u)])


def test_loss_of_two_processes_is_that_of_one_batch(results):
    _, x1, _, _ = two.data(2 * two.N)
    expected = two.FLOW.loss(two.Net(), x1, coupling=flows.Optimal(), noise=Noise(7), reduction="none")
    torch.testing.assert_close(torch.cat([each["loss"] for each in results[1]]), expected)


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
    folder, found = results
    one = two.FLOW.write_pairs(two.Net(), tmp_path, (20, 2), **two.PAIRS)
    assert [each["missing"] for each in found] == [[], []]  # they wait for each other
    names = sorted(file.name for file in one.path.iterdir())
    assert names == sorted(file.name for file in (folder / "pairs").iterdir())
    assert all((one.path / name).read_bytes() == (folder / "pairs" / name).read_bytes() for name in names)
    assert torch.equal(one.read(0).x0, randn((8, 2), noise=Noise(3, stream=1).at(Purpose.INITIAL)))


def test_the_first_process_answers_for_all(results):
    assert [each["answer"] for each in results[1]] == ["of 0", "of 0"]


def test_training_of_two_processes_is_that_of_one(results, tmp_path):
    network = two.Net()
    store = two.FLOW.write_pairs(two.Net(), tmp_path / "pairs", (20, 2), **two.PAIRS)
    training.fit_pairs(network, two.FLOW.loss, store, **two.FIT)
    (reflowed,) = two.FLOW.reflow(two.Net(), tmp_path / "reflow", (20, 2), fit=two.FIT, **two.PAIRS)
    for key, of in (("network", network), ("reflowed", reflowed), ("mended", reflowed)):
        expected = {name: value.detach() for name, value in of.named_parameters()}
        for each in results[1]:
            torch.testing.assert_close(each[key], expected, rtol=1e-4, atol=1e-5)
        assert not torch.equal(expected["mix.weight"], two.Net().mix.weight)


@pytest.mark.parametrize("name", two.OPTIONS)
def test_options_of_a_loss_are_of_the_whole_batch(name, results, tmp_path):
    expected = two.fitted(two.FLOW.write_pairs(two.Net(), tmp_path, (20, 2), **two.PAIRS), two.OPTIONS[name])
    for each in results[1]:
        torch.testing.assert_close(each[name], expected, rtol=1e-3, atol=1e-4)


def test_a_reduction_to_no_number_is_refused(tmp_path):
    store = two.FLOW.write_pairs(two.Net(), tmp_path, (20, 2), **two.PAIRS)
    with pytest.raises(ValueError, match="reduction: expected one of 'mean', 'sum', got 'none'"):
        two.fitted(store, {"reduction": "none"})
