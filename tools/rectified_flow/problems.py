"""What is flowed to: the digits of `genkern demo`, and three sets in the plane, each with its network and its judge.

plane     quality is W_2^2, the least mean |x - y|^2 over pairings of as many samples and data; floor: data and data
digits    quality is the Frechet distance of the demo's judge; floor: two halves of the real digits
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from genkern import flows
from genkern.demo import data as digits_data
from genkern.demo import quality
from genkern.demo.networks import DigitNetwork

NAMES = ("digits", "moons", "rings", "gaussians")


@dataclasses.dataclass(frozen=True)
class Budget:
    """Optimiser steps of the first flow, of each round of reflow and of each distillation; pairs of each; samples."""

    first: int
    reflow: int
    distill: int
    batch: int
    lr: float
    pairs: int
    samples: int
    seeds: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """A data set.

    network: a new network.   batches: without end, data [batch, ...].   quality: of samples [N, ...], less is better.
    floor: that of real data.   data: some for the pictures.
    """

    name: str
    shape: tuple[int, ...]
    budget: Budget
    network: Callable[[], nn.Module]
    batches: Iterator[Tensor]
    quality: Callable[[Tensor], float]
    metric: str
    floor: float
    data: Tensor


class PlaneNetwork(nn.Module):
    """v(x, t) in the plane: three dense layers of (x, t, cos and sin of pi t and 2 pi t)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = (2 + 5, width, width, width)
        hidden = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, 2].  t: [B]."""
        angle = t[:, None] * torch.tensor([math.pi, 2.0 * math.pi], device=x.device)
        return self.layers(torch.cat([x, t[:, None], angle.cos(), angle.sin()], 1))


def moons(n: int, generator: torch.Generator) -> Tensor:
    """Two half circles of radius 1.5, one in the other's bend."""
    u = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, u.cos() - 0.5, 0.5 - u.cos())
    y = torch.where(upper, u.sin() - 0.25, 0.25 - u.sin())
    return 1.5 * torch.stack([x, y], 1) + 0.08 * torch.randn(n, 2, generator=generator)


def rings(n: int, generator: torch.Generator) -> Tensor:
    """Two circles of radius 0.9 and 2.1, as many points on each."""
    u = 2.0 * math.pi * torch.rand(n, generator=generator)
    radius = torch.where(torch.rand(n, generator=generator) < 0.5, 0.9, 2.1)
    return radius[:, None] * torch.stack([u.cos(), u.sin()], 1) + 0.08 * torch.randn(n, 2, generator=generator)


def gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Eight small normal distributions on a circle of radius 2.5."""
    u = 2.0 * math.pi / 8.0 * torch.randint(8, (n,), generator=generator)
    return 2.5 * torch.stack([u.cos(), u.sin()], 1) + 0.15 * torch.randn(n, 2, generator=generator)


PLANE = {"moons": moons, "rings": rings, "gaussians": gaussians}


def w2_squared(a: Tensor, b: Tensor) -> float:
    """W_2^2 between two samples of as many points, exactly."""
    a, b = a.double().cpu(), b.double().cpu()
    index = flows.Optimal()(a, b, {}, a[:, 0])
    return float(flows.transport_cost(a[index], b).mean())


def problem(name: str, device: torch.device, seed: int, quick: bool) -> Problem:
    """A problem by its name, ready to run. A quick one shows that everything works, and nothing else."""
    return _digits(device, seed, quick) if name == "digits" else _plane(name, device, seed, quick)


def _plane(name: str, device: torch.device, seed: int, quick: bool) -> Problem:
    draw, generator = PLANE[name], torch.Generator().manual_seed(seed)
    budget = Budget(4000, 3000, 3000, 512, 2e-3, 16384, 1000, 3)
    if quick:
        budget = Budget(20, 10, 10, 64, 2e-3, 256, 100, 2)
    real, other = (draw(budget.samples, generator) for _ in range(2))

    def batches() -> Iterator[Tensor]:
        while True:
            yield draw(budget.batch, generator).to(device)

    def judged(samples: Tensor) -> float:
        return w2_squared(samples, real)

    floor = w2_squared(other, real)
    return Problem(
        name, (2,), budget, lambda: PlaneNetwork().to(device), batches(), judged, "W2 squared", floor, real
    )  # fmt: skip


def _digits(device: torch.device, seed: int, quick: bool) -> Problem:
    budget = Budget(3000, 2000, 1500, 128, 2e-3, 16384, 1000, 4)
    if quick:
        budget = Budget(20, 10, 10, 64, 2e-3, 256, 100, 2)
    digits = digits_data.load(seed, device)
    judge = quality.train_judge(digits, steps=50 if quick else 500, seed=seed)
    indices = digits_data.batches(len(digits.images), budget.batch, seed, device)
    return Problem(
        "digits", digits_data.SHAPE, budget, lambda: DigitNetwork().to(device), (digits.images[i] for i in indices),
        lambda samples: judge.assess(samples).frechet, "Fréchet distance", judge.floor(seed), digits.images,
    )  # fmt: skip
