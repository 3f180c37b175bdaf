"""Trains one network in every way of few calls, and writes docs/consistency.md's tables and pictures.

    python tools/consistency_table.py --data digits|patches [--device auto] [--quick]
    python tools/consistency_table.py --data patches --work FOLDER --way "teacher (EDM), Heun"
    python tools/consistency_table.py --data patches --work FOLDER --way CT --way "CD, L1"   beside others
    python tools/consistency_table.py --data patches --work FOLDER                           what is left, and the page

consistency_tasks.py has the data and their judges, consistency_ways.py the ways. A way's seed is its own: the same
network comes of it in any order. With --work a run that was cut off goes on, and several train side by side. It writes

    benchmarks/consistency/DATA-MACHINE.json     every figure, after each way: a run that is cut off leaves what it has
    docs/images/consistency_DATA.png             samples, and quality against network calls
    docs/images/consistency_DATA_self.png        self-consistency along the teacher's trajectories
    docs/consistency.md                          the table of DATA, between its markers

With --quick the networks are trained for seconds, which shows that everything runs; it writes the files under
--out alone.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from consistency_tasks import TASKS, Task
from consistency_ways import SETTINGS, TEACHER, WAYS, Run, Way, trained
from torch import Tensor

from genkern import files
from genkern.bench import machine
from genkern.demo import plots

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE, IMAGES = ROOT / "benchmarks" / "consistency", ROOT / "docs" / "consistency.md", ROOT / "docs" / "images"
SEED, SAMPLES, SEEDS = 0, 1024, (0, 1, 2, 3)
# Steps of every student, and of the teacher: about three minutes on an H100, where the host's launches take most of it.
BUDGETS, BATCH = {"digits": (3000, 4000), "patches": (1400, 2500)}, 256
QUICK_STEPS, QUICK_BATCH, QUICK_SAMPLES, QUICK_SEEDS = 6, 8, 16, (0, 1)
TRAJECTORY_STEPS, TRAJECTORIES = 24, 256
COLUMNS = 20  # samples of a row of the picture
COLOURS = ("#b5391f", "#e8963a", "#8c6d31", "#c65d9b", "#1f5fa8", "#17a2b8", "#2e8b57", "#7b3fa0", "#b79ad0", "#000000")


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def counted(calls: int) -> str:
    return f"{calls} call{'s' * (calls > 1)}"


def judged(
    run: Run, way: Way, net: torch.nn.Module, samples: int, seeds: tuple[int, ...]
) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """Of every number of calls: the judge's figures, mean over the seeds and standard error, and some samples."""
    rows, kept = [], {}
    for calls in way.calls:
        found = []
        for seed in seeds:
            drawn = torch.cat([
                way.draw(run, net, (min(512, samples - low), *run.task.shape), calls, seed << 16 | low)
                for low in range(0, samples, 512)
            ])  # fmt: skip
            found.append(run.task.judge.assess(drawn))
            if seed == seeds[0]:
                kept[calls] = drawn[:COLUMNS].cpu()
        figures = {}
        for name in found[0]:
            values = [f[name] for f in found]
            mean = sum(values) / len(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
            figures[name] = {"mean": mean, "standard_error": spread}
        rows.append({"way": way.name, "calls": calls, "figures": figures})
        shown = ", ".join(f"{name} {of['mean']:.4f}" for name, of in figures.items())
        print(f"  {way.name}, {counted(calls)}: {shown}", flush=True)
    return rows, kept


def self_consistency(run: Run, net: torch.nn.Module, trajectory: Tensor, times: list[float]) -> list[float]:
    """The distance of f along trajectories from f at their end, over the data's deviation."""
    found = run.consistency.self_consistency(net, trajectory, times)
    return [float(v) / run.task.std for v in found.tolist()]


def strip(images: Tensor) -> Any:
    """[N, C, H, W] side by side with a light gap between: [H, ., C], or [H, .] of one channel."""
    padded = torch.nn.functional.pad(images.clamp(-1.0, 1.0).float() * 0.5 + 0.5, (0, 1), value=1.0)
    row = torch.cat(list(padded), dim=2)[:, :, :-1]
    if len(row) == 1:  # digits are dark on white
        gaps = torch.arange(row.shape[2]) % (images.shape[3] + 1) == images.shape[3]
        return torch.where(gaps, 1.0, 1.0 - row[0]).numpy()
    return row.permute(1, 2, 0).numpy()


def _log_axes(axes: Any, across: str, up: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(True, color="#e2e2e2", linewidth=0.8)
    axes.set_xlabel(across, fontsize=11)
    axes.set_ylabel(up, fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def picture(task: Task, result: dict[str, Any], kept: dict[tuple[str, int], Tensor], path: Path) -> None:
    """Quality against calls above, a row of samples a way below."""
    names = [way.name for way in WAYS]
    shown = [(TEACHER.name, TEACHER.calls[0]), *((name, calls) for name in names for calls in (1, 2))]
    cell, head = 0.5, 5.0
    height = head + cell * (len(shown) + 1) + 0.2
    figure = plots._figure(12.0, height)
    axes = figure.add_axes((0.085, 1.0 - 4.4 / height, 0.63, 3.6 / height))
    for name, colour in zip(names, COLOURS, strict=True):
        rows = [r for r in result["rows"] if r["way"] == name]
        figures = [r["figures"]["frechet"] for r in rows]
        axes.errorbar(
            [r["calls"] for r in rows], [f["mean"] for f in figures], [f["standard_error"] for f in figures],
            color=colour, marker="o", linewidth=1.8, capsize=3, label=name,
        )  # fmt: skip
    teacher = next(r for r in result["rows"] if r["way"] == TEACHER.name)["figures"]["frechet"]["mean"]
    ends = ((teacher, f"teacher, {TEACHER.calls[0]} calls"), (result["floor"], "two halves of the real data"))
    for value, words in ends:
        axes.axhline(value, color=plots.GREY, linewidth=1.2, linestyle=":")
        axes.annotate(words, (4.0, value), fontsize=9, color=plots.GREY, ha="right", va="bottom")
    _log_axes(axes, "network calls for one sample", "Fréchet distance (lower is better)")
    axes.set_xticks((1, 2, 4), ("1", "2", "4"))
    axes.minorticks_off()
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=10)
    figure.text(0.02, 1.0 - 0.3 / height, f"Few calls, {task.name}", fontsize=15, weight="bold", va="center")
    lines = [("Real data", "", task.images[:COLUMNS].cpu()), *((n, counted(c), kept[n, c]) for n, c in shown)]
    for k, (title, subtitle, images) in enumerate(lines):
        y = height - head - (k + 1) * cell
        row = figure.add_axes((0.19, y / height, 0.79, 0.9 * cell / height))
        row.imshow(strip(images), cmap="gray", vmin=0.0, vmax=1.0)
        row.set_anchor("W")
        row.set_axis_off()
        figure.text(0.02, (y + 0.28) / height, title, fontsize=9.5, weight="bold", va="center")
        figure.text(0.02, (y + 0.11) / height, subtitle, fontsize=8.5, color=plots.GREY, va="center")
    figure.savefig(path, dpi=110, facecolor="white")


def picture_self(result: dict[str, Any], path: Path) -> None:
    """Self-consistency along the teacher's trajectories."""
    figure = plots._figure(9.0, 4.6)
    axes = figure.add_axes((0.1, 0.13, 0.6, 0.75))
    times = result["self_consistency"]["times"]
    colours = dict(zip((way.name for way in WAYS), COLOURS, strict=True))
    for name, values in result["self_consistency"]["ways"].items():
        axes.plot(times[:-1], values[:-1], color=colours[name], marker="o", markersize=3, label=name)
    _log_axes(axes, "time t of the state", "deviation of f along a trajectory, over sd")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=10)
    figure.text(0.02, 0.94, "Self-consistency along the teacher's trajectories", fontsize=13, weight="bold")
    figure.savefig(path, dpi=110, facecolor="white")


def section(result: dict[str, Any]) -> str:
    """The table of a data set."""
    a, facts = result["arguments"], result["machine"]
    names, together = list(result["rows"][0]["figures"]), a.get("together", 1)
    options = "".join(f" --{name.replace('_', '-')} {a[name]}" for name in ("data", "steps", "teacher_steps", "batch"))
    if together > 1:
        options += f" --together {together} --work FOLDER"
    lines = [
        f"    python tools/consistency_table.py{options}",
        "",
        f"{facts['name']}, torch {facts['versions']['torch']}, {facts['date'][:10]}, revision {facts['revision']}.",
        f"{a['steps']} steps of {a['batch']} images ({a['teacher_steps']} of the teacher), {a['samples']} samples a",
        f"seed, {len(a['seeds'])} seeds."
        + f" Up to {together} trained side by side on one device: the seconds are no comparison." * (together > 1),
        "",
        f"| training | s | calls | {' | '.join(names)} |",
        f"|---|---:|---:|{'---:|' * len(names)}",
        f"| two halves of the real data | | | {result['floor']:.4f} |{' |' * (len(names) - 1)}",
    ]
    last = ""
    for row in result["rows"]:
        cells = [f"{of['mean']:.4f} ± {of['standard_error']:.4f}" for of in row["figures"].values()]
        first = row["way"] != last
        seconds = f"{result['seconds'][row['way']]:.1f}" if first else ""
        lines.append(f"| {row['way'] if first else ''} | {seconds} | {row['calls']} | {' | '.join(cells)} |")
        last = row["way"]
    ceiling = " | ".join(f"{result['ceiling'][name]:.4f}" for name in names)
    lines += [f"| noise | | | {ceiling} |", ""]
    missing = [way.name for way in WAYS if way.name not in result["seconds"]]
    if missing:
        lines.append(f"The run was cut off by a time limit before {', '.join(missing)}.")
        return "\n".join(lines) + "\n"
    for suffix, words in (("", "quality against calls, and samples"), ("_self", "self-consistency")):
        lines.append(f"![{a['data']}: {words}](images/consistency_{a['data']}{suffix}.png)")
    return "\n".join(lines) + "\n"


def rewrite(result: dict[str, Any], page: Path) -> None:
    begin, end = marks(result["arguments"]["data"])
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page}: expected the markers {begin} and {end}")
    page.write_text(f"{before}{begin}\n{section(result)}{end}{after}", encoding="utf-8")


