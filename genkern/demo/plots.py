"""The two pictures: rows of digits to judge by eye, and quality against the number of network calls."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# A hue a family, so that the lines of one network are seen to belong together: (colour, marker, dashes).
STYLES = {
    "DDPM": ("#7fb3e6", "s", "--"),
    "DDIM": ("#1f5fa8", "o", "-"),
    "Flow matching, Euler": ("#2e8b57", "o", "-"),
    "Flow matching, Heun": ("#86c79b", "s", "--"),
    "Rectified flow, Euler": ("#e8963a", "o", "-"),
    "2-rectified flow, Euler": ("#b5391f", "D", "-"),
    "Consistency": ("#7b3fa0", "^", "-"),
    "Consistency's teacher": ("#b79ad0", "s", "--"),
}

GREY = "#555555"
ROUND = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]  # ticks that a reader can place


@dataclasses.dataclass(frozen=True)
class GridRow:
    """A row of the grid of samples: a label, the first of the images [N, 1, 8, 8] in [-1, 1], and a note after them."""

    title: str
    subtitle: str
    note: str
    images: torch.Tensor
    gap_above: bool = False


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of the quality plot: the Frechet distance at each number of network calls."""

    name: str
    calls: Sequence[int]
    frechet: Sequence[float]


def save_samples(rows: Sequence[GridRow], path: pathlib.Path, columns: int = 20) -> None:
    """A labelled grid: a row a method and a number of network calls, its first samples, none picked."""
    left, right, cell, pitch, gap, head = 2.0, 1.35, 0.46, 0.53, 0.16, 0.85  # inches
    strip = columns * cell * 9 / 8
    width = left + strip + right
    height = head + pitch * len(rows) + gap * sum(row.gap_above for row in rows) + 0.1
    figure = _figure(width, height)

    def text(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / width, 1.0 - y / height, words, **style)

    subtitle = (
        f"The first {columns} samples of each method, none picked, from the same initial noise in each column. "
        "“Calls” are evaluations of the network."
    )
    text(0.15, 0.2, "Handwritten digits drawn by each method", fontsize=16, weight="bold", va="top")
    text(0.15, 0.53, subtitle, fontsize=10, color=GREY, va="top")
    y = head
    for row in rows:
        y += gap * row.gap_above
        text(0.15, y + 0.16, row.title, fontsize=11.5, weight="bold", va="center")
        text(0.15, y + 0.35, row.subtitle, fontsize=9.5, color=GREY, va="center")
        axes = figure.add_axes((left / width, 1.0 - (y + cell) / height, strip / width, cell / height))
        axes.imshow(_strip(row.images[:columns]), cmap="gray_r", vmin=-1.0, vmax=1.0, aspect="auto")
        axes.set_axis_off()
        text(left + strip + 0.1, y + cell / 2, row.note, fontsize=9, va="center", linespacing=1.3)
        y += pitch
    figure.savefig(path, dpi=130, facecolor="white")


def save_quality(curves: Sequence[Curve], floor: float, ceiling: float, path: pathlib.Path) -> None:
    """The Fréchet distance against network calls, both logarithmic, between its floor and its ceiling."""
    figure = _figure(10.5, 6.2)
    axes = figure.add_axes((0.085, 0.115, 0.655, 0.755))
    for curve in curves:
        colour, marker, dashes = STYLES[curve.name]
        style = {"marker": marker, "color": colour, "linewidth": 2, "markersize": 7}
        axes.plot(curve.calls, curve.frechet, dashes, label=curve.name, **style)
    every = [c for curve in curves for c in curve.calls]
    low, high = min(every) * 0.85, max(every) * 1.18
    ends = ((ceiling, "ceiling: noise", True), (floor, "floor: two halves of the real digits", False))
    for value, words, above in ends:
        axes.axhline(value, color=GREY, linewidth=1.3, linestyle=":")
        place = {"xytext": (-4, 5 if above else -6), "textcoords": "offset points", "ha": "right"}
        words = f"{words} ({value:.2g})"
        axes.annotate(words, (high, value), fontsize=10, color=GREY, va="bottom" if above else "top", **place)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    lowest = min(floor, *(min(curve.frechet) for curve in curves))
    highest = max(ceiling, *(max(curve.frechet) for curve in curves))
    axes.set_ylim(lowest / 1.6, highest * 1.6)
    axes.minorticks_off()
    for set_ticks, (start, stop) in ((axes.set_xticks, (low, high)), (axes.set_yticks, axes.get_ylim())):
        ticks = [t for t in ROUND if start <= t <= stop]
        set_ticks(ticks, [f"{t:g}" for t in ticks])
    axes.grid(True, color="#e2e2e2", linewidth=0.8)
    axes.set_xlabel("network calls for one sample", fontsize=12)
    axes.set_ylabel("Fréchet distance to the real digits (lower is better)", fontsize=12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=11, labelspacing=0.9)
    figure.text(0.085, 0.945, "Quality against network calls", fontsize=16, weight="bold", va="center")
    subtitle = (
        "In the features of a classifier of real digits; a distance of 1 is as much as the real digits vary themselves."
    )
    figure.text(0.085, 0.9, subtitle, fontsize=10, color=GREY, va="center")
    figure.savefig(path, dpi=130, facecolor="white")


def _figure(width: float, height: float) -> Any:
    # Not through pyplot: it would choose a backend, and remember every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _strip(images: torch.Tensor) -> np.ndarray:
    """[N, 1, 8, 8] side by side with a light gap of one pixel between: [8, 9 N - 1]."""
    padded = torch.nn.functional.pad(images.clamp(-1.0, 1.0).float().cpu()[:, 0], (0, 1), value=-1.0)
    return torch.cat(list(padded), dim=1)[:, :-1].numpy()
