"""Results as Markdown: the line of a row, a machine's section, and the block between two markers of a README."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from .world import CAREFUL, COMPILED, FLOOR, FLOOR_GRAPHED, GENKERN, GRAPHED, TEXTBOOK

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
EARLIER = "†"
KINDS = ("op", "training", "normals", "loop")
BASELINES = (TEXTBOOK, CAREFUL, COMPILED)


def line(row: dict[str, Any]) -> str:
    """A row as the terminal shows it."""
    text = f"{row['dtype']:9} {row['case']:36} {duration(row['seconds'][GENKERN]['median']):>9}"
    if "bytes" in row:
        speed, ratio = row["bytes_per_second"][GENKERN] * 1e-9, row["ratio_to_copy"]
        text += f" {speed:8.1f} GB/s {ratio:5.2f} of copy_"
    speedups = "  ".join(f"{name} {speedup:.2f}x" for name, speedup in row["speedup"].items())
    return f"{text}  faster than: {speedups}"


def section(result: dict[str, Any]) -> str:
    """A machine's tables: the ops, the normals, the loops, small calls."""
    facts, arguments, rows = result["machine"], result["arguments"], result["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    threads = f", {facts['threads']} threads" if facts["device"] == "cpu" else f", driver {facts['driver']}"
    revision = f", revision {facts['revision']}" if facts["revision"] else ""
    parts = [
        f"### {facts['name']}{threads}\n",
        f"{facts['date'][:10]}{revision}. Python {facts['python']}, {versions}. "
        f"float32 tensors of {arguments['mib']:g} MiB, others of as many elements. "
        "Medians; 2.00x: genkern is twice as fast as what heads the column.\n",
    ]
    for make in (_ops, _memory, _normals, _loops):
        parts += make(rows)
    if "host" in result:
        parts.append(host(result["host"]))
    marked = [row for row in (*rows, *result.get("host", [])) if "earlier" in row]
    if dates := sorted({row["earlier"][:16].replace("T", " ") for row in marked}):
        parts.append(f"{EARLIER} of an earlier run ({', '.join(dates)} UTC), of the kernels as they were then.\n")
    return "\n".join(parts)


def named(row: dict[str, Any]) -> str:
    """The case, marked where an earlier run has measured it."""
    return f"{row['case']} {EARLIER}" if "earlier" in row else str(row["case"])


def host(rows: Sequence[dict[str, Any]]) -> str:
    """What small calls cost on the host."""
    head = ["small call on the host", "time", "over `x * 2.0`", "with a gradient", "over it", "through torch.ops"]
    lines = []
    for row in rows:
        cells = [row["call"] + f" {EARLIER}" * ("earlier" in row), duration(row["seconds"]), f"{row['ratio']:.2f}"]
        recorded = "gradient_seconds" in row
        cells += [duration(row["gradient_seconds"]), f"{row['gradient_ratio']:.2f}"] if recorded else ["-", "-"]
        lines.append([*cells, f"{row['dispatched_ratio']:.2f}"])
    return _table(head, lines, left=(0,))


def duration(seconds: float) -> str:
    """Three digits, in the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{three(seconds / scale)} {unit}"
    return f"{three(seconds * 1e9)} ns"


def three(value: float) -> str:
    """Three significant digits without an exponent."""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def check_markers(readme: pathlib.Path) -> str:
    """The text of a README that holds one block between the markers.

    Raises:
        OSError: it cannot be read. ValueError: it has not exactly one marker of each kind, in their order.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme}: expected one {BEGIN} and after it one {END}")
    return text


def rewrite(readme: pathlib.Path, results: Sequence[dict[str, Any]]) -> None:
    """Replaces what stands between the markers by every machine's section, and nothing else."""
    text = check_markers(readme)
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n".join(section(result) for result in results)
    readme.write_text(f"{before}{BEGIN}\n{body}{END}{after}")