def _file(work: Path, way: Way) -> Path:
    return work / f"{''.join(c if c.isalnum() else '-' for c in way.name)}.pt"


def read(work: Path | None, way: Way, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """What write() kept of a way, or None. Exits where it was kept by a run of other arguments."""
    if work is None or not _file(work, way).exists():
        return None
    found: dict[str, Any] = torch.load(_file(work, way), map_location="cpu", weights_only=True)
    if found["arguments"] != arguments:
        sys.exit(f"{_file(work, way)}: is of a run with {found['arguments']}, not {arguments}")
    return found


def write(work: Path | None, way: Way, found: dict[str, Any]) -> None:
    if work is not None:
        with files.replaced(_file(work, way)) as temporary:
            torch.save(found, temporary)


def main(
    data: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "digits",
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Of every student; default by the data.")] = None,
    teacher_steps: Annotated[int | None, typer.Option(help="Of the teacher; default by the data.")] = None,
    batch: Annotated[int, typer.Option(help="Images a step.")] = BATCH,
    work: Annotated[Path | None, typer.Option(help="A folder that keeps what is trained, to go on from.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="Train this one alone; several times for several.")] = None,
    together: Annotated[int, typer.Option(help="How many processes train side by side; the page says it.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds, not minutes; writes under --out alone.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the JSON.")] = RESULTS,
    page_of: Annotated[Path | None, typer.Option(help="Train nothing: the page's table from this JSON.")] = None,
) -> None:
    """Train every way on a data set, judge it at 1, 2 and 4 calls, and write the page."""
    if page_of is not None:
        return rewrite(json.loads(page_of.read_text(encoding="utf-8")), PAGE)
    if data not in TASKS:
        sys.exit(f"--data: expected one of {', '.join(TASKS)}, got {data!r}")
    unknown = set(way or ()) - {of.name for of in (TEACHER, *WAYS)}
    if unknown:
        sys.exit(f"--way: expected some of {[of.name for of in (TEACHER, *WAYS)]}, got {min(unknown)!r}")
    if way and work is None:
        sys.exit("--way: expected --work beside it, got none")
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    samples, seeds = (QUICK_SAMPLES, QUICK_SEEDS) if quick else (SAMPLES, SEEDS)
    usual = (QUICK_STEPS, QUICK_STEPS) if quick else BUDGETS[data]
    steps, teacher_steps = usual[0] if steps is None else steps, usual[1] if teacher_steps is None else teacher_steps
    batch = QUICK_BATCH if quick else batch
    begin = time.perf_counter()
    torch.manual_seed(SEED)
    task = TASKS[data](where, batch, quick, SEED)
    run = Run(task, steps, teacher_steps, batch, SEED)
    noise = torch.randn(samples, *task.shape, generator=torch.Generator().manual_seed(SEED)).to(where)
    result: dict[str, Any] = {
        "machine": machine.describe(where),
        "arguments": {"data": data, "steps": steps, "teacher_steps": teacher_steps, "batch": batch,
                      "samples": samples, "seeds": list(seeds), "quick": quick, "together": together, "ways": SETTINGS},
        "floor": task.judge.floor(SEED), "ceiling": task.judge.assess(noise),
        "seconds": {}, "rows": [], "self_consistency": {"times": [], "ways": {}},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{data}-{machine.slug(where)}.json"
    kept: dict[tuple[str, int], Tensor] = {}
    trajectory, times = torch.empty(0), list[float]()
    print(f"{data} on {result['machine']['name']}: ready after {time.perf_counter() - begin:.0f} s", flush=True)
    for number, of in enumerate((TEACHER, *WAYS)):
        torch.manual_seed(SEED + number)
        found = read(work, of, result["arguments"])
        if found is None and way and of.name not in way and of is not TEACHER:
            continue
        net = of.start(run) if found is None or of is TEACHER else None
        if found is None:
            assert net is not None
            net, seconds = trained(run, of, number, net)
            rows, drawn = judged(run, of, net, samples, seeds)
            found = {"arguments": result["arguments"], "seconds": seconds, "rows": rows, "drawn": drawn}
            if of.function:
                found["self_consistency"] = self_consistency(run, net, trajectory, times)
            write(work, of, found | ({"network": net.state_dict()} if of is TEACHER else {}))
        elif net is not None:
            net.load_state_dict(found["network"])
            net.eval()
        if of is TEACHER:
            run.teacher = net
            shape = (QUICK_SAMPLES if quick else TRAJECTORIES, *task.shape)
            walked = QUICK_STEPS if quick else TRAJECTORY_STEPS
            options = {"steps": walked, "seed": len(SEEDS) << 16, "return_trajectory": True}
            _, trajectory = run.consistency.sample_ode(net, shape, **options)
            times = result["self_consistency"]["times"] = run.consistency.times(walked + 1)[::-1].tolist()
        result["seconds"][of.name] = found["seconds"]
        result["rows"] += found["rows"]
        kept |= {(of.name, calls): images for calls, images in found["drawn"].items()}
        if "self_consistency" in found:
            result["self_consistency"]["ways"][of.name] = found["self_consistency"]
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    missing = [of.name for of in WAYS if of.name not in result["seconds"]]
    if missing:
        return print(f"left: {', '.join(missing)}; {path}")
    images = out if quick else IMAGES
    picture(task, result, kept, images / f"consistency_{data}.png")
    picture_self(result, images / f"consistency_{data}_self.png")
    if quick:
        print(section(result))
    else:
        rewrite(result, PAGE)
    print(f"{time.perf_counter() - begin:.0f} s in all; {path}")


if __name__ == "__main__":
    typer.run(main)
