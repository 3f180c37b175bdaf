"""Writes docs/quality.md and docs/images/diffusion_quality.png: quality against network calls, one network for all.

One epsilon network is trained on the digits of `genkern demo`, once; every sampler then draws from that network, and
the demo's judge, a classifier of the real digits, looks at what they drew. Each point is the mean of some seeds, with
its standard error.

    python tools/diffusion_quality.py
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

import genkern as gk
from genkern.demo import data, plots, quality
from genkern.demo.networks import DigitNetwork
from genkern.noise import Noise
from genkern.training import EMA, trainer

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs" / "quality.md", ROOT / "docs" / "images" / "diffusion_quality.png"

SEED = 0
JUDGE_STEPS, TRAIN_STEPS, BATCH = 500, 6000, 128
SAMPLES, SEEDS = 1000, tuple(range(8))
SPLITS = 5  # of the real digits into halves
DIFFUSION = gk.Diffusion("squared_cosine", 1000)
# (name, what sample() is told, numbers of network calls)
SAMPLERS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("DDPM", {"sampler": "ddpm"}, (10, 20, 50, 100, 1000)),
    ("DDIM", {"sampler": "ddim"}, (10, 20, 50, 100)),
    ("DPM-Solver++(2M)", {"sampler": "dpmpp_2m"}, (5, 10, 20)),
    ("UniPC", {"sampler": "unipc"}, (5, 10, 20)),
]
STYLES = plots.STYLES | {"DPM-Solver++(2M)": ("#c2507a", "^", "-"), "UniPC": ("#3f9a8f", "D", "-")}
SHOWN = [("DDPM", 1000), ("DDPM", 20), ("DDPM", 10), ("DDIM", 50), ("DDIM", 20), ("DDIM", 10),
         ("DPM-Solver++(2M)", 20), ("DPM-Solver++(2M)", 5), ("UniPC", 20), ("UniPC", 5)]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """A sampler at a number of calls: the judge's figures a seed, and the first samples of one."""

    figures: list[quality.Quality]
    samples: torch.Tensor

    def mean(self, of: str) -> float:
        return sum(getattr(q, of) for q in self.figures) / len(self.figures)

    def error(self, of: str) -> float:
        """Standard error of the mean over the seeds."""
        n, mean = len(self.figures), self.mean(of)
        return math.sqrt(sum((getattr(q, of) - mean) ** 2 for q in self.figures) / (n - 1) / n)


def train(digits: data.Digits) -> torch.nn.Module:
    """The running average of the one network."""
    torch.manual_seed(SEED)
    network = DigitNetwork(time_scale=1.0 / DIFFUSION.timesteps)
    average = EMA(network, 0.999)

    def loss(index: torch.Tensor, step: int) -> torch.Tensor:
        return DIFFUSION.loss(network, digits.images[index], times="stratified", noise=Noise(SEED, stream=step))

    def update(step: int) -> None:
        average.update(network, decay=min(0.999, (1 + step) / (10 + step)))

    indices = data.batches(len(digits.images), BATCH, SEED, digits.images.device)
    trainer.fit(network.parameters(), loss, indices, steps=TRAIN_STEPS, after_step=update)
    return average.module.eval()


def draw(network: torch.nn.Module, judge: quality.Judge) -> dict[tuple[str, int], Point]:
    """Every sampler at every number of calls."""
    found = {}
    for name, options, counts in SAMPLERS:
        for calls in counts:
            drawn = [
                DIFFUSION.sample(network, (SAMPLES, *data.SHAPE), steps=calls, seed=seed, clip=1.0, **options)
                for seed in SEEDS
            ]
            found[name, calls] = Point([judge.assess(x) for x in drawn], drawn[0][:64])
            print(f"{name:18} {calls:5} {found[name, calls].mean('frechet'):.4f}", flush=True)
    return found


