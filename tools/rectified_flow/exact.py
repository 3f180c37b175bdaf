"""What the seed says of exact flows, on fields that are known: no network, float64.

The field is flows.MarginalField, eq. (13.19), of a few points: the minimiser of (13.24) for independent noise and them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import genkern as gk
from genkern import flows, paths
from genkern.noise import Noise

F64 = torch.float64
FLOW = gk.RectifiedFlow()
POINTS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0], [1.5, 1.5]], dtype=F64)
LINE = torch.tensor([[-1.5], [-0.4], [1.8]], dtype=F64)
N = 4000


def theorems() -> list[tuple[str, str, str]]:
    """(statement, what was computed, the result)."""
    found = []
    field = flows.MarginalField(POINTS)
    x1 = POINTS[torch.randint(0, len(POINTS), (N,), generator=torch.Generator().manual_seed(2))]
    z1, path = FLOW.sample(field, (N, 2), steps=200, seed=6, dtype=F64, return_trajectory=True)
    x0 = path[0]
    saved = {c: flows.transport_cost(x0, x1, c) - flows.transport_cost(x0, z1, c) for c in flows.COSTS}
    least = min(float(s.mean()) / (float(s.std()) / math.sqrt(N)) for s in saved.values())
    found.append((
        "The rectified coupling costs no more, for every convex cost",
        f"the cost saved, in its standard errors: the least of {len(saved)} costs", f"{least:.0f}",
    ))  # fmt: skip
    residual = 2.0 * FLOW.loss(field, x1, x0, times="stratified", noise=Noise(3), reduction="none")
    gap = saved["squared"] - flows.straightness(path) - residual
    error = float(gap.std()) / math.sqrt(N)
    found.append((
        "What it saves of E\\|X1 - X0\\|² is S(Z) and the residual of (13.24)",
        "the difference of both sides, and its standard error", f"{float(gap.mean()):.3f} ± {error:.3f}",
    ))  # fmt: skip
    near = torch.cdist(z1, POINTS)
    counts = torch.bincount(near.argmin(1), minlength=len(POINTS)).double()
    chi = float(((counts - N / 4) ** 2 / (N / 4)).sum())
    found.append((
        "Marginals are kept: Z1 is distributed as the data",
        "the farthest end from a point; chi squared of the counts (3 degrees)",
        f"{float(near.amin(1).max()):.1e}; {chi:.1f}",
    ))  # fmt: skip
    z, lines = crossing()
    found.append((
        "Trajectories do not cross",
        "pairs of 60 that change their order on the line: of X_t; of Z_t",
        f"{_swaps(lines)}; {_swaps(z)}",
    ))  # fmt: skip
    m, s, start = 1.5, 0.4, torch.randn(N, 1, dtype=F64, generator=torch.Generator().manual_seed(1))

    def second(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.dtype)[:, None]
        return m + (s - 1.0) * (x - t * m) / (1.0 - t + t * s)

    one = FLOW.sample(second, x0=start, steps=1, dtype=F64)
    found.append((
        "A straight path is exact in one Euler step",
        "the 2-rectified flow of N(0, 1) to N(1.5, 0.4²): the largest error of one step",
        f"{float((one - m - s * start).abs().max()):.1e}",
    ))  # fmt: skip
    t = torch.linspace(0.01, 0.99, N, dtype=F64)
    forward = FLOW.loss(field, x1, x0, t=t)
    swapped = FLOW.loss(lambda x, r: -field(x, 1.0 - r), x0, x1, t=1.0 - t)
    found.append((
        "Exchanging X0 and X1 with the sign of v is the same problem",
        "the relative difference of the two losses", f"{abs(float(swapped / forward) - 1.0):.1e}",
    ))  # fmt: skip
    return found


def crossing(n: int = 60, steps: int = 400) -> tuple[Tensor, Tensor]:
    """Trajectories on the line by the exact field, and the interpolations X_t of independent pairs.  [steps + 1, n]."""
    x0 = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)[:, None]
    _, z = FLOW.sample(flows.MarginalField(LINE), x0=x0, steps=steps, dtype=F64, return_trajectory=True)
    x1 = LINE[torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(4))]
    t = torch.linspace(0.0, 1.0, steps + 1, dtype=F64)[:, None]
    return z[..., 0], (1.0 - t) * x0[:, 0] + t * x1[:, 0]


def _swaps(paths: Tensor) -> int:
    """Pairs of trajectories whose order at some time is another than at the start."""
    order = paths[:-1, :, None] - paths[:-1, None, :]  # the last time is at the points themselves, which many share
    changed = (order.sign() * order[0].sign() < 0).any(0)
    return int(changed.sum()) // 2


def likelihoods() -> list[tuple[str, int, int, float, float, float]]:
    """(data, dimensions, steps, largest error of log p, Hutchinson's mean error over samples, its standard error)."""
    found = []
    generator = torch.Generator().manual_seed(0)
    for name, points, sigma_min in (
        ("N(m, 0.5² I)", torch.full((1, 2), 0.7, dtype=F64), 0.5),
        ("four normal distributions", POINTS, 0.4),
        ("eight normal distributions", torch.randn(8, 16, dtype=F64, generator=generator), 0.4),
    ):
        path = paths.CondOT(sigma_min)
        flow, field = gk.FlowMatching(path), flows.MarginalField(points, path)
        centre = points[torch.randint(0, len(points), (64,), generator=generator)]
        x = centre + sigma_min * torch.randn(centre.shape, dtype=F64, generator=generator)
        exact, options = field.log_density(x, 1.0), {"steps": 200, "dtype": F64}
        error = flow.log_prob(field, x, **options) - exact
        estimate = flow.log_prob(field, x, divergence="hutchinson", probes=32, seed=0, **options) - exact
        spread = float(estimate.std()) / math.sqrt(len(x))
        found.append((name, points.shape[1], 200, float(error.abs().max()), float(estimate.mean()), spread))
    return found


def record() -> dict[str, Any]:
    return {"theorems": theorems(), "likelihoods": likelihoods()}
