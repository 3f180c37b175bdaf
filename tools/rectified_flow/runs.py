"""Reflow on a problem, and what comes of it: straightness, curvature, transport costs, quality at few calls.

flow k            the k-rectified flow, k = 1, 2, 3, by RectifiedFlow.reflow
flow k, distilled its student of one step, by RectifiedFlow.distill
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
import time
from typing import Any

import torch
from torch import Tensor, nn

import genkern as gk
from genkern import flows
from genkern.noise import Noise
from genkern.training import EMA, trainer

from .problems import Problem

FLOW = gk.RectifiedFlow()
CALLS = (1, 2, 5, 10, 50)
ORDERS = (1, 2, 3)
FINE = 100  # Euler steps of a trajectory that is measured
EVALUATED = 1000  # seeds from here on are of samples that are judged and shown; training has seed to seed + 3
PAIR_STEPS = {"digits": 20}  # Heun steps of a pair; 50 elsewhere


@dataclasses.dataclass(frozen=True)
class Ran:
    """The networks by name, and the record that is written."""

    networks: dict[str, nn.Module]
    record: dict[str, Any]


def run(problem: Problem, folder: pathlib.Path, seed: int) -> Ran:
    """Trains every flow of a problem, and measures it. The folder keeps pairs and networks of reflow."""
    start, budget = time.perf_counter(), problem.budget
    first = _first(problem, seed)
    told = {"batch_size": budget.batch, "lr": budget.lr, "ema_decay": 0.995}
    shape = (budget.pairs, *problem.shape)
    pairs = {"steps": PAIR_STEPS.get(problem.name, 50), "sampler": "heun", "shard_size": 4096}
    later = FLOW.reflow(
        first, folder, shape, rounds=len(ORDERS) - 1, seed=seed, fit={"steps": budget.reflow, **told}, **pairs
    )  # fmt: skip
    networks = {f"{k}-rectified flow": network for k, network in zip(ORDERS, [first, *later], strict=True)}
    trained = time.perf_counter() - start
    students = {}
    for k in ORDERS:
        fit = {"steps": budget.distill, **told}
        source = networks[f"{k}-rectified flow"]
        students[f"{k}-rectified flow, distilled"] = FLOW.distill(
            source, folder / f"distilled-{k}", shape, seed=seed + k, fit=fit, **pairs
        )
    measured, costs = {}, {}
    for name, network in networks.items():
        measured[name], costs[name] = _measured(problem, network, seed)
    record = {
        "budget": dataclasses.asdict(budget),
        "metric": problem.metric,
        "floor": problem.floor,
        "independent": {"costs": _independent(problem, seed)},
        "flows": measured,
        "cost differences": differences(costs),
        "students": {name: {"quality": _quality(problem, of, (1,))} for name, of in students.items()},
        "seconds": {"training and reflow": trained, "all": time.perf_counter() - start},
    }
    return Ran({**networks, **students}, record)


def _first(problem: Problem, seed: int) -> nn.Module:
    """The 1-rectified flow, from independent pairs."""
    torch.manual_seed(seed)
    network = problem.network()
    average = EMA(network, 0.995)

    def loss(x: Tensor, step: int) -> Tensor:
        return FLOW.loss(network, x, times="stratified", noise=Noise(seed, stream=step))

    def update(step: int) -> None:
        average.update(network, decay=min(0.995, (1 + step) / (10 + step)))

    b = problem.budget
    trainer.fit(network.parameters(), loss, problem.batches, steps=b.first, lr=b.lr, after_step=update)
    return average.module.eval()


def _measured(problem: Problem, network: nn.Module, seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measures of trajectories of Euler's method with FINE steps, and the quality at every number of calls; and every
    sample's costs, from sources that are the same for every flow."""
    shape = (problem.budget.samples, *problem.shape)
    end, path = FLOW.sample(network, shape, steps=FINE, seed=EVALUATED + seed, return_trajectory=True)
    costs = {cost: flows.transport_cost(path[0], end, cost) for cost in flows.COSTS}
    return {
        "straightness": _mean(flows.straightness(path)),
        "curvature": _mean(flows.curvature(path)),
        "costs": {cost: _mean(of) for cost, of in costs.items()},
        "quality": _quality(problem, network, CALLS),
    }, costs


def differences(costs: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, list[float]]]:
    """E c(d_k) - c(d_{k-1}) of flows in their order, from the same sources: its mean and the standard error of the
    differences, which is not that of two means by themselves."""
    found = {}
    for (_, before), (name, after) in itertools.pairwise(costs.items()):
        found[name] = {cost: _mean(after[cost].double() - before[cost].double()) for cost in after}
    return found


def _independent(problem: Problem, seed: int) -> dict[str, list[float]]:
    """Costs of the coupling that the first flow is trained on."""
    x1 = next(problem.batches)
    while len(x1) < problem.budget.samples:
        x1 = torch.cat([x1, next(problem.batches)])
    x1 = x1[: problem.budget.samples]
    x0 = gk.ops.randn(tuple(x1.shape), noise=Noise(EVALUATED + seed), device=x1.device)
    return {cost: _mean(flows.transport_cost(x0, x1, cost)) for cost in flows.COSTS}


def _quality(problem: Problem, network: nn.Module, counts: tuple[int, ...]) -> dict[str, list[float]]:
    """Mean and standard error over seeds, by the number of Euler steps."""
    shape, found = (problem.budget.samples, *problem.shape), {}
    for calls in counts:
        drawn = [
            problem.quality(FLOW.sample(network, shape, steps=calls, seed=EVALUATED + k))
            for k in range(problem.budget.seeds)
        ]
        found[str(calls)] = _mean(torch.tensor(drawn, dtype=torch.float64))
    return found


def _mean(values: Tensor) -> list[float]:
    """The mean and its standard error."""
    return [float(values.mean()), float(values.std()) / math.sqrt(len(values))]
