"""genkern demo: train the four families on real handwritten digits, sample them, judge the samples.

Writes into the given folder
    samples.png    rows of digits, real ones first, then each method at some numbers of network calls
    quality.png    Frechet distance against network calls, a line a sampler
    report.json    versions, device, seed, seconds of each stage, losses, every figure, the criteria met or missed
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import info
from . import criteria, data, plots, quality
from .families import Families
from .setup import Setup

# Rows of samples.png after the real digits: (sampler, calls).
SHOWN = (
    ("DDPM", 100),
    ("DDIM", 20),
    ("DDIM", 5),
    ("Flow matching, Heun", 20),
    ("Flow matching, Euler", 20),
    ("Rectified flow, Euler", 10),
    ("Rectified flow, Euler", 2),
    ("2-rectified flow, Euler", 2),
    ("2-rectified flow, Euler", 1),
    ("Consistency", 2),
    ("Consistency", 1),
)


@dataclasses.dataclass
class Clock:
    """Seconds of each stage, in order, with a bar a stage; a line a stage where the output is no terminal."""

    progress: Progress
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, key: str, text: str, steps: int) -> Iterator[Callable[[int], None]]:
        """A stage of `steps` steps; yields what to call with the number of steps done."""
        start, task = time.perf_counter(), self.progress.add_task(text, total=steps)
        yield lambda done: self.progress.update(task, completed=done)
        self.progress.update(task, completed=steps)
        self.seconds[key] = time.perf_counter() - start
        if self.progress.disable:
            self.progress.console.print(f"{text:<34} {self.seconds[key]:6.1f} s")


def run(setup: Setup, console: Console | None = None) -> dict[str, Any]:
    """The whole demo. Returns the report, as it is written to report.json."""
    console = Console() if console is None else console
    start = time.perf_counter()
    torch.manual_seed(setup.seed)
    console.print(f"genkern demo on {_device_name(setup.device)}, seed {setup.seed}{', quick' if setup.quick else ''}")
    columns = (TextColumn("{task.description:<34}"), BarColumn(28), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        clock = Clock(progress)
        digits = data.load(setup.seed, setup.device)
        with clock.stage("judge", "classifier, on the real digits", setup.budget.judge) as tick:
            judge = quality.train_judge(digits, steps=setup.budget.judge, seed=setup.seed, progress=tick)
        families = Families(digits, setup)
        for stage in families.stages():
            with clock.stage(stage.key, stage.text, stage.steps) as tick:
                stage.train(tick)
        found, kept = _sample(families, judge, setup, clock)
        with clock.stage("pictures", "pictures", 1):
            floor = judge.floor(setup.seed)
            ceiling = judge.assess(torch.randn(setup.budget.samples, *data.SHAPE, device=setup.device))
            _pictures(setup, digits, judge, families, found, kept, floor, ceiling)
    verdicts = criteria.judge(judge.accuracy, found)
    clock.seconds["total"] = time.perf_counter() - start
    report = _report(setup, judge, families, found, floor, ceiling, verdicts, clock.seconds)
    (setup.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _print(console, setup, found, floor, ceiling, verdicts, clock.seconds["total"])
    return report


Found = dict[tuple[str, int], quality.Quality]


def _sample(
    families: Families, judge: quality.Judge, setup: Setup, clock: Clock
) -> tuple[Found, dict[tuple[str, int], torch.Tensor]]:
    """Quality of every sampler at every number of calls, and the samples that are shown."""
    found: Found = {}
    kept: dict[tuple[str, int], torch.Tensor] = {}
    samplers, shape = families.samplers(), (setup.budget.samples, *data.SHAPE)
    with clock.stage("sampling", "sampling and judging", sum(sum(s.calls) for s in samplers)) as tick:
        done = 0
        for sampler in samplers:
            for calls in sampler.calls:
                samples = sampler.draw(calls, shape, setup.seed)
                found[sampler.name, calls] = judge.assess(samples)
                if (sampler.name, calls) in SHOWN:
                    kept[sampler.name, calls] = samples[:64].cpu()
                done += calls
                tick(done)
    return found, kept


def _pictures(
    setup: Setup,
    digits: data.Digits,
    judge: quality.Judge,
    families: Families,
    found: Found,
    kept: dict[tuple[str, int], torch.Tensor],
    floor: float,
    ceiling: quality.Quality,
) -> None:
    sure = judge.assess(digits.images[digits.held_out :]).confidence
    rows = [plots.GridRow("Real digits", "scikit-learn's", _note(floor, sure), digits.images)]
    previous = ""
    for name, calls in SHOWN:
        title, _, solver = name.partition(", ")
        count = f"{calls} call{'s' if calls > 1 else ''}"
        subtitle = f"{solver}, {count}" if solver else count
        note = _note(found[name, calls].frechet, found[name, calls].confidence)
        rows.append(plots.GridRow(title, subtitle, note, kept[name, calls], gap_above=title != previous))
        previous = title
    plots.save_samples(rows, setup.out / "samples.png")
    curves = [plots.Curve(s.name, s.calls, [found[s.name, c].frechet for c in s.calls]) for s in families.samplers()]
    plots.save_quality(curves, floor, ceiling.frechet, setup.out / "quality.png")


def _note(distance: float, confidence: float) -> str:
    return f"distance {distance:.3f}\nconfidence {confidence:.0%}"


def _report(
    setup: Setup,
    judge: quality.Judge,
    families: Families,
    found: Found,
    floor: float,
    ceiling: quality.Quality,
    verdicts: list[criteria.Criterion],
    seconds: dict[str, float],
) -> dict[str, Any]:
    return {
        "genkern": info.as_dict(),
        "versions": {
            "torch": torch.__version__,  # with the build's tag, which the package's metadata may leave out
            **{name: metadata.version(name) for name in ("numpy", "scikit-learn", "matplotlib")},
        },
        "device": _device_name(setup.device),
        "threads": torch.get_num_threads(),
        "seed": setup.seed,
        "quick": setup.quick,
        "budget": dataclasses.asdict(setup.budget),
        "seconds": seconds,
        "losses": {key: _loss_curve(trained.losses) for key, trained in families.trained.items()},
        "classifier_accuracy": judge.accuracy,
        "frechet_floor": floor,
        "ceiling": dataclasses.asdict(ceiling),
        "samplers": [{"sampler": name, "calls": calls, **dataclasses.asdict(q)} for (name, calls), q in found.items()],
        "criteria": [{"name": c.name, "value": c.value, "at_least": c.threshold, "met": c.met} for c in verdicts],
        "all_met": all(c.met for c in verdicts),
    }


def _loss_curve(losses: list[float], points: int = 20) -> list[float]:
    """Means over `points` equal stretches of the training."""
    size = max(1, len(losses) // points)
    return [sum(part) / len(part) for part in (losses[i : i + size] for i in range(0, len(losses), size))]


def _print(
    console: Console,
    setup: Setup,
    found: Found,
    floor: float,
    ceiling: quality.Quality,
    verdicts: list[criteria.Criterion],
    seconds: float,
) -> None:
    table = Table(
        title=f"{setup.budget.samples} samples of each, judged by a classifier of real digits",
        caption="distance: Fréchet distance in its features; confidence: mean top probability",
    )
    table.add_column("sampler", no_wrap=True)
    for name in ("calls", "distance", "confidence", "rarest class"):
        table.add_column(name, justify="right")
    table.add_row("floor: halves of the data", "", f"{floor:.4f}", "", "")
    previous = None
    for (name, calls), q in found.items():
        if name != previous:
            table.add_section()
        shown = name if name != previous else ""
        table.add_row(shown, str(calls), *_figures(q))
        previous = name
    table.add_section()
    table.add_row("ceiling: noise", "", *_figures(ceiling))
    console.print(table)

    promises = Table(title="What the demo promises")
    promises.add_column("criterion")
    for name in ("value", "at least", ""):
        promises.add_column(name, justify="right")
    for c in verdicts:
        promises.add_row(c.name, f"{c.value:.3f}", f"{c.threshold:.2f}", "[green]met[/]" if c.met else "[red]missed[/]")
    console.print(promises)
    if setup.quick:
        console.print("A quick run shows that everything works; its digits are not meant to meet the criteria.")
    console.print(f"{seconds:.0f} s in all. Look at:")
    for name in ("samples.png", "quality.png", "report.json"):
        console.print(f"  {setup.out / name}", soft_wrap=True, highlight=False)


def _figures(q: quality.Quality) -> tuple[str, str, str]:
    return f"{q.frechet:.4f}", f"{q.confidence:.3f}", f"{q.smallest_share:.1%}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"
    return str(device)
