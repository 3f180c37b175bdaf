"""Error against network calls and time of every solver of flows, torchdiffeq's of the same names beside them.

    python tools/solver_table.py                  # measures here, then writes docs/solvers.md and its pictures
    python tools/solver_table.py --device cuda
    python tools/solver_table.py --page-only      # from the results that there are

Two fields: the exact marginal field of a Gaussian mixture, in float64, and a small network trained on its samples, in
float32. Both are solved from t = 0 to 1; the truth is torchdiffeq's "dopri8" in float64 at a tolerance of 1e-10. A
result goes to benchmarks/solvers/, named by the machine.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn

import genkern as gk
from genkern import flows
from genkern.bench import machine, peers, timing
from genkern.demo import plots
from genkern.noise import Noise
from genkern.samplers import Dopri5

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE, IMAGES = ROOT / "benchmarks" / "solvers", ROOT / "docs" / "solvers.md", ROOT / "docs" / "images"
BEGIN, END = "<!-- solvers: begin -->", "<!-- solvers: end -->"

DIMS, POINTS, SPREAD, BATCH = 8, 8, 0.3, 1024
WIDTH, TRAIN_STEPS, TRAIN_BATCH = 64, 500, 512
REPEATS, BUDGET = 5, 0.3  # of each setting
OURS, THEIRS, GRAPHED = "genkern", "torchdiffeq", "genkern, CUDA graph"
# name: (calls a step, torchdiffeq's name)
FIXED: dict[str, tuple[int, str | None]] = {
    "euler": (1, "euler"), "ab2": (1, None), "midpoint": (2, "midpoint"), "heun": (2, "heun2"), "rk4": (4, "rk4"),
}  # fmt: skip
CALLS = (8, 16, 32, 64, 128)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SHOWN = ("16 calls", "64 calls", "1e-03", "1e-05")  # in the page's tables
STYLES = {
    "euler": ("#9aa5b1", "o"), "ab2": ("#8c6d31", "<"), "midpoint": ("#2e8b57", "^"), "heun": ("#1f5fa8", "s"),
    "rk4": ("#e8963a", "P"), "dopri5, batch": ("#b5391f", "D"), "dopri5, sample": ("#7b3fa0", "X"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Field:
    """What is solved: a velocity, the initial state, where it leads."""

    name: str
    flow: gk.FlowMatching
    velocity: Callable[[Tensor, Tensor], Tensor]
    x0: Tensor
    truth: Tensor

    def error(self, x: Tensor) -> float:
        """|x - truth| / |truth|, over the whole batch."""
        return float((x.double() - self.truth).norm() / self.truth.norm())


class Network(nn.Module):
    """Two hidden layers of (x, t)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(DIMS + 1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, DIMS)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self.layers(torch.cat([x, t[:, None].to(x.dtype)], dim=1))
        return found


