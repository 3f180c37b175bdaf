"""tools/rectified_flow: what is said of transport costs, and from which sources flows are judged."""

from __future__ import annotations

import importlib
import pathlib

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("typer")
pytest.importorskip("safetensors")
pytest.importorskip("scipy")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "tools"))
    return {name: importlib.import_module(f"rectified_flow.{name}") for name in ("page", "runs", "problems")}


def test_costs_of_one_source_are_compared_by_their_differences(tool):
    """A rise of 0.1 in every sample, of costs whose spread is 5, is none by the errors of the two means."""
    cost, noise = 5.0 * torch.randn(2, 400, generator=torch.Generator().manual_seed(0)).abs()
    costs = {f"{k}-rectified flow": {"squared": cost + 0.1 * (k > 1), "norm": cost - 0.1 * (k > 2)} for k in (1, 2, 3)}
    costs["3-rectified flow"]["squared"] = costs["2-rectified flow"]["squared"] + 0.01 * (noise - noise.mean())
    found = tool["runs"].differences(costs)
    assert found["2-rectified flow"]["squared"] == pytest.approx([0.1, 0.0], abs=1e-6)
    assert found["3-rectified flow"]["squared"][1] == pytest.approx(0.01 * float(noise.std()) / 20, rel=1e-4)
    line = tool["page"]._moved(found)
    assert "of the 2-rectified flow \\|d\\|² rose and none fell; " in line
    assert "of the 3-rectified flow none rose and \\|d\\| fell." in line


@pytest.mark.parametrize("paired", [False, True])
def test_a_record_without_differences_has_the_means_alone(paired, tool):
    flows = {
        f"{k}-rectified flow": {
            "costs": {"squared": [cost, 0.017]}, "straightness": [0.1, 0.01], "quality": {"1": [1, 0], "50": [1, 0]},
        }
        for k, cost in ((1, 0.4831), (2, 0.4888), (3, 0.4881))
    }  # fmt: skip
    run = {"flows": flows, "metric": "W2 squared"}
    if paired:
        run["cost differences"] = {"2-rectified flow": {"squared": [0.0057, 0.001]}}
    lines = tool["page"]._verdicts(run)
    assert "by order of reflow: 0.483, 0.489, 0.488 (means of the same sources" in lines[0]
    assert any("paired standard errors: of the 2-rectified flow \\|d\\|² rose" in line for line in lines) is paired


def test_a_flow_is_judged_from_sources_it_was_not_trained_on(tool, tmp_path):
    """A quick run: no source of a sample is one of a pair, and every order is measured from the same sources."""
    import genkern as gk

    seen = []
    problem = tool["problems"].problem("moons", torch.device("cpu"), 0, quick=True)
    sample = gk.RectifiedFlow.sample

    class Seen(gk.RectifiedFlow):
        def sample(self, model, *args, **options):
            if "seed" in options:
                seen.append((options["seed"], options["steps"]))
            return sample(self, model, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool["runs"], "FLOW", Seen())
        record = tool["runs"].run(problem, tmp_path, 0).record
    assert {seed for seed, steps in seen if steps == 100} == {1000}
    stores = [gk.PairStore(file.parent) for file in tmp_path.rglob("manifest.json")]
    sources = torch.cat([store.batch(range(len(store))).x0 for store in stores])
    assert len(stores) == 5
    for seed in {seed for seed, _ in seen}:
        judged = gk.ops.randn((100, 2), noise=gk.Noise(seed).at(gk.noise.Purpose.INITIAL))
        assert not torch.isin(sources, judged).any()
    assert list(record["cost differences"]) == ["2-rectified flow", "3-rectified flow"]
