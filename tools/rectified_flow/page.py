"""docs/flows.md between its markers, from the records under benchmarks/flows."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

from .problems import NAMES
from .runs import CALLS, ORDERS

BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
TITLES = {
    "digits": "Handwritten digits (8 x 8, the demo's network and judge)",
    "moons": "Two moons in the plane",
    "rings": "Two rings in the plane",
    "gaussians": "Eight normal distributions in the plane",
}
COSTS = {"squared": "\\|d\\|²", "norm": "\\|d\\|", "l1": "Σ\\|dᵢ\\|", "max": "max\\|dᵢ\\|", "cubic": "\\|d\\|³",
         "log_cosh": "Σ log cosh dᵢ"}  # fmt: skip


def update(page: pathlib.Path, records: pathlib.Path) -> None:
    """Writes what the records say between the page's markers."""
    text = page.read_text(encoding="utf-8")
    found = {name: record_of(records, name) for name in (*NAMES, "exact")}
    parts = {
        "tables": "\n".join(line for name in NAMES if found[name] for line in _tables(name, found[name])),
        "theorems": "\n".join(_theorems(found["exact"])) if found["exact"] else "",
        "likelihoods": "\n".join(_likelihoods(found["exact"])) if found["exact"] else "",
    }
    for name, part in parts.items():
        before, rest = text.split(BEGIN.format(name))
        text = f"{before}{BEGIN.format(name)}\n{part}\n{END.format(name)}{rest.split(END.format(name))[1]}"
    page.write_text(text, encoding="utf-8")


def record_of(records: pathlib.Path, name: str) -> dict[str, Any]:
    file = records / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _tables(name: str, record: dict[str, Any]) -> list[str]:
    run = record["run"]
    budget, seconds = run["budget"], run["seconds"]["all"]
    title = (f"### {TITLES[name]}", "")
    words = (
        f"{record['machine']}, {record['date']}, torch {record['torch']}, seed {record['seed']}, {seconds:.0f} s. "
        f"{budget['first']} steps for the first flow, {budget['reflow']} a round of reflow and {budget['distill']} a "
        f"student, of {budget['batch']} samples; {budget['pairs']} pairs a round. Quality: {run['metric']}, mean and "
        f"standard error of {budget['seeds']} seeds of {budget['samples']} samples; {run['floor']:.4f} between two "
        "samples of the data."
        + (" A quick run: it shows that the tool works, and nothing of the flows." if record["quick"] else "")
    )
    lines = [*title, words, "", "| | " + " | ".join(f"{c} call{'s' if c > 1 else ''}" for c in CALLS) + " |"]
    lines.append("|---|" + "---:|" * len(CALLS))
    for flow, of in run["flows"].items():
        lines.append(f"| {flow} | " + " | ".join(_pm(of["quality"][str(c)], 4) for c in CALLS) + " |")
    for student, of in run["students"].items():
        lines.append(f"| {student} | {_pm(of['quality']['1'], 4)} |" + " |" * (len(CALLS) - 1))
    lines += ["", "| | straightness S(Z) | curvature | " + " | ".join(f"E {c}" for c in COSTS.values()) + " |"]
    lines.append("|---|" + "---:|" * (2 + len(COSTS)))
    independent = run["independent"]["costs"]
    lines.append("| independent pairs | | | " + " | ".join(_pm(independent[c], 3) for c in COSTS) + " |")
    for flow, of in run["flows"].items():
        cells = [
            "{:.3g} ± {:.1g}".format(*of["straightness"]),
            _pm(of["curvature"], 3),
            *(_pm(of["costs"][c], 3) for c in COSTS),
        ]
        lines.append(f"| {flow} | {' | '.join(cells)} |")
    lines += ["", f"![quality against calls](images/flows_{name}_quality.png)", "",
              f"![{TITLES[name].lower()}](images/flows_{name}.png)", ""]  # fmt: skip
    return [*lines, *_verdicts(run), ""]


def _verdicts(run: dict[str, Any]) -> list[str]:
    """What was found by order of reflow, of these learned flows."""
    found, flows = [], [run["flows"][f"{k}-rectified flow"] for k in ORDERS]

    def row(of: Callable[[dict[str, Any]], float]) -> str:
        return ", ".join(f"{of(flow):.3g}" for flow in flows)

    found.append(
        f"- E {COSTS['squared']} by order of reflow: {row(lambda of: of['costs']['squared'][0])} (means of the same "
        "sources; a learned flow may cost a little more)."
    )
    if "cost differences" in run:
        found.append(_moved(run["cost differences"]))
    found.append(f"- Straightness by order of reflow: S(Z) = {row(lambda of: of['straightness'][0])}.")
    found.append(
        f"- {run['metric']} by order of reflow: {row(lambda of: of['quality']['1'][0])} at one call, "
        f"{row(lambda of: of['quality']['50'][0])} at 50."
    )
    return found


def _moved(differences: dict[str, dict[str, list[float]]]) -> str:
    """Which costs rose or fell from one learned flow to the next, by the errors of paired differences."""
    parts = []
    for name, of in differences.items():
        rose = [COSTS[cost] for cost, (mean, error) in of.items() if mean > 2.0 * error]
        fell = [COSTS[cost] for cost, (mean, error) in of.items() if mean < -2.0 * error]
        parts.append(f"of the {name} {_list(rose)} rose and {_list(fell)} fell")
    return f"- Transport costs against the flow before, beyond two paired standard errors: {'; '.join(parts)}."


def _list(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _theorems(record: dict[str, Any]) -> list[str]:
    lines = ["| statement | computed | result |", "|---|---|---:|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in record["run"]["theorems"])]


def _likelihoods(record: dict[str, Any]) -> list[str]:
    lines = [
        "| data | dimensions | steps of RK4 | exact divergence: largest error | Hutchinson, 32 probes: mean error |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, dims, steps, exact, mean, error in record["run"]["likelihoods"]:
        lines.append(f"| {name} | {dims} | {steps} | {exact:.1e} | {mean:.4f} ± {error:.4f} |")
    return lines


def _pm(value: list[float], digits: int) -> str:
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"
