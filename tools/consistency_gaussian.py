"""Prints how near the learned one-step functions of Gaussian data come to the exact ones, for every way of training.

The data are N(0, 0.8^2), where the flow's map from noise to data is a multiplication, known exactly. A small network of
(x, t, r) is trained by each loss on the same number of batches; the table has the root mean square of the difference
from the exact map over the data's standard deviation, and the seconds of the training.

    python tools/consistency_gaussian.py
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import genkern as gk
from genkern.methods import curricula
from genkern.noise import Noise
from genkern.training import EMA, trainer

STD, STEPS, BATCH, SAMPLES, SEED = 0.8, 4000, 256, 10_000, 0
CONSISTENCY, TRIG, MEAN = gk.Consistency(), gk.TrigFlow(), gk.MeanFlow()


class Small(nn.Module):
    """F(x, t), or u(x, t, r)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        return self.layers(torch.stack([x[:, 0], t, t if r is None else r], 1))


class Teacher:
    """F of the exact denoiser, x STD^2 / (STD^2 + sigma^2)."""

    def __call__(self, x: Tensor, c_noise: Tensor) -> Tensor:
        f, sigma = CONSISTENCY.teacher, (4.0 * c_noise).exp()[:, None]
        return x / f.c_in(sigma) * (STD**2 / (STD**2 + sigma**2) - f.c_skip(sigma)) / f.c_out(sigma)


Loss = Callable[[nn.Module, nn.Module, Tensor, int, Noise], Tensor]


def of_consistency(model: nn.Module, z: Tensor) -> Tensor:
    """The difference of one step from sigma_max from the exact function."""
    c = CONSISTENCY
    exact = math.sqrt((STD**2 + c.sigma_min**2) / (STD**2 + c.sigma_max**2))
    return c.sample(model, noise=c.sigma_max * z) - c.sigma_max * z * exact


def of_trig(model: nn.Module, z: Tensor) -> Tensor:
    start, (cos, sin) = TRIG.sigma_data * z, (math.cos(TRIG.stop), math.sin(TRIG.stop))
    return TRIG.sample(model, noise=start) - start * STD / math.hypot(cos * STD, sin * TRIG.sigma_data)


def of_mean(model: nn.Module, z: Tensor) -> Tensor:
    return MEAN.sample(model, x0=z) - STD * z


# (name, loss of (student, its average, data, step, noise), steps as a diffusion model before, error)
WAYS: list[tuple[str, Loss, bool, Callable[[nn.Module, Tensor], Tensor]]] = [
    ("CD, exact teacher", lambda m, a, x, k, n: CONSISTENCY.loss(m, x, teacher=Teacher(), target=a, noise=n), False,
     of_consistency),
    ("CT, N = 18", lambda m, a, x, k, n: CONSISTENCY.training_loss(m, x, target=a, noise=n), False, of_consistency),
    ("iCT", lambda m, a, x, k, n: CONSISTENCY.improved_loss(m, x, n_steps=curricula.ict_steps(k, STEPS, 10, 160),
                                                            noise=n), False, of_consistency),
    ("ECT", lambda m, a, x, k, n: CONSISTENCY.tuning_loss(m, x, stage=curricula.ect_stage(k, STEPS // 8), noise=n),
     True, of_consistency),
    ("sCM, training", lambda m, a, x, k, n: TRIG.loss(m, x, warmup=min(1.0, 4 * k / STEPS), noise=n), False, of_trig),
    ("MeanFlow, squared error", lambda m, a, x, k, n: MEAN.loss(m, x, adaptive=(0.0, 1.0), noise=n), False, of_mean),
    ("MeanFlow, p = 1", lambda m, a, x, k, n: MEAN.loss(m, x, noise=n), False, of_mean),
]  # fmt: skip


def trained(loss: Loss, tuned: bool) -> tuple[nn.Module, float]:
    """A student, and the seconds that its loss took. Batches and noise are functions of the seed."""
    torch.manual_seed(SEED)
    model = Small()

    def batches() -> Any:
        g = torch.Generator().manual_seed(SEED)
        while True:
            yield STD * torch.randn(BATCH, 1, generator=g)

    if tuned:
        trainer.fit(
            model.parameters(), lambda x, k: CONSISTENCY.teacher_loss(model, x, noise=Noise(SEED + 1, k)), batches(),
            steps=STEPS,
        )  # fmt: skip
    average, begin = EMA(model, 0.95), time.perf_counter()
    trainer.fit(
        model.parameters(), lambda x, k: loss(model, average.module, x, k, Noise(SEED, k)), batches(), steps=STEPS,
        after_step=lambda k: average.update(model),
    )  # fmt: skip
    return model, time.perf_counter() - begin


def main() -> None:
    print(f"{STEPS} steps of {BATCH} samples on the CPU, torch {torch.__version__}\n")
    print("| training | error / standard deviation | s |\n| --- | ---: | ---: |")
    z = torch.randn(SAMPLES, 1, generator=torch.Generator().manual_seed(SEED + 2))
    for name, loss, tuned, error in WAYS:
        model, seconds = trained(loss, tuned)
        with torch.no_grad():
            found = float(error(model, z).square().mean().sqrt()) / STD
        print(f"| {name} | {found:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
