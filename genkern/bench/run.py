"""A run: build each case, compare its contenders' results, time them in turns, write what was found.

Before a case is timed, a small one of the same build is run with the same noise for all, and every contender's result
is compared with genkern's: a contender that does other work is an error, not a row. Rows carry

    bytes               moved by the formula: each input read once, each output written once
    ratio_to_copy       bytes / time, over that of torch's copy_ of as many elements in the same rounds
    speedup             a contender's median over genkern's
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import cases, host, machine, plots, table, timing
from .setup import Redraw, Setup
from .world import COMPILED, FLOOR, FLOOR_GRAPHED, FLOORS, GENKERN, GRAPHED, OURS, Case, Compiler, World

COPY = "copy_"
SMALL = 1 << 16  # elements of a tensor where results are compared
# Of the largest number in the result: float32 rounds a few times; in half precision the baselines round after every
# operation.
TOLERANCES = {"float32": 2e-5, "bfloat16": 6e-2, "float16": 8e-3, "mixed": 6e-2}

Echo = Callable[[str], object]


class Disagreement(AssertionError):
    """A contender's result is not genkern's: it does not do the same work."""


def run(setup: Setup, echo: Echo = print) -> dict[str, Any]:
    """Measures, and writes JSON, Markdown and pictures into the folder; rewrites the table of a README if asked.

    Returns:
        What the JSON holds: {"machine", "arguments", "rows"}, and "host" (host.py) where it was asked for.
    """
    compiler = Compiler()
    facts, rows = machine.describe(setup.device), list[dict[str, Any]]()
    result = {"machine": facts, "arguments": setup.arguments(), "rows": rows}
    echo(f"{facts['name']}, torch {torch.__version__}, float32 tensors of {setup.mib:g} MiB")
    if compiler.reason:
        echo(compiler.reason)
    stem = machine.slug(setup.device)
    path = setup.out / f"{stem}.json"
    former = json.loads(path.read_text()) if path.exists() else None

    def keep() -> None:
        """What is measured so far: a run that is broken off leaves it, for --redraw."""
        path.write_text(json.dumps(with_earlier(result, former), indent=1) + "\n")

    if host.asked(setup.only):
        small = result["host"] = host.measured(setup.device)
        echo(table.host(small))
    for row in measured(setup, compiler):
        rows.append(row)
        echo(table.line(row))
        keep()
    keep()
    draw(with_earlier(result, former), setup.out, stem)
    if setup.readme is not None:
        table.rewrite(setup.readme, list(results_in(setup.out).values()))
    return result


def with_earlier(result: dict[str, Any], former: dict[str, Any] | None) -> dict[str, Any]:
    """A result, and after its rows those of a former one, of tensors as large, that it has not measured again. Such a
    row says in "earlier" when it was measured."""
    if former is None or former["arguments"]["mib"] != result["arguments"]["mib"]:
        return result
    measured = {(row["case"], row["dtype"]) for row in result["rows"]}
    others = [row for row in former["rows"] if (row["case"], row["dtype"]) not in measured]
    date = former["machine"]["date"]
    kept = [{**row, "earlier": row.get("earlier", date)} for row in others]
    host = [{**row, "earlier": row.get("earlier", date)} for row in former.get("host", [])]
    found = {**result, "rows": [*result["rows"], *kept]}
    return {"host": host, **found} if host else found


def redraw(what: Redraw) -> None:
    """Tables and pictures of every result in a folder, and the table of a README if asked; nothing is measured."""
    found = results_in(what.out)
    for stem, result in found.items():
        draw(result, what.out, stem)
    if what.readme is not None:
        table.rewrite(what.readme, list(found.values()))


def draw(result: dict[str, Any], out: pathlib.Path, stem: str) -> None:
    """stem.md, stem-bandwidth.png and stem-speedup.png in the folder."""
    (out / f"{stem}.md").write_text(table.section(result))
    if not result["rows"]:
        return
    plots.bandwidth(result, out / f"{stem}-bandwidth.png")
    plots.speedup(result, out / f"{stem}-speedup.png")


def results_in(out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Every machine's result in a folder by the stem of its file, GPUs first."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda item: item[1]["machine"]["device"] == "cpu"))


def measured(setup: Setup, compiler: Compiler) -> Iterator[dict[str, Any]]:
    """The rows of a run, as they are measured."""
    without = Compiler(wanted=False)
    for dtype in setup.dtypes:
        world = World(setup.device, dtype, cases.elements_of(setup.mib), compiler)
        for spec in cases.chosen(setup.device, setup.only):
            if dtype not in spec.dtypes:
                continue
            small = World(setup.device, spec.compared_in or dtype, SMALL, without, same_noise=True)
            compared = spec.build(small)
            with cases.setting(compared):
                agreement = deviations(compared)
            torch.compiler.reset()  # else every case counts toward the limit of recompilations
            case = spec.build(world)
            with cases.setting(case):
                leave_out(case, compared.skipped)
                yield row_of(case, agreement, timed(case, world, setup))


def deviations(case: Case) -> dict[str, float]:
    """The largest difference of every contender's result from genkern's, over the largest number in it.

    A library that fails here, or does other work, is moved from the case's contenders to those skipped.

    Raises:
        Disagreement: a baseline of ours differs by more than TOLERANCES.
    """
    wanted = _tensors(case.contenders[GENKERN]())
    found = {}
    for name in [name for name in case.contenders if name not in (GENKERN, *FLOORS)]:
        try:
            found[name] = _deviation(case, name, wanted)
        except Exception as error:  # of a library: whatever a version of it raises on this machine
            if name in OURS:
                raise
            del case.contenders[name]
            case.skipped[name] = str(error).strip().partition("\n")[0]
    return found


def leave_out(case: Case, skipped: dict[str, str]) -> None:
    """Takes out of a case the libraries that were skipped when results were compared, and torch.compile where it fails
    on this formula."""
    for name, reason in skipped.items():
        if name not in OURS and name in case.contenders:
            del case.contenders[name]
            case.skipped[name] = reason
    if COMPILED in case.contenders:
        try:
            case.contenders[COMPILED]()
        except Exception as error:  # whatever a compiler raises
            del case.contenders[COMPILED]
            case.skipped[COMPILED] = str(error).strip().partition("\n")[0]


def timed(case: Case, world: World, setup: Setup) -> dict[str, timing.Times]:
    """Times of every contender, and of a copy of one tensor."""
    runs = dict(case.contenders)
    if case.moved is not None:
        source, target = world.state("x"), world.state("copied")
        runs[COPY] = lambda: target.copy_(source)
    return timing.measure(runs, setup.device, setup.repeats, setup.seconds, loop=case.kind == "loop")


def row_of(case: Case, agreement: dict[str, float], times: dict[str, timing.Times]) -> dict[str, Any]:
    """A row of the result."""
    own = times[GENKERN].median
    row: dict[str, Any] = {"case": case.name, "kind": case.kind, "dtype": case.dtype, "count": case.count}
    row["seconds"] = {name: t.as_dict() for name, t in times.items()}
    row["speedup"] = {name: t.median / own for name, t in times.items() if name not in (GENKERN, COPY, *FLOORS)}
    if case.moved is not None:
        copied = 2 * case.count * cases.DTYPES[case.dtype].itemsize
        copy = copied / times[COPY].median
        row["bytes"] = case.moved
        row["bytes_per_second"] = {name: case.moved / t.median for name, t in times.items() if name != COPY}
        row["copy_bytes_per_second"] = copy
        row["ratio_to_copy"] = case.moved / own / copy
    if case.kind == "normals":
        row["nanoseconds_each"] = {n: t.median / case.count * 1e9 for n, t in times.items() if n != COPY}
        row["threads"], row["isa"] = case.threads, case.isa
    if FLOOR in times:
        row["microseconds_a_step_over_the_network"] = (own - times[FLOOR].median) / case.count * 1e6
    if FLOOR_GRAPHED in times:
        over = times[GRAPHED].median - times[FLOOR_GRAPHED].median
        row["microseconds_a_step_over_the_network_graphed"] = over / case.count * 1e6
        row["ratio_to_the_network_graphed"] = times[GRAPHED].median / times[FLOOR_GRAPHED].median
    row["agreement"], row["skipped"], row["notes"] = agreement, case.skipped, case.notes
    return row


def _deviation(case: Case, name: str, wanted: list[Tensor]) -> float:
    got = _tensors(case.contenders[name]())
    if [t.shape for t in got] != [t.shape for t in wanted]:
        raise Disagreement(f"{case.name}, {case.dtype}: {name} returns other shapes than genkern")
    found = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=True))
    if not found <= TOLERANCES[case.dtype]:
        raise Disagreement(
            f"{case.name}, {case.dtype}: {name} differs from genkern by {found:.2g} of the largest number, "
            f"more than {TOLERANCES[case.dtype]:.2g}"
        )
    return found


def _tensors(found: Any) -> list[Tensor]:
    """A contender's result, kept apart from buffers that the next one writes."""
    return [t.detach().double().clone() for t in (found if isinstance(found, tuple) else (found,))]
