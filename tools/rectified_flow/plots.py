"""The pictures of docs/flows.md: trajectories and one-step samples, quality against calls, what crosses."""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import nn

from genkern import flows
from genkern.demo.plots import GREY, ROUND, _figure, _strip

from . import exact
from .problems import Problem
from .runs import EVALUATED, FINE, FLOW, ORDERS

COLOURS = {1: "#1f5fa8", 2: "#e8963a", 3: "#b5391f"}
BLUE, RED = "#1f5fa8", "#b5391f"


def crossing(path: pathlib.Path) -> None:
    """On the line: interpolations of independent pairs, the rectified flow's trajectories, and their own pairs."""
    z, lines = exact.crossing()
    t = torch.linspace(0.0, 1.0, len(z), dtype=torch.float64)
    straight = (1.0 - t[:, None]) * z[0] + t[:, None] * z[-1]
    figure = _figure(11.0, 4.1)
    panels = (
        (lines, "Interpolations $X_t$ of independent pairs", "they cross"),
        (z, "Their rectified flow $Z_t$", "the same ends in law; no two cross"),
        (straight, "Its own pairs, interpolated", "still none cross: the 2-rectified flow is these lines"),
    )
    for k, (curves, title, words) in enumerate(panels):
        axes = figure.add_axes((0.055 + 0.318 * k, 0.13, 0.285, 0.68))
        for i in range(curves.shape[1]):
            shade = i / (curves.shape[1] - 1)
            axes.plot(t, curves[:, i], color=_mixed(shade), linewidth=0.8, alpha=0.9)
        axes.set_xlim(0.0, 1.0)
        axes.set_ylim(-2.7, 2.7)
        axes.set_xlabel("t", fontsize=11)
        axes.set_title(f"{title}\n", fontsize=11.5, weight="bold")
        axes.text(0.5, 1.03, words, fontsize=9.5, color=GREY, ha="center", transform=axes.transAxes)
        _plain(axes)
    figure.savefig(path, dpi=120, facecolor="white")


def plane(problem: Problem, networks: dict[str, nn.Module], path: pathlib.Path) -> None:
    """Above: trajectories of each flow. Below: samples of one Euler step, last those of the distilled student."""
    figure, real = _figure(11.4, 6.3), problem.data.cpu()
    shape, n = (problem.budget.samples, 2), min(150, len(real))
    x0 = torch.randn(n, 2, generator=torch.Generator().manual_seed(3))
    t = torch.linspace(0.0, 1.0, FINE + 1)[:, None, None]
    device = next(networks["1-rectified flow"].parameters()).device
    curves = [((1.0 - t) * x0 + t * real[:n], "Interpolations $X_t$", "independent pairs")]
    for k in ORDERS:
        _, found = FLOW.sample(networks[f"{k}-rectified flow"], x0=x0.to(device), steps=FINE, return_trajectory=True)
        bent = float(flows.straightness(found).mean())
        curves.append((found.cpu(), f"{k}-rectified flow", f"S(Z) = {bent:.3g} over these"))
    for column, (found, title, words) in enumerate(curves):
        axes = _square(figure, column, 0, problem)
        axes.plot(found[..., 0].numpy(), found[..., 1].numpy(), color="#9aa7b5", linewidth=0.6, zorder=1)
        axes.scatter(*found[0].T, s=5, color=BLUE, zorder=2, linewidths=0)
        axes.scatter(*found[-1].T, s=6, color=RED, zorder=3, linewidths=0)
        axes.set_title(f"{title}\n", fontsize=11.5, weight="bold")
        axes.text(0.5, 1.03, words, fontsize=9.5, color=GREY, ha="center", transform=axes.transAxes)
    named = [(f"{k}-rectified, one step", networks[f"{k}-rectified flow"]) for k in ORDERS]
    for column, (title, network) in enumerate([*named, ("1-rectified, distilled", networks[STUDENT])]):
        axes = _square(figure, column, 1, problem)
        one = FLOW.sample(network, shape, steps=1, seed=EVALUATED)
        axes.scatter(*real.T, s=4, color="#d5dbe1", linewidths=0)
        axes.scatter(*one.cpu().T, s=4, color=RED, linewidths=0, alpha=0.7)
        axes.set_title(f"{title}\n", fontsize=11.5, weight="bold")
        axes.text(
            0.5, 1.03, f"{problem.metric} {problem.quality(one):.3f}", fontsize=9.5, color=GREY, ha="center",
            transform=axes.transAxes,
        )  # fmt: skip
    figure.savefig(path, dpi=110, facecolor="white")