def picture(digits: data.Digits, found: dict[tuple[str, int], Point], floor: float, ceiling: float) -> None:
    """Distances against calls above, rows of digits below."""
    figure = plots._figure(11.0, 11.2)
    axes = figure.add_axes((0.085, 0.585, 0.655, 0.33))
    for name, _, counts in SAMPLERS:
        colour, marker, dashes = STYLES[name]
        points = [found[name, calls] for calls in counts]
        axes.errorbar(
            counts, [p.mean("frechet") for p in points], [p.error("frechet") for p in points], fmt=dashes,
            marker=marker, color=colour, linewidth=2, markersize=7, capsize=3, label=name,
        )  # fmt: skip
    axes.axhline(floor, color=plots.GREY, linewidth=1.3, linestyle=":")
    axes.annotate(
        f"two halves of the real digits ({floor:.2g})", (1150, floor), fontsize=9.5, color=plots.GREY, ha="right",
        va="bottom", xytext=(0, 3), textcoords="offset points",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(4.3, 1200)
    axes.minorticks_off()
    means = [p.mean("frechet") for p in found.values()]
    axes.set_ylim(min(means) / 1.4, max(means) * 1.4)
    for set_ticks, (low, high) in ((axes.set_xticks, axes.get_xlim()), (axes.set_yticks, axes.get_ylim())):
        ticks = [t for t in sorted([*plots.ROUND, 0.003, 0.007, 0.015]) if low <= t <= high]
        set_ticks(ticks, [f"{t:g}" for t in ticks])
    axes.grid(True, color="#e2e2e2", linewidth=0.8)
    axes.set_xlabel("network calls for one sample", fontsize=11)
    axes.set_ylabel("Fréchet distance (lower is better)", fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=11, labelspacing=0.9)
    figure.text(0.02, 0.97, "One diffusion network, sampled in four ways", fontsize=16, weight="bold", va="center")
    words = (
        f"Above: distance to the real digits, and its standard error over {len(SEEDS)} seeds (noise: {ceiling:.2g}). "
        "Below: the first 20 samples of one seed, none picked."
    )
    figure.text(0.02, 0.945, words, fontsize=10, color=plots.GREY, va="center")
    rows = [("Real digits", "", digits.images, "")]
    for name, calls in SHOWN:
        p = found[name, calls]
        note = f"distance {p.mean('frechet'):.4f}\nconfidence {p.mean('confidence'):.0%}"
        rows.append((name, f"{calls} calls", p.samples, note))
    height, top = 0.0455, 0.525
    for k, (title, subtitle, images, note) in enumerate(rows):
        y = top - (k + 1) * height
        strip = figure.add_axes((0.185, y, 0.675, height * 0.87))
        strip.imshow(plots._strip(images[:20]), cmap="gray_r", vmin=-1.0, vmax=1.0, aspect="auto")
        strip.set_axis_off()
        middle = y + height * 0.43
        figure.text(0.02, middle + 0.008, title, fontsize=10.5, weight="bold", va="center")
        figure.text(0.02, middle - 0.009, subtitle, fontsize=9, color=plots.GREY, va="center")
        figure.text(0.868, middle, note, fontsize=8.5, va="center", linespacing=1.25)
    figure.savefig(PICTURE, dpi=110, facecolor="white")


def page(
    found: dict[tuple[str, int], Point], judge: quality.Judge, floor: float, held_out: float, ceiling: quality.Quality
) -> str:
    """The table and what it says of the claim."""
    full = found["DDPM", 1000]

    def shown(p: Point, of: str, digits: int) -> str:
        return f"{p.mean(of):.{digits}f} ± {p.error(of):.{digits}f}"

    lines = [
        "# Quality against network calls",
        "",
        "Section 13.1 of the text that genkern follows says that DDIM at 20 to 50 network calls is as good as DDPM",
        "at 1000, with the same network and no retraining. `python tools/diffusion_quality.py` measures it on the",
        f"digits of `genkern demo`: one network that predicts epsilon, {TRAIN_STEPS} steps of {BATCH} images on",
        '`Diffusion("squared_cosine", 1000)`, then every sampler from that network, even timesteps',
        f'(`spacing="trailing"`), `clip=1.0`. A row of a sampler is {len(SEEDS)} seeds of {SAMPLES} samples, with the',
        f"standard error of their mean; that of two halves is the mean of {SPLITS} random splits, that of noise one",
        f"draw of {SAMPLES}.",
        "",
        "The distance is the Fréchet distance in the features of a classifier of the real digits, over the real",
        "digits' own variance; the confidence is its mean top probability (it is right on "
        f"{judge.accuracy:.1%} of held-out digits).",
        "",
        "| sampler | calls | distance | confidence | distance / that of DDPM at 1000 |",
        "|---|---|---|---|---|",
        f"| two halves of the real digits | | {floor:.4f} | | |",
        f"| the real digits held out from the classifier | | | {held_out:.3f} | |",
    ]
    for (name, calls), p in found.items():
        ratio = p.mean("frechet") / full.mean("frechet")
        cells = (name, str(calls), shown(p, "frechet", 4), shown(p, "confidence", 3), f"{ratio:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| noise | | {ceiling.frechet:.2f} | {ceiling.confidence:.3f} | |")
    lines += ["", "![quality against network calls](images/diffusion_quality.png)", "", "## The claim", ""]
    for calls in (20, 50, 100):
        lines.append(_verdict("DDIM", calls, found["DDIM", calls], full))
    for name in ("DPM-Solver++(2M)", "UniPC"):
        lines.append(_verdict(name, 20, found[name, 20], full))
    few = ", ".join(f"{found['DDPM', c].mean('frechet'):.4f} at {c}" for c in (10, 20, 50))
    lines.append(f"- DDPM itself with fewer calls: {few}.")
    lines += [
        "",
        '"As near" and "as sure" are within two standard errors of the difference. The distance of two halves of',
        "the digits is no lower bound: halves are small samples, and a network that has seen all the digits can come",
        "closer.",
    ]
    return "\n".join(lines) + "\n"


def _verdict(name: str, calls: int, p: Point, full: Point) -> str:
    """In words, where a difference is beyond two standard errors of it."""

    def word(of: str, alike: str, below: str, above: str) -> str:
        gap, error = p.mean(of) - full.mean(of), math.hypot(p.error(of), full.error(of))
        return alike if abs(gap) <= 2 * error else below if gap < 0 else above

    near = word(
        "frechet", "as near the real digits as", "nearer the real digits than", "farther from the real digits than"
    )
    sure = word("confidence", "as sure of them", "less sure of them", "surer of them")
    return (
        f"- {name} at {calls} calls: {near} DDPM at 1000 ({p.mean('frechet'):.4f} against {full.mean('frechet'):.4f}, "
        f"{1000 // calls} times fewer calls); the classifier is {sure} ({p.mean('confidence'):.3f} against "
        f"{full.mean('confidence'):.3f})."
    )


def main() -> None:
    torch.manual_seed(SEED)
    digits = data.load(SEED, torch.device("cpu"))
    judge = quality.train_judge(digits, steps=JUDGE_STEPS, seed=SEED)
    found = draw(train(digits), judge)
    floor = judge.floor(SEED, SPLITS)
    held_out = judge.assess(digits.images[digits.held_out :]).confidence
    ceiling = judge.assess(torch.randn(SAMPLES, *data.SHAPE))
    PAGE.write_text(page(found, judge, floor, held_out, ceiling), encoding="utf-8")
    picture(digits, found, floor, ceiling.frechet)
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
