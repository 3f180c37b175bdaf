"""tools/consistency_table.py: what it states of networks and images, and the page that it writes."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch
from torch import nn

import genkern as gk

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tools"))

import consistency_table as table  # noqa: E402
import consistency_tasks as tasks  # noqa: E402
import consistency_ways as ways  # noqa: E402


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x, t):
        return torch.tanh(self.mix(x)) * (1 + t[:, None])


def test_a_denoiser_on_the_circle_is_the_same_denoiser():
    net, sd = Net(), 0.7
    sigma, x = torch.tensor([0.02, 0.5, 3.0, 20.0], dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    t = (sigma / sd).atan()
    expected = gk.Consistency(0.01, 80.0, sigma_data=sd).teacher_denoise(net, x, sigma)
    turned = t.cos()[:, None] * x  # alpha = cos(t) of the same state
    torch.testing.assert_close(gk.TrigFlow(sd).denoise(ways.OnCircle(net, sd), turned, t), expected)


@pytest.mark.parametrize("times", [1, 2])
def test_the_network_of_patches_has_forward_derivatives_that_are_its_differences(times):
    torch.manual_seed(0)
    net = tasks.PatchNetwork(width=8, times=times).double()
    x, t = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    more = (t + 0.1,) if times == 2 else ()
    dx, dt, h = torch.randn_like(x), torch.ones_like(t), 1e-5
    value, turn, *_ = torch.func.jvp(lambda x, t: net(x, t, *more), (x, t), (dx, dt))
    difference = (net(x + h * dx, t + h * dt, *more) - net(x - h * dx, t - h * dt, *more)) / (2 * h)
    assert value.shape == x.shape
    torch.testing.assert_close(turn, difference, rtol=1e-5, atol=1e-7)


def test_a_strip_has_gaps_between_its_images():
    digits = table.strip(torch.full((3, 1, 4, 4), 1.0))
    assert digits.shape == (4, 14) and digits[0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert table.strip(torch.zeros(2, 3, 4, 4)).shape == (4, 9, 3)


def a_result():
    figures = {"frechet": {"mean": 0.5, "standard_error": 0.01}}
    return {
        "machine": {"name": "A GPU", "versions": {"torch": "2"}, "date": "2026-01-02T", "revision": "abc"},
        "arguments": {"data": "digits", "steps": 1, "teacher_steps": 2, "batch": 3, "samples": 4, "seeds": [0]},
        "floor": 0.1, "ceiling": {"frechet": 9.0}, "seconds": {"CT": 1.25},
        "rows": [{"way": "CT", "calls": calls, "figures": figures} for calls in (1, 2)],
    }  # fmt: skip


def test_the_page_is_rewritten_between_the_markers_of_its_data_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    marks = [*table.marks("digits"), *table.marks("patches")]
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nbetween\n{marks[2]}\nkept\n{marks[3]}\nafter\n")
    for _ in range(2):
        table.rewrite(a_result(), page)
    text = page.read_text()
    assert text.startswith("before\n") and f"between\n{marks[2]}\nkept\n{marks[3]}\nafter\n" in text
    command = "    python tools/consistency_table.py --data digits --steps 1 --teacher-steps 2 --batch 3\n"
    assert f"{marks[0]}\n{command}\nA GPU, torch 2, 2026-01-02" in text
    assert "old" not in text and "| CT | 1.2 | 1 | 0.5000 ± 0.0100 |\n|  |  | 2 | 0.5000" in text
    page.write_text("nothing")
    with pytest.raises(ValueError, match="expected the markers <!-- digits: begin -->"):
        table.rewrite(a_result(), page)


def test_the_page_of_this_repository_has_the_markers():
    text = table.PAGE.read_text(encoding="utf-8")
    for name in tasks.TASKS:
        begin, end = table.marks(name)
        assert text.count(begin) == text.count(end) == 1


def test_a_way_that_was_kept_is_read_again_and_not_for_other_arguments(tmp_path):
    way, other = ways.WAYS[0], ways.WAYS[1]
    found = {"arguments": {"steps": 6, "seeds": [0, 1]}, "seconds": 1.5, "rows": [], "drawn": {1: torch.ones(2, 3)}}
    table.write(tmp_path / "new", way, found)
    again = table.read(tmp_path / "new", way, {"steps": 6, "seeds": [0, 1]})
    assert again["seconds"] == 1.5 and torch.equal(again["drawn"][1], found["drawn"][1])
    assert table.read(tmp_path / "new", other, {"steps": 6, "seeds": [0, 1]}) is None
    assert table.read(None, way, {}) is None
    with pytest.raises(SystemExit, match="is of a run with .*6.* not .*7"):
        table.read(tmp_path / "new", way, {"steps": 7, "seeds": [0, 1]})