STUDENT = "1-rectified flow, distilled"


def digits(problem: Problem, networks: dict[str, nn.Module], path: pathlib.Path) -> None:
    """Rows of digits at one and two calls from the same noise, none picked."""
    rows: list[tuple[str, int]] = [(name, calls) for name in networks for calls in _shown(name)]
    figure = _figure(11.0, 0.4 * (len(rows) + 2))  # so that pixels are square
    height = 1.0 / (len(rows) + 2)
    pictures = [("Real digits", "", problem.data[:20])]
    for name, calls in rows:
        drawn = FLOW.sample(networks[name], (20, *problem.shape), steps=calls, seed=EVALUATED)
        pictures.append((name, f"{calls} call{'s' if calls > 1 else ''}", drawn))
    for k, (name, calls, images) in enumerate(pictures):
        y = 1.0 - (k + 1.5) * height
        axes = figure.add_axes((0.27, y, 0.72, height * 0.9))
        axes.imshow(_strip(images), cmap="gray_r", vmin=-1.0, vmax=1.0, aspect="auto")
        axes.set_axis_off()
        figure.text(0.01, y + 0.62 * height, name, fontsize=10.5, weight="bold", va="center")
        figure.text(0.01, y + 0.25 * height, calls, fontsize=9, color=GREY, va="center")
    figure.savefig(path, dpi=110, facecolor="white")


def curves(record: dict[str, Any], title: str, path: pathlib.Path) -> None:
    """Quality against the number of Euler steps, a line a flow; the students' one step as open marks."""
    figure = _figure(8.2, 4.4)
    axes = figure.add_axes((0.1, 0.13, 0.6, 0.74))
    for k in ORDERS:
        found = record["flows"][f"{k}-rectified flow"]["quality"]
        counts = [int(c) for c in found]
        axes.errorbar(
            counts, [found[str(c)][0] for c in counts], [found[str(c)][1] for c in counts], marker="o", markersize=6,
            color=COLOURS[k], linewidth=2, capsize=3, label=f"{k}-rectified flow",
        )  # fmt: skip
        value, error = record["students"][f"{k}-rectified flow, distilled"]["quality"]["1"]
        place = (0.62, 0.73, 0.86)[k - 1]  # beside one call
        axes.errorbar(
            [place], [value], [error], marker="D", markersize=7, color=COLOURS[k], markerfacecolor="white",
            linestyle="none", capsize=3, label="its student of one step",
        )  # fmt: skip
    axes.axhline(record["floor"], color=GREY, linewidth=1.3, linestyle=":", label="two samples of the data")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.55, 60)
    axes.minorticks_off()
    axes.set_xticks([1, 2, 5, 10, 50], ["1", "2", "5", "10", "50"])
    low, high = axes.get_ylim()
    ticks = [r for r in ROUND if low <= r <= high]
    axes.set_yticks(ticks, [f"{r:g}" for r in ticks])
    axes.grid(True, color="#e2e2e2", linewidth=0.8)
    axes.set_xlabel("network calls for one sample (Euler)", fontsize=11)
    axes.set_ylabel(f"{record['metric']} (lower is better)", fontsize=11)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9.5)
    figure.text(0.1, 0.93, title, fontsize=13, weight="bold", va="center")
    _plain(axes)
    figure.savefig(path, dpi=110, facecolor="white")


def _shown(name: str) -> tuple[int, ...]:
    return (1,) if "distilled" in name else (1, 2)


def _square(figure: Any, column: int, row: int, problem: Problem) -> Any:
    axes = figure.add_axes((0.015 + 0.247 * column, 0.51 - 0.495 * row, 0.235, 0.415))
    reach = 1.15 * float(problem.data.abs().max())
    axes.set_xlim(-reach, reach)
    axes.set_ylim(-reach, reach)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_color("#d0d0d0")
    return axes


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _mixed(shade: float) -> tuple[float, float, float]:
    """From blue to red."""
    a, b = (0.12, 0.37, 0.66), (0.71, 0.22, 0.12)
    return tuple(x + shade * (y - x) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]