class Counted:
    """A velocity that counts its calls."""

    def __init__(self, velocity: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.velocity, self.calls = velocity, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.velocity(x, t)


def solved_by_them(velocity: Any, x0: Tensor, method: str, steps: int | None, tolerance: float | None) -> Tensor:
    """torchdiffeq.odeint from 0 to 1; adaptive methods end a step at 1, as the fields end there."""
    grid = torch.linspace(0.0, 1.0, 2 if steps is None else steps + 1, dtype=x0.dtype, device=x0.device)
    options: dict[str, Any] = {"method": method}
    if tolerance is not None:
        options |= {"rtol": tolerance, "atol": tolerance, "options": {"step_t": grid[1:]}}
    found: Tensor = peers.load("torchdiffeq").odeint(lambda t, x: velocity(x, t.expand(len(x))), x0, grid, **options)
    return found[-1]


def fields(device: torch.device) -> list[Field]:
    """The mixture's field and the network's."""
    torch.manual_seed(0)
    points = torch.randn(POINTS, DIMS, dtype=torch.float64).to(device)
    flow = gk.FlowMatching(sigma_min=SPREAD)  # data at 1 are points + SPREAD z
    exact = flows.MarginalField(points, flow.path)
    x0 = gk.ops.randn((BATCH, DIMS), noise=Noise(1), device=device, dtype=torch.float64)
    network = trained(points, flow, device)
    found = []
    for name, velocity, dtype in (
        ("mixture, float64", exact, torch.float64),
        ("network, float32", network, torch.float32),
    ):
        wide = copy.deepcopy(velocity).double() if isinstance(velocity, nn.Module) else velocity
        truth = solved_by_them(wide, x0.to(dtype).double(), "dopri8", None, 1e-10)
        found.append(Field(name, flow, velocity, x0.to(dtype), truth))
    return found


def trained(points: Tensor, flow: gk.FlowMatching, device: torch.device) -> Network:
    """The network after TRAIN_STEPS of flow matching on samples of the mixture."""
    network = Network().to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    with torch.enable_grad():
        for step in range(TRAIN_STEPS):
            x = points[torch.randint(POINTS, (TRAIN_BATCH,), device=device)].float()
            optimizer.zero_grad()
            flow.loss(network, x, noise=Noise(0, stream=step)).backward()
            optimizer.step()
    return network.requires_grad_(False).eval()


def contenders(field: Field, solver: str, setting: float, graphs: bool) -> dict[str, Callable[[Any], Tensor]]:
    """What solves the field at a setting (network calls, or a tolerance), each given the velocity."""
    flow, x0 = field.flow, field.x0
    options: dict[str, Any] = {"x0": x0, "dtype": x0.dtype, "model_dtype": x0.dtype}
    if solver in FIXED:
        calls, other = FIXED[solver]
        steps, tolerance = int(setting) // calls, None
        options |= {"sampler": solver, "steps": steps}
    else:
        control = solver.partition(", ")[2]
        steps, tolerance, other = None, setting, "dopri5" if control == "batch" else None
        options |= {"sampler": Dopri5(setting, setting, control)}
    found: dict[str, Callable[[Any], Tensor]] = {OURS: lambda velocity: flow.sample(velocity, **options)}
    if other is not None:
        found[THEIRS] = lambda velocity: solved_by_them(velocity, x0, other, steps, tolerance)
    if graphs:
        loop = gk.Loop(flow, field.velocity)

        def captured(velocity: Any) -> Tensor:
            x: Tensor = loop.sample(**options)
            if loop.refusal is not None:
                raise RuntimeError(loop.refusal)
            return x

        found[GRAPHED] = captured
    return found


def measured(field: Field, solver: str, setting: float, device: torch.device) -> dict[str, Any]:
    """A solver at a setting: calls, error and median seconds of each contender."""
    row: dict[str, Any] = {"field": field.name, "solver": solver, "setting": setting, "calls": {}, "error": {}}
    runs = contenders(field, solver, setting, device.type == "cuda")
    for name, run in list(runs.items()):
        counted = Counted(field.velocity)
        try:
            row["error"][name] = field.error(run(field.velocity if name == GRAPHED else counted))
        except (AssertionError, RuntimeError) as error:  # torchdiffeq asserts, where a step is too small
            row.setdefault("failed", {})[name] = str(error)
            del runs[name]
            continue
        if name != GRAPHED:
            row["calls"][name] = counted.calls
    ready = {name: lambda run=run: run(field.velocity) for name, run in runs.items()}  # type: ignore[misc]
    times = timing.measure(ready, device, REPEATS, BUDGET)
    row["seconds"] = {name: found.median for name, found in times.items()}
    return row


def alone(field: Field, device: torch.device) -> float:
    """Seconds of a bare call of the velocity, of 32 in a row."""
    t = torch.full((len(field.x0),), 0.5, dtype=field.x0.dtype, device=device)

    def run() -> None:
        for _ in range(32):
            field.velocity(field.x0, t)

    run()
    return timing.measure({"alone": run}, device, REPEATS, BUDGET)["alone"].median / 32


@torch.no_grad()
def measure(device: torch.device, note: str) -> Path:
    """Measures on a device and writes the result."""
    warnings.simplefilter("ignore")  # of torchdiffeq's grids
    rows, networks = [], {}
    for field in fields(device):
        networks[field.name] = alone(field, device)
        settings = [(solver, float(calls)) for solver in FIXED for calls in CALLS]
        settings += [(f"dopri5, {control}", tol) for control in ("batch", "sample") for tol in TOLERANCES]
        for solver, setting in settings:
            rows.append(measured(field, solver, setting, device))
            print(f"{field.name:18} {solver:15} {setting:8g} {rows[-1]['error'][OURS]:.2e}", flush=True)
    result = {
        "machine": machine.describe(device),
        "note": note,
        "batch": BATCH,
        "dims": DIMS,
        "network_alone": networks,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{machine.slug(device)}.json"
    path.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    return path


def shown(row: dict[str, Any]) -> str:
    """A setting in words."""
    return f"{row['setting']:g} calls" if row["solver"] in FIXED else f"{row['setting']:.0e}"


def table(result: dict[str, Any], field: str) -> list[str]:
    """Markdown of a field's rows."""
    graphs = any(GRAPHED in row["seconds"] for row in result["rows"])
    heads = ["solver", "calls or tolerance", "calls", "error", "time"]
    heads += ["CUDA graph"] * graphs + ["network alone", "torchdiffeq: calls", "error", "time", "time over ours"]
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    each = result["network_alone"][field]
    for row in result["rows"]:
        if row["field"] != field or shown(row) not in SHOWN:
            continue
        calls, error, seconds = row["calls"], row["error"], row["seconds"]
        cells = [row["solver"], shown(row), f"{calls[OURS]}", f"{error[OURS]:.1e}", ms(seconds[OURS])]
        cells += [ms(seconds.get(GRAPHED))] * graphs + [ms(each * calls[OURS])]
        if THEIRS in seconds:
            ratio = seconds[THEIRS] / seconds[OURS]
            cells += [f"{calls[THEIRS]}", f"{error[THEIRS]:.1e}", ms(seconds[THEIRS]), f"{ratio:.2f}x"]
        else:
            cells += ["fails" if THEIRS in row.get("failed", {}) else "", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f} ms"


def picture(result: dict[str, Any], path: Path) -> None:
    """Error against calls and against time, a row a field."""
    names = list(dict.fromkeys(row["field"] for row in result["rows"]))
    figure = plots._figure(12.0, 4.2 * len(names) + 0.9)
    height = figure.get_size_inches()[1]
    figure.text(
        0.02, 1 - 0.3 / height, "Solvers of a flow: error against cost", fontsize=16, weight="bold", va="center"
    )
    about = f"{result['machine']['name']}, {result['batch']} samples of {result['dims']} dimensions. "
    about += "Filled and solid: genkern; hollow and dotted: torchdiffeq."
    figure.text(0.02, 1 - 0.6 / height, about, fontsize=10, color=plots.GREY, va="center")
    for k, name in enumerate(names):
        for column, (key, label) in enumerate((("calls", "network calls"), ("seconds", "seconds"))):
            box = (0.07 + 0.41 * column, 1 - (4.2 * (k + 1) + 0.3) / height, 0.35, 3.3 / height)
            axes = figure.add_axes(box)
            for solver, (colour, marker) in STYLES.items():
                rows = [r for r in result["rows"] if r["field"] == name and r["solver"] == solver]
                for library, line, fill in ((THEIRS, ":", "none"), (OURS, "-", "full")):
                    points = [(r[key][library], r["error"][library]) for r in rows if library in r["seconds"]]
                    if points:
                        axes.plot(
                            *zip(*points, strict=True), line, marker=marker, color=colour, fillstyle=fill, markersize=6,
                            linewidth=1.6, label=solver if library == OURS else None,
                        )  # fmt: skip
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(True, color="#e2e2e2", linewidth=0.8)
            axes.set_title(name, fontsize=11, loc="left")
            axes.set_xlabel(label)
            axes.set_ylabel("relative error at t = 1" if column == 0 else "")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            if k == 0 and column == 1:
                axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=10)
    figure.savefig(path, dpi=110, facecolor="white")


def page() -> None:
    """Writes every result into the page."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        facts = result["machine"]
        where = (
            facts["name"]
            if facts["device"] == "cuda"
            else f"{facts['name']}, {facts['threads']} thread{'s' * (facts['threads'] > 1)}"
        )
        versions = facts["versions"]
        lines += [f"### {where}", ""]
        lines += [
            f"`{path.name}`, {facts['date'][:10]}, torch {versions['torch']}, torchdiffeq {versions['torchdiffeq']}. "
            f"{result['note']}".strip(), "",
        ]  # fmt: skip
        for field in dict.fromkeys(row["field"] for row in result["rows"]):
            lines += [f"**{field}**", "", *table(result, field), ""]
        image = IMAGES / f"solvers-{path.stem}.png"
        picture(result, image)
        lines += [f"![error against calls and time, {where}](images/{image.name})", ""]
    text = PAGE.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{PAGE}: expected one {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"{END}{rest.split(END)[1]}")


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    note: Annotated[str, typer.Option(help="Said beside the result, such as what else ran on the machine.")] = "",
    threads: Annotated[int, typer.Option(help="Of PyTorch on the CPU; the states are small.")] = 1,
    page_only: Annotated[bool, typer.Option("--page-only", help="Measure nothing.")] = False,
) -> None:
    """Error against network calls and time of every solver, written to benchmarks/solvers and docs/solvers.md."""
    torch.set_num_threads(threads)
    if not page_only:
        measure(torch.device(device), note)
    page()


if __name__ == "__main__":
    typer.run(main)
