"""Writes docs/flows.md's tables and pictures: rectified flow of order 1, 2 and 3 and its students, on one data set.

A record of each run is kept under benchmarks/flows; the page is made from all that are there.

    python tools/rectified_flow_table.py --data digits --device cuda
    python tools/rectified_flow_table.py --data moons --data rings --data gaussians
    python tools/rectified_flow_table.py --data exact
    python tools/rectified_flow_table.py                        the page and its curves again, from the records
"""

from __future__ import annotations

import datetime
import json
import pathlib
import tempfile
from typing import Annotated, Any

import torch
import typer
from rectified_flow import exact, page, plots, problems, runs

from genkern.bench import machine

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHOICES = (*problems.NAMES, "exact")


def main(
    data: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(CHOICES)}; several times for several; none: the page alone."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of networks, pairs and samples.")] = 0,
    named: Annotated[str, typer.Option(help="What the page calls the machine; default its processor.")] = "",
    work: Annotated[
        pathlib.Path | None,
        typer.Option(help="A folder for pairs and networks, to go on from; default temporary."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds; shows that it works, and nothing else.")] = False,
    out: Annotated[pathlib.Path, typer.Option(help="The repository, or a copy of its docs, to write into.")] = ROOT,
) -> None:
    """Train, reflow, distil, measure; then write the record, the pictures and the page."""
    data = data or []
    unknown = [name for name in data if name not in CHOICES]
    if unknown:
        raise typer.BadParameter(f"--data: expected {', '.join(CHOICES)}, got {unknown[0]}")
    where = torch.device(device)
    records, images = out / "benchmarks" / "flows", out / "docs" / "images"
    for folder in (records, images):
        folder.mkdir(parents=True, exist_ok=True)
    for name in data:
        print(name, flush=True)
        if name == "exact":
            result = exact.record()
            plots.crossing(images / "flows_crossing.png")
        else:
            problem = problems.problem(name, where, seed, quick)
            with tempfile.TemporaryDirectory() as temporary:
                ran = runs.run(problem, (work or pathlib.Path(temporary)) / name, seed)
            result = ran.record
            draw = plots.digits if name == "digits" else plots.plane
            draw(problem, ran.networks, images / f"flows_{name}.png")
        _write(records / f"{name}.json", result, named or machine.name_of(where), seed, quick)
        print(json.dumps(result, indent=1), flush=True)
    for name in problems.NAMES:
        record = page.record_of(records, name)
        if record:
            plots.curves(record["run"], page.TITLES[name], images / f"flows_{name}_quality.png")
    page.update(out / "docs" / "flows.md", records)


def _write(file: pathlib.Path, run: dict[str, Any], name: str, seed: int, quick: bool) -> None:
    record = {
        "machine": name,
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "revision": machine.revision(),
        "seed": seed,
        "quick": quick,
        "run": run,
    }
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
