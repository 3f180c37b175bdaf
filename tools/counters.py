"""Counter readings of the CUDA passes, by Nsight Compute: what each is bound by.

    python tools/counters.py [--out benchmarks/counters]

Runs itself under ncu, reads the metrics of one launch of each pass and writes <machine>-counters.json, which
tools/speed_targets.py puts into docs/speed.md, and <machine>-roofline.png: warp instructions a second against those a
byte of memory traffic, under what the device can issue and what its memory can move. --redraw draws it again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import genkern as gk
from genkern.bench import machine

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (4096, 4, 64, 64)  # 2^26 elements
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "integer pipe",
    "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active": "multiply-add pipes",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps",
    # Of a scheduler: warps that could issue in a cycle, and those that wait while one instruction is issued.
    "smsp__warps_eligible.avg.per_cycle_active": "eligible warps",
    "smsp__average_warps_issue_stalled_dispatch_stall_per_issue_active.ratio": "waiting for dispatch",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": "waiting for a pipe",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "waiting for memory",
    "launch__registers_per_thread": "registers",
    "smsp__inst_executed.sum": "instructions",
    "dram__bytes.sum": "bytes",
}


def passes() -> dict[str, Callable[[], Any]]:
    """The passes by name, each one launch."""
    found: dict[str, Callable[[], Any]] = {}
    noise = gk.Noise(seed=1)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x, m, out = (torch.randn(SHAPE, device="cuda").to(dtype) for _ in range(3))
        last, to = (t.contiguous(memory_format=torch.channels_last) for t in (x, out))
        found |= {
            f"randn, {name}": lambda out=out: gk.ops.randn(SHAPE, noise=noise, out=out),
            f"add_noise, {name}": lambda x=x, out=out: gk.ops.add_noise(x, 0.8, 0.6, noise=noise, out=out),
            f"add_noise, channels_last, {name}": lambda x=last, out=to: gk.ops.add_noise(
                x, 0.8, 0.6, noise=noise, out=out
            ),
            f"euler_step, {name}": lambda x=x, m=m, out=out: gk.ops.euler_step(x, m, 0.1, out=out),
            f"path_loss, {name}": lambda x=x, m=m: gk.ops.path_loss(m, x, x_coef=1.0, noise_coef=-1.0, noise=noise),
        }
    return found


def launch() -> None:
    """Every pass once, after one that sets the library up; ncu counts the kernels of map and reduce."""
    for run in passes().values():
        run()
    torch.cuda.synchronize()


def readings(text: str) -> list[dict[str, float]]:
    """The metrics of every launch that ncu's CSV holds, in the order of launches."""
    lines = text.splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith('"ID"'))
    found: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        value = float(row["Metric Value"].replace(",", ""))
        if METRICS[row["Metric Name"]] == "us":
            value /= 1e3  # ncu counts nanoseconds
        found.setdefault(row["ID"], {})[METRICS[row["Metric Name"]]] = value
    return list(found.values())


def roofline(result: dict[str, Any], path: Path) -> None:
    """Draws <machine>-roofline.png beside the counters. The roofs are what the counters' percentages are of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["passes"]
    rate = {name: row["instructions"] / (row["us"] * 1e-6) for name, row in rows.items()}
    moved = {name: row["bytes"] / (row["us"] * 1e-6) for name, row in rows.items()}
    # The fullest reading is the least rounded one.
    issue = max((row["issue slots"], rate[name]) for name, row in rows.items())
    memory = max((row["memory"], moved[name]) for name, row in rows.items())
    most_issued, most_moved = issue[1] / issue[0] * 100.0, memory[1] / memory[0] * 100.0
    figure, axes = pyplot.subplots(figsize=(9, 6))
    x = [0.01, most_issued / most_moved, 4.0]
    axes.plot(x, [most_moved * x[0], most_issued, most_issued], color="black", linewidth=1)
    axes.text(x[0] * 1.1, most_moved * x[0] * 1.25, f"memory, {most_moved / 1e12:.2f} TB/s", rotation=33, fontsize=8)
    axes.text(x[1] * 1.1, most_issued * 1.05, f"issue, {most_issued / 1e9:.0f} G warp instructions/s", fontsize=8)
    for number, (name, row) in enumerate(rows.items()):
        at = row["instructions"] / row["bytes"], rate[name]
        axes.plot(*at, "o", color=f"C{number % 10}", label=f"{number + 1}  {name}, {row['us']:.0f} us")
        axes.annotate(str(number + 1), at, textcoords="offset points", xytext=(5, -9), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="warp instructions / byte of memory traffic")
    axes.set(ylabel="warp instructions / s", title=f"{result['machine']['name']}, tensors of 2^26 elements")
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path.with_name(path.name.replace("-counters.json", "-roofline.png")), dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "counters")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--redraw", action="store_true", help="measure nothing: draw what --out holds again")
    arguments = parser.parse_args()
    if arguments.launch:
        return launch()
    if arguments.redraw:
        for path in sorted(arguments.out.glob("*-counters.json")):
            roofline(json.loads(path.read_text()), path)
        return None
    command = ["ncu", "--csv", "--clock-control", "none", "--print-units", "base", "--metrics", ",".join(METRICS)]
    command += ["--kernel-name", "regex:map_kernel|reduce_kernel", sys.executable, __file__, "--launch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"ncu: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    names, found = list(passes()), readings(done.stdout)
    # Beside its pass path_loss launches small ones, over the batch.
    large = [row for row in found if row["us"] > 20.0]
    if len(large) != len(names):
        sys.exit(f"ncu: expected {len(names)} passes, got {len(large)}")
    rows = dict(zip(names, large, strict=True))
    device = torch.device("cuda")
    result = {"machine": machine.describe(device), "passes": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{machine.slug(device)}-counters.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    roofline(result, path)
    print(path)


if __name__ == "__main__":
    main()
