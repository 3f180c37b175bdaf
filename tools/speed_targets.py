"""Writes docs/speed.md: every speed target with its number beside it, from benchmarks/results and benchmarks/counters.

    python tools/speed_targets.py

The numbers are those that `genkern bench` and tools/counters.py wrote; this only picks them out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from genkern.bench.table import EARLIER
from genkern.bench.world import COMPILED, FLOOR_GRAPHED, GENKERN, GRAPHED, TEXTBOOK

ROOT = Path(__file__).resolve().parent.parent
RESULTS, COUNTERS, PAGE = ROOT / "benchmarks/results", ROOT / "benchmarks/counters", ROOT / "docs/speed.md"
BEGIN, END = "<!-- targets: begin -->", "<!-- targets: end -->"
DRAWN = ("randn", "add_noise", "eta 1", "path_loss", "learned variance", "inpainting")  # ops that draw noise
BY_SAMPLE = ", by sample"
Row = dict[str, Any]


def is_op(row: Row) -> bool:
    return row["kind"] == "op"


def draws(row: Row) -> bool:
    return any(word in row["case"] for word in DRAWN)


def named(row: Row) -> str:
    return f"{row['case']}, {row['dtype']}" + f" {EARLIER}" * ("earlier" in row)


def listed(
    rows: Iterable[Row], value: Callable[[Row], float | None], least: float, high: bool = True
) -> tuple[str, str]:
    """Every row's value, and whether all are at least (at most, unless high) `least`."""
    found = [(named(row), value(row)) for row in rows]
    known = [(name, v) for name, v in found if v is not None]
    if not known:
        return "not measured", ""
    missed = [(name, v) for name, v in known if (v < least if high else v > least)]
    values = [v for _, v in known]
    text = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
    if not missed:
        return text, "met" + f" {EARLIER}" * all(name.endswith(EARLIER) for name, _ in known)
    return text, "missed by " + "; ".join(f"{name} {v:.2f}" for name, v in missed)


def copy_ratio(row: Row) -> float | None:
    return row.get("ratio_to_copy")


def over_compiled(row: Row) -> float | None:
    return row["speedup"].get(COMPILED)


def over_eager(row: Row) -> float | None:
    return row["speedup"].get(TEXTBOOK)


def graphed(row: Row) -> tuple[float, float] | None:
    """Seconds of the captured loop and of its floor."""
    seconds = row["seconds"]
    if GRAPHED not in seconds or FLOOR_GRAPHED not in seconds:
        return None
    return seconds[GRAPHED]["median"], seconds[FLOOR_GRAPHED]["median"]


def over_floor(row: Row) -> float | None:
    found = graphed(row)
    return None if found is None else (found[0] - found[1]) / row["count"] * 1e6


def floor_ratio(row: Row) -> float | None:
    found = graphed(row)
    return None if found is None else found[0] / found[1]


def of_gpu(result: Row) -> list[tuple[str, str, str]]:
    """(target, measured, met or missed by what)."""
    rows = result["rows"]
    ops = [row for row in rows if is_op(row)]
    plain, noisy = [r for r in ops if not draws(r)], [r for r in ops if draws(r)]
    case = lambda name, dtype=None: [r for r in rows if r["case"] == name and dtype in (None, r["dtype"])]  # noqa: E731
    by_name = {(row["case"], row["dtype"]): row for row in rows}

    def against(other: str) -> Callable[[Row], float | None]:
        def ratio(row: Row) -> float | None:
            base = by_name.get((other, row["dtype"]))
            return None if base is None else base["seconds"][GENKERN]["median"] / row["seconds"][GENKERN]["median"]

        return ratio

    written = case("add_noise, noise written")
    loops = [r for r in rows if r["kind"] == "loop"]
    mlp, networks = (
        [r for r in loops if "MLP" in r["case"]],
        [r for r in loops if "UNet" in r["case"] or "DiT" in r["case"]],
    )
    training = [r for r in rows if r["kind"] == "training" and r["case"].startswith("flow matching")]
    consistency = [r for r in rows if r["kind"] == "training" and r not in training]
    of_peak = lambda r: max(t / 3.35e12 for t in [r["bytes_per_second"][GENKERN]])  # noqa: E731
    halves = [r for r in training if r["dtype"] == "bfloat16"]
    steps = [r for r in training if "peak" in r["seconds"][GENKERN]]
    last, by_sample = case("add_noise, channels_last"), [r for r in rows if r["case"].endswith(BY_SAMPLE)]

    def of_a_call(row: Row) -> float | None:
        return against(row["case"].removesuffix(BY_SAMPLE))(row)

    def memory(row: Row) -> float:
        """Peak bytes over those of x_t and the gradient."""
        return float(row["seconds"][GENKERN]["peak"] / (2 * row["count"] * (4 if row["dtype"] == "float32" else 2)))

    def of_compiled(row: Row) -> float:
        """Peak bytes over those of the compiled formula."""
        return float(row["seconds"][GENKERN]["peak"] / row["seconds"][COMPILED]["peak"])

    def compared(value: Callable[[Row], float | None]) -> tuple[str, str]:
        return "; ".join(f"{named(r)} {value(r):.2f}" for r in consistency), ""

    host = result.get("host", [])
    small = [{"case": r["call"], "dtype": "float32", **r} for r in host if r["call"] != "x * 2.0"]
    raw, calls = (
        [r for r in small if r["call"].startswith("raw")],
        [r for r in small if not r["call"].startswith("raw")],
    )
    return [
        ("without noise: bandwidth over copy_'s >= 1.0", *listed(plain, copy_ratio, 1.0)),
        ("with noise: the same", *listed(noisy, copy_ratio, 1.0)),
        ("the best op: of 3.35 TB/s >= 0.90", *listed([max(ops, key=of_peak)] if ops else [], of_peak, 0.90)),
        ("noise written: over copy_ >= 0.95", *listed(written, copy_ratio, 0.95)),
        ("channels_last with noise: over contiguous >= 0.8", *listed(last, against("add_noise"), 0.8)),
        ("rows by sample: over those of a call >= 0.97", *listed(by_sample, of_a_call, 0.97)),
        ("torch.compile's time over ours, every op >= 0.97", *listed(ops, over_compiled, 0.97)),
        ("the same, DDIM, float32 >= 1.15", *listed(case("ddim_step", "float32"), over_compiled, 1.15)),
        ("the same, guided, float32 >= 1.1", *listed(case("ddim_step, guided", "float32"), over_compiled, 1.1)),
        ("the same, DDIM, bfloat16 >= 1.25", *listed(case("ddim_step", "bfloat16"), over_compiled, 1.25)),
        ("the same, noising, float32 >= 1.5", *listed(case("add_noise", "float32"), over_compiled, 1.5)),
        ("the same, noising, bfloat16 >= 3", *listed(case("add_noise", "bfloat16"), over_compiled, 3.0)),
        ("training step, bfloat16: eager's time over ours >= 8", *listed(halves, over_eager, 8.0)),
        ("the same: torch.compile's over ours >= 2.5", *listed(halves, over_compiled, 2.5)),
        ("the same: peak memory over x_t and the gradient <= 1.01", *listed(steps, memory, 1.01, high=False)),
        ("consistency, a step around the networks: eager's time over ours", *compared(over_eager)),
        ("the same: torch.compile's over ours", *compared(over_compiled)),
        ("the same: our peak memory over torch.compile's", *compared(of_compiled)),
        ("captured loop, MLP: us a step over the graph of the network <= 2", *listed(mlp, over_floor, 2.0, high=False)),
        ("captured loop, UNet and DiT: over that graph <= 1.05", *listed(networks, floor_ratio, 1.05, high=False)),
        ("host: a raw call over x * 2.0 <= 1.2", *listed(raw, lambda r: r["ratio"], 1.2, high=False)),
        ("host: named ops <= 2", *listed(calls, lambda r: r["ratio"], 2.0, high=False)),
        ("host: with gradients <= 4", *listed(calls, lambda r: r.get("gradient_ratio"), 4.0, high=False)),
    ]  # fmt: skip


