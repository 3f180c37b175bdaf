"""Writes docs/samplers.md: what each sampler of Diffusion is, its measured order, and how far it is from diffusers.

The differences are those of tests/test_diffusers.py (the same network, start and noise, all in float64), the orders
those of tests/test_solvers.py, the round trip that of encode() and sample() with a perfect network.

    python tools/compare_with_diffusers.py
"""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import diffusers_oracle as oracle  # noqa: E402
from analytic import PathNetwork, mixture  # noqa: E402
from test_brownian import SDE, strong_distance  # noqa: E402
from test_solvers import VP, even_grid  # noqa: E402

import genkern as gk  # noqa: E402
from genkern.samplers import DPMSolver, EDMHeun, EulerAncestral, OnPath, UniPC, loop  # noqa: E402

PATH = ROOT / "docs" / "samplers.md"
ORDERS: list[tuple[str, Any]] = [
    ("`euler`, `ddim`", EulerAncestral(0.0)),
    ("`dpmpp_1`", DPMSolver(1, lower_order_final=False)),
    ("`dpmpp_2m`", DPMSolver(2, lower_order_final=False)),
    ("`dpmpp_3m`", DPMSolver(3, lower_order_final=False)),
    ("`heun`", EDMHeun()),
    ("`DPMSolver(3, as_published=True)`", DPMSolver(3, lower_order_final=False, as_published=True)),
    ("`UniPC(1)`", UniPC(1, lower_order_final=False)),
    ("`unipc`", UniPC(2, lower_order_final=False)),
]
STRONG = {"`euler_ancestral`, `ddpm`": "ancestral", "`dpmpp_1_sde`": "dpmpp_1_sde", "`dpmpp_2m_sde`": "dpmpp_2m_sde"}
TEXT = """# Samplers of Diffusion

`Diffusion.sample(model, shape, steps=20, sampler="dpmpp_2m")`; a `Sampler` object in place of the name takes options:
`sampler=samplers.DPMSolver(3, lower_order_final=False)`.

| name | object | what it is |
|---|---|---|
| `ddim` | `DDIM(eta)` | (13.13) with any eta, 0 by default |
| `ddpm` | `DDPM(variance)` | (13.13) with eta = 1; or with the chain's variance, "fixed_large" |
| | `NonMarkovian(posterior_std)` | (13.13) with any sigma, a number a step |
| `euler` | `EulerAncestral(0)` | Euler's method on sigma / alpha |
| `euler_ancestral` | `EulerAncestral(eta)` | the same with the posterior's noise, eta = 1 by default |
| `heun` | `EDMHeun(s_churn, s_min, s_max, s_noise)` | Heun's method on sigma / alpha, with churn: EDM's algorithm 2 |
| `dpmpp_1`, `dpmpp_2m`, `dpmpp_3m` | `DPMSolver(order)` | DPM-Solver++ for the ODE, multistep |
| `dpmpp_1_sde`, `dpmpp_2m_sde` | `DPMSolverSDE(order)` | DPM-Solver++ for the SDE |
| `unipc` | `UniPC(order)` | UniPC, bh2, order 2 |
| `Diffusion.encode` | `DDIMInversion()` | DDIM from the data to the noise |

Every step is one network call and one fused pass (`heun`: two of each), which also writes what later steps need. A
learned variance is read by the step's own pass, and inpainting is part of it.
`clip=gk.DynamicThreshold(ratio, max_value)`, dynamic thresholding of the predicted data (arXiv:2205.11487), puts a pass
before it, for a quantile of every sample (of samples beyond 16384 elements, one a digit of the numbers); so does
`guidance_rescale`, for the sums of its standard deviations. Between the two torch computes with a number a sample: a
captured step has about 20 such operations, 35 with both. A pass has at most three outputs: where state, network input
(of another dtype, or doubled for guidance) and kept predictions are more, a second pass copies the input from the
state. `lower_order_final` (on by default) ends a run of fewer than 15 steps with lower orders, as diffusers does; the
step to clean data has order 1.

`step_noise=gk.BrownianNoise(seed)` drives the stochastic ones along one Brownian path, whatever the steps; `heun`
refuses it with churn, which goes back to higher noise levels.
What the samplers make of few calls is in [quality.md](quality.md).

Times: `spacing="trailing"`, `"leading"`, `"linspace"`; or a grid of noise levels, `"karras"`, `"exponential"`,
`"polyexponential"`, `"beta"`; or given `timesteps=` or `sigmas=` (for instance `grids.karras(20, 0.03, 15.0)[::-1]`). A
noise level between two timesteps is stepped from exactly; the network is told the nearest timestep, or the time itself
with `round_times=False`.
"""