def _ops(rows: Sequence[dict[str, Any]]) -> list[str]:
    chosen = [row for kind in ("op", "training") for row in rows if row["kind"] == kind]
    if not chosen:
        return []
    hosted = any("host" in row["seconds"][GENKERN] for row in chosen)
    head = ["op", "dtype", "time", *["host"] * hosted, "GB/s", "of `copy_`", *BASELINES, "other libraries"]
    lines = []
    for row in chosen:
        own = row["seconds"][GENKERN]
        cells = [named(row), row["dtype"], duration(own["median"]), *([duration(own["host"])] if hosted else [])]
        cells += [three(row["bytes_per_second"][GENKERN] * 1e-9), f"{row['ratio_to_copy']:.2f}"]
        lines.append([*cells, *_speedups(row)])
    return [_table(head, lines, left=(0, 1, len(head) - 1))]


def _memory(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where the device's allocator tells it: what a training step allocates at its most."""
    chosen = [row for row in rows if row["kind"] == "training" and "peak" in row["seconds"][GENKERN]]
    if not chosen:
        return []
    names = [name for name in (GENKERN, *BASELINES) if any(name in row["seconds"] for row in chosen)]
    lines = []
    for row in chosen:
        peaks = {name: times["peak"] for name, times in row["seconds"].items() if "peak" in times}
        lines.append([named(row), row["dtype"], *(_mebibytes(peaks[name]) if name in peaks else "-" for name in names)])
    return [_table(["peak memory", "dtype", *names], lines, left=(0, 1))]


def _mebibytes(count: int) -> str:
    return f"{three(count / 2**20)} MiB"


def _normals(rows: Sequence[dict[str, Any]]) -> list[str]:
    chosen = [row for row in rows if row["kind"] == "normals"]
    if not chosen:
        return []
    names = list(dict.fromkeys(name for row in chosen for name in row["nanoseconds_each"]))
    titles = {TEXTBOOK: "`torch.randn`, ns each", CAREFUL: "`normal_` in place, ns each"}
    head = [
        "",
        *(titles.get(name, f"{name}, ns each") for name in names),
        "faster than `torch.randn`",
        "than `normal_`",
    ]
    lines = []
    for row in chosen:
        each = row["nanoseconds_each"]
        values = [f"{each[name]:.3f}" if name in each else "" for name in names]
        lines.append([named(row), *values, _times(row, TEXTBOOK), _times(row, CAREFUL)])
    return [_table(head, lines, left=(0,))]


def _loops(rows: Sequence[dict[str, Any]]) -> list[str]:
    chosen = [row for row in rows if row["kind"] == "loop"]
    if not chosen:
        return []
    graphed = any(GRAPHED in row["seconds"] for row in chosen)
    head = ["loop", "steps", "time", FLOOR, "a step over it"]
    head += [GRAPHED, FLOOR_GRAPHED, "a step over it", "times it"] * graphed + [*BASELINES, "other libraries"]
    lines = []
    for row in chosen:
        seconds = {name: duration(times["median"]) for name, times in row["seconds"].items()}
        cells = [named(row), str(row["count"]), seconds[GENKERN], seconds[FLOOR]]
        cells.append(f"{row['microseconds_a_step_over_the_network']:.1f} us")
        if graphed:
            cells += [seconds.get(GRAPHED, "-"), seconds.get(FLOOR_GRAPHED, "-")]
            over, ratio = (row.get(f"{name}_the_network_graphed") for name in ("microseconds_a_step_over", "ratio_to"))
            cells += ["-" if over is None else f"{over:.1f} us", "-" if ratio is None else f"{ratio:.3f}"]
        lines.append([*cells, *_speedups(row)])
    return [_table(head, lines, left=(0, len(head) - 1))]


def _speedups(row: dict[str, Any]) -> list[str]:
    others = [name for name in row["speedup"] if name not in (*BASELINES, GRAPHED)]
    return [*(_times(row, name) for name in BASELINES), ", ".join(f"{name} {_times(row, name)}" for name in others)]


def _times(row: dict[str, Any], name: str) -> str:
    return f"{row['speedup'][name]:.2f}x" if name in row["speedup"] else "-"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    rule = ["---" if k in left else "---:" for k in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)) + "\n"
