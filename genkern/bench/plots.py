"""The two pictures: bandwidth under the roof that a copy sets, and how many times faster genkern is."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from .world import CAREFUL, COMPILED, GENKERN, GRAPHED, TEXTBOOK

# A colour and a marker a contender, the same in both pictures; genkern's stands out.
STYLES = {
    GENKERN: ("#b5391f", "D"),
    TEXTBOOK: ("#9aa5b1", "o"),
    CAREFUL: ("#1f5fa8", "s"),
    COMPILED: ("#2e8b57", "^"),
    "diffusers": ("#e8963a", "P"),
    "torchdiffeq": ("#7b3fa0", "X"),
    "flow_matching": ("#c65d9b", "v"),
    "torchcfm": ("#8c6d31", "<"),
    "k-diffusion": ("#17a2b8", ">"),
    "torch.func._random": ("#555555", "*"),
    GRAPHED: ("#000000", "d"),
}
GREY, GRID = "#555555", "#e2e2e2"
ROW, HEAD, FOOT = 0.3, 1.15, 1.25  # inches


def bandwidth(result: dict[str, Any], path: pathlib.Path) -> None:
    """Bytes of the formula over time for every op and contender, a panel a dtype; the copy's bandwidth is the roof."""
    rows = [row for row in result["rows"] if row["kind"] in ("op", "training")]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = _figure(result, "Bandwidth by the formula", len(names), max(1, len(dtypes)))
    subtitle = (
        "Bytes that the formula moves, over the median time; more is better. Dotted: torch's copy_ beside each op."
    )
    _heading(figure, subtitle)
    for axes, dtype in zip(panels, dtypes, strict=False):
        chosen = [row for row in rows if row["dtype"] == dtype]
        for row in chosen:
            y = names.index(row["case"])
            roof = row["copy_bytes_per_second"] * 1e-9
            axes.plot([roof, roof], [y - 0.45, y + 0.45], color="black", linewidth=1.4, linestyle=":")
            _points(axes, {name: v * 1e-9 for name, v in row["bytes_per_second"].items()}, y)
        _axes(axes, names, dtype, "GB/s")
    _legend(figure, [name for row in rows for name in row["bytes_per_second"]])
    figure.savefig(path, dpi=120, facecolor="white")


def speedup(result: dict[str, Any], path: pathlib.Path) -> None:
    """A contender's time over genkern's for every case, a panel a dtype."""
    rows = result["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = _figure(result, "How many times faster genkern is", len(names), max(1, len(dtypes)))
    _heading(
        figure,
        "A contender's median time over genkern's, the same work in one run; right of the line genkern is faster.",
    )
    for axes, dtype in zip(panels, dtypes, strict=False):
        axes.axvline(1.0, color=STYLES[GENKERN][0], linewidth=1.6)
        for row in rows:
            if row["dtype"] == dtype:
                _points(axes, row["speedup"], names.index(row["case"]))
        _axes(axes, names, dtype, "times faster")
    _legend(figure, [name for row in rows for name in row["speedup"]])
    figure.savefig(path, dpi=120, facecolor="white")


def _figure(result: dict[str, Any], title: str, rows: int, panels: int) -> tuple[Any, list[Any]]:
    # Not through pyplot: it would choose a backend, and remember every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    label, panel, gap, margin = 3.3, 4.6, 0.35, 0.3
    width, height = label + panels * (panel + gap) + margin, HEAD + ROW * rows + FOOT
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    machine, arguments = result["machine"], result["arguments"]
    where = f"{machine['name']}, torch {machine['versions']['torch']}, float32 tensors of {arguments['mib']:g} MiB"
    figure.text(0.2 / width, 1.0 - 0.3 / height, title, fontsize=16, weight="bold", va="center")
    figure.text(0.2 / width, 1.0 - 0.59 / height, where, fontsize=10.5, va="center")
    found = []
    for k in range(panels):
        left = label + k * (panel + gap)
        box = (left / width, FOOT / height, panel / width, ROW * rows / height)
        axes = figure.add_axes(box)
        axes.set_ylim(rows - 0.5, -0.5)
        axes.tick_params(labelleft=k == 0)
        found.append(axes)
    return figure, found


def _heading(figure: Any, subtitle: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.2 / width, 1.0 - 0.81 / height, subtitle, fontsize=9.5, color=GREY, va="center")


def _points(axes: Any, values: dict[str, float], y: float) -> None:
    """A contender a marker; genkern's last, over the others."""
    for name in sorted(values, key=lambda name: name == GENKERN):
        colour, marker = STYLES[name]
        size, edge = (8.0, 0.8) if name == GENKERN else (7.0, 0.6)
        axes.plot(values[name], y, marker, color=colour, markersize=size, markeredgecolor="white", markeredgewidth=edge)


def _axes(axes: Any, names: Sequence[str], title: str, unit: str) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.15, high * 1.15)
    low, high = axes.get_xlim()
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(ticks) > 8:  # decades are enough of a wide range
        ticks = [t for t in ticks if f"{t:e}".startswith("1.")]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(unit, fontsize=11)
    axes.set_title(title, fontsize=11.5, weight="bold", pad=5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    order = [name for name in STYLES if name in names]
    handles = [
        Line2D([], [], color=STYLES[name][0], marker=STYLES[name][1], linestyle="", markersize=8, label=name)
        for name in order
    ]
    columns = max(1, min(len(handles), int(figure.get_size_inches()[0] / 1.75)))
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=10.5)