def worst(case: oracle.Case) -> dict[str, float]:
    return {prediction: oracle.difference(case, prediction) for prediction in case.predictions}


def order(sampler: Any) -> list[float]:
    """Of three runs with 192, 384 and 768 steps, the start's order matching, from which the order is read."""
    network, data = OnPath(VP, "sample"), PathNetwork(mixture(), VP, "sample")
    z = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = []
    for n in (192, 384, 768):
        stages = sampler.stages(network, even_grid(VP, 1.0, 0.02, n, start=2.0 * n**-1.5))
        ends.append(loop.run(data, stages, None, start=z, dtype=torch.float64))
    return [float((one - other).norm()) for one, other in ((ends[0], ends[1]), (ends[1], ends[2]))]


def round_trip(steps: int) -> float:
    """|decoded - x| / |x| over samples of the mixture, a perfect network predicting epsilon."""
    diffusion = gk.Diffusion()
    data, x = PathNetwork(mixture(), diffusion.path, "epsilon"), mixture().sample(256, seed=3)
    z = diffusion.encode(data, x, steps=steps, dtype=torch.float64)
    return float((diffusion.sample(data, noise=z, steps=steps, dtype=torch.float64) - x).norm() / x.norm())


def main() -> None:
    warnings.simplefilter("ignore", DeprecationWarning)
    lines = [TEXT]
    lines.append("## Orders of convergence\n")
    lines.append(
        "On a Gaussian mixture with a perfect network, even steps in log(alpha / sigma) on `paths.LinearVP`, the"
    )
    lines.append(
        "first step shorter so that the start has a matching order: differences of runs with n and 2n steps.\n"
    )
    lines.append("| sampler | 192 to 384 | 384 to 768 | order |\n|---|---|---|---|")
    for name, sampler in ORDERS:
        coarse, fine = order(sampler)
        lines.append(f"| {name} | {coarse:.2e} | {fine:.2e} | {math.log2(coarse / fine):.2f} |")
    lines.append(
        "\nThe published 3M weighs its second difference half as much as the quadratic through the three predictions"
    )
    lines.append("asks for, and so has order 2; `dpmpp_3m` has the full weight.\n")
    lines.append(
        "Stochastic samplers on Gaussian data N(0, 1/4), along one Brownian path (`BrownianNoise`): the exact root"
    )
    lines.append("mean square distance of the ends of n and 2n steps, from which the strong order.\n")
    lines.append("| sampler | 200 to 400 | 400 to 800 | order |\n|---|---|---|---|")
    for name, key in STRONG.items():
        coarse, fine = (strong_distance(SDE[key], n) for n in (200, 400))
        lines.append(f"| {name} | {coarse:.2e} | {fine:.2e} | {math.log2(coarse / fine):.2f} |")
    lines.append(f"\n## Agreement with diffusers {diffusers.__version__}\n")
    lines.append(
        "The largest difference of the end states over their largest element, the same network outputs, start and"
    )
    lines.append(
        f"noise, float64 throughout (torch {torch.__version__.split('+')[0]}), {oracle.STEPS} steps unless stated.\n"
    )
    lines.append("| sampler | scheduler | epsilon | v | sample |\n|---|---|---|---|---|")
    for name, case in oracle.CASES.items():
        found = worst(case)
        cells = [f"{found[p]:.1e}" if p in found else "not there" for p in oracle.PREDICTIONS]
        lines.append(f"| {name} | {case.scheduler} | {' | '.join(cells)} |")
    lines.append(f"| encode | DDIMInverseScheduler | {oracle.inversion():.1e} | | |")
    lines.append(
        "\nFor v and sample, `encode` reads the noise at the time the network is told, where DDIMInverseScheduler"
    )
    lines.append("reads it at the time of the state.\n")
    lines.append("## DDIM inversion\n")
    lines.append("Encoding, then decoding samples of the mixture with a perfect network: |decoded - x| / |x|.\n")
    lines.append("| steps | error |\n|---|---|")
    for steps in (10, 20, 50, 100, 250, 500, 1000):
        lines.append(f"| {steps} | {round_trip(steps):.4f} |")
    PATH.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PATH.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