def of_cpu(result: Row) -> list[tuple[str, str, str]]:
    rows = result["rows"]
    ops = [row for row in rows if is_op(row)]
    plain = [r for r in ops if not draws(r)]
    one, two = ([r for r in rows if r["kind"] == "normals" and r["threads"] == n] for n in (1, 2))
    host = [{"case": r["call"], "dtype": "float32", **r} for r in result.get("host", []) if r["call"] != "x * 2.0"]
    raw, calls = [r for r in host if r["call"].startswith("raw")], [r for r in host if not r["call"].startswith("raw")]
    return [
        ("without noise: bandwidth over copy_'s >= 0.9", *listed(plain, copy_ratio, 0.9)),
        ("torch.compile's time over ours >= 1", *listed(ops, over_compiled, 1.0)),
        ("normals: torch.randn's time over ours, 1 thread >= 4", *listed(one, over_eager, 4.0)),
        ("the same, 2 threads >= 8", *listed(two, over_eager, 8.0)),
        ("host: a raw call over x * 2.0 <= 1.2", *listed(raw, lambda r: r["ratio"], 1.2, high=False)),
        ("host: named ops <= 2", *listed(calls, lambda r: r["ratio"], 2.0, high=False)),
        ("host: with gradients <= 4", *listed(calls, lambda r: r.get("gradient_ratio"), 4.0, high=False)),
    ]  # fmt: skip


def _brief(reading: float) -> str:
    return f"{reading:.0f}" if reading >= 10.0 else f"{reading:.1f}"


def tables() -> str:
    lines: list[str] = []
    for path in sorted(RESULTS.glob("*.json"), key=lambda p: "cuda" not in p.stem):
        result = json.loads(path.read_text())
        facts, cuda = result["machine"], result["machine"]["device"] == "cuda"
        lines += [
            f"### {facts['name']}",
            "",
            f"`{path.name}`, {facts['date'][:10]}, torch {facts['versions']['torch']}.",
            "",
        ]
        lines += ["| target | measured | |", "| --- | --- | --- |"]
        lines += [f"| {t} | {found} | {verdict} |" for t, found, verdict in (of_gpu if cuda else of_cpu)(result)]
        lines.append("")
    for path in sorted(COUNTERS.glob("*.json")):
        result = json.loads(path.read_text())
        metrics = [m for m in next(iter(result["passes"].values())) if m not in ("instructions", "bytes")]
        picture = path.with_name(path.name.replace("-counters.json", "-roofline.png")).relative_to(ROOT)
        lines += [
            f"### Counters, {result['machine']['name']}",
            "",
            "us and registers as they are. Eligible warps are a scheduler's in a cycle, waiting ones a scheduler's for "
            "each instruction issued: times the issue slots they are those of a cycle. The others in percent of what "
            "the device can sustain.",
            "",
        ]
        lines += ["| pass | " + " | ".join(metrics) + " |", "| --- |" + " ---: |" * len(metrics)]
        for name, found in result["passes"].items():
            lines.append(f"| {name} | " + " | ".join(_brief(found[m]) for m in metrics) + " |")
        lines += ["", f"![Roofline, {result['machine']['name']}](../{picture})", ""]
    return "\n".join(lines)


def main() -> None:
    text = PAGE.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{PAGE}: expected one {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
