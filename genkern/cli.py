"""The command line: genkern demo | bench | info."""

from __future__ import annotations

import pathlib
import sys
from typing import Annotated

import typer

app = typer.Typer(
    name="genkern",
    help="Fused kernels for DDPM/DDIM, flow matching, rectified flow and consistency models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    out: Annotated[pathlib.Path, typer.Option(help="Folder for the pictures and the report.")] = pathlib.Path(
        "genkern-demo"
    ),
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="0 to 2^63 - 1; the run is a function of it.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds, not minutes; the digits show it.")] = False,
) -> None:
    """Train the four families on 1,797 handwritten digits, sample them, and judge the samples.

    Writes samples.png, quality.png and report.json. No download; a few minutes on two cores.
    """
    from .demo import setup

    try:
        ready = setup.prepare(out, device, seed, quick)
    except setup.CannotRun as error:
        _fail(str(error))
    from .demo import run

    run.run(ready)


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
    mib: Annotated[
        float | None, typer.Option(help="MiB of a float32 tensor, default 256 on a GPU and 64 on a CPU.")
    ] = None,
    dtypes: Annotated[
        str | None, typer.Option(help="Of float32, bfloat16, float16, mixed, with commas; default the first two.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Cases whose name contains this, or matches its * and ?.")] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Rounds of every case, default as many as a few seconds allow.")
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(help="Folder for JSON, Markdown and pictures.")] = pathlib.Path(
        "benchmarks/results"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller and fewer: a minute, and figures to match.")] = False,
    readme: Annotated[
        pathlib.Path | None, typer.Option(help="Rewrite this file's table from every result in the folder.")
    ] = None,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Measure nothing: tables and pictures of the results in the folder.")
    ] = False,
) -> None:
    """Time every op and loop beside eager PyTorch, torch.compile and other libraries: the same work, in one run.

    Writes NAME.json, NAME.md, NAME-bandwidth.png and NAME-speedup.png, NAME the machine's.
    """
    from .bench import setup

    try:
        what: setup.Redraw | setup.Setup
        if redraw:
            what = setup.to_redraw(out, readme)
        else:
            what = setup.prepare(device, mib, dtypes, only, repeats, out, quick, readme)
    except setup.CannotRun as error:
        _fail(str(error))
    from .bench import run

    if isinstance(what, setup.Redraw):
        run.redraw(what)
    else:
        run.run(what)


@app.command()
def info() -> None:
    """Print what is installed: version, compiled halves, architectures, torch, devices."""
    from . import info as information

    typer.echo(information.report())


def main() -> None:
    """The console script."""
    app()


def _fail(message: str) -> None:
    typer.echo(f"genkern: {message}", err=True)
    sys.exit(2)
