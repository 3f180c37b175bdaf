"""The four families on the digits: how each is trained, and the ways to sample it.

A family's network is the running average of the trained one. Every loss takes the stream family << 32 | step of one
seed, so that no two of them see the same noise and a run is a function of its seed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from .. import methods
from ..noise import Noise
from ..training import EMA, trainer
from . import data
from .networks import DigitNetwork
from .setup import Setup

Progress = Callable[[int], None]
LossFn = Callable[[torch.nn.Module, torch.Tensor, Noise], torch.Tensor]

EMA_DECAY = 0.995
# Images have 17 levels, 0.125 apart: sigma_min = 0.02 cannot be seen. Their standard deviation is 0.75, so that at
# sigma_max = 20 a pixel is noise to 99.9% of its variance; the customary 80 would spend times where nothing happens.
SIGMA_MIN, SIGMA_MAX = 0.02, 20.0
# N of (13.30). Its 12 intervals split evenly into 2, 3 and 4, so that multistep sampling visits times that training saw
# (measured: at N = 12 two calls, the second between two of those times, were worse than one; at 13 they are better).
DISTILLATION_TIMES = 13
TARGET_DECAY = 0.95  # of theta^- in (13.32)
PAIR_STEPS = 16  # Heun steps of a pair of the reflow


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network and how its training went. losses: one a step."""

    network: torch.nn.Module
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class Stage:
    """The training of one network. train: called with what to call after every step; text: what a reader sees."""

    key: str
    text: str
    steps: int
    train: Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A way to draw samples at several numbers of network calls.

    draw: (calls, shape, seed) -> samples.
    """

    name: str
    calls: tuple[int, ...]
    draw: Callable[[int, tuple[int, ...], int], torch.Tensor]


class Families:
    """Trains networks one after another; each stage reads what those before it left.

    Args:
        digits: the data.
        setup: seed, device, budget.
    """

    def __init__(self, digits: data.Digits, setup: Setup) -> None:
        self.digits, self.seed, self.budget = digits, setup.seed, setup.budget
        self.diffusion = methods.Diffusion(schedule="squared_cosine", timesteps=1000)
        self.flow = methods.FlowMatching(sigma_min=0.01)
        self.rectified = methods.RectifiedFlow()
        self.consistency = methods.Consistency(SIGMA_MIN, SIGMA_MAX, sigma_data=digits.std)
        b = setup.budget
        self.steps = {"diffusion": b.train, "flow_matching": b.train, "rectified_flow": b.train}
        self.steps |= {"two_rectified": b.reflow, "teacher": b.train, "consistency": b.distill}
        self.trained: dict[str, Trained] = {}

    def stages(self) -> list[Stage]:
        """The training of every network, in order."""
        train = {
            "diffusion": ("diffusion (DDPM and DDIM)", self._diffusion),
            "flow_matching": ("flow matching", self._flow_matching),
            "rectified_flow": ("rectified flow", self._rectified_flow),
            "two_rectified": ("2-rectified flow (reflow)", self._two_rectified),
            "teacher": ("teacher of the consistency model", self._teacher),
            "consistency": ("consistency model (distilled)", self._consistency),
        }
        return [Stage(key, text, self.steps[key], run) for key, (text, run) in train.items()]

    def samplers(self) -> list[Sampler]:
        """Every sampler of the pictures, once all networks are trained."""

        def of(key: str, method: Any, halves: int = 1, **options: Any) -> Callable[..., torch.Tensor]:
            return lambda calls, shape, seed: method.sample(
                self.trained[key].network, shape, steps=calls // halves, seed=seed, **options
            )

        def teacher(calls: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
            # The last step, to 0, is Euler's, of one call; the others are Heun's, of two.
            network, steps = self.trained["teacher"].network, (calls + 1) // 2
            return self.consistency.sample_ode(network, shape, steps=steps, to_zero=True, seed=seed)

        flow, rectified, few = self.flow, self.rectified, (1, 2, 5, 10, 20, 50)
        return [
            Sampler("DDPM", (5, 10, 20, 50, 100), of("diffusion", self.diffusion, sampler="ddpm", clip=1.0)),
            Sampler("DDIM", (2, 5, 10, 20, 50), of("diffusion", self.diffusion, sampler="ddim", clip=1.0)),
            Sampler("Flow matching, Euler", few, of("flow_matching", flow)),
            Sampler("Flow matching, Heun", (2, 4, 10, 20, 50), of("flow_matching", flow, halves=2, sampler="heun")),
            Sampler("Rectified flow, Euler", few, of("rectified_flow", rectified)),
            Sampler("2-rectified flow, Euler", (1, 2, 5, 10, 20), of("two_rectified", rectified)),
            Sampler("Consistency", (1, 2, 4), of("consistency", self.consistency, clip=1.0)),
            Sampler("Consistency's teacher", (5, 9, 19, 35), teacher),
        ]

    def _diffusion(self, progress: Progress) -> None:
        network = self._network(time_scale=1.0 / self.diffusion.timesteps)
        self._fit("diffusion", network, lambda n, x, noise: self.diffusion.loss(n, x, noise=noise), progress)

    def _flow_matching(self, progress: Progress) -> None:
        self._fit("flow_matching", self._network(), lambda n, x, noise: self.flow.loss(n, x, noise=noise), progress)

    def _rectified_flow(self, progress: Progress) -> None:
        rectified = self.rectified
        self._fit("rectified_flow", self._network(), lambda n, x, noise: rectified.loss(n, x, noise=noise), progress)

    def _two_rectified(self, progress: Progress) -> None:
        """One round of Algorithm 1 on the rectified coupling, from the first flow's weights."""
        first = self.trained["rectified_flow"].network
        shape, noise = (self.budget.pairs, *data.SHAPE), Noise(self.seed, stream=99 << 32)
        x0, x1 = self.rectified.pairs(first, shape, steps=PAIR_STEPS, sampler="heun", noise=noise, batch_size=1024)
        pairs = torch.stack([x0, x1], dim=1)
        self._fit(
            "two_rectified",
            _trainable(first),
            lambda n, pair, noise: self.rectified.loss(n, pair[:, 1], x0=pair[:, 0], noise=noise),
            progress,
            source=pairs,
        )

    def _teacher(self, progress: Progress) -> None:
        """The denoiser. sigma is drawn relative to the data's deviation as by Karras et al., whose is 0.5."""
        mean = -1.2 + math.log(self.digits.std / 0.5)

        def loss(n: torch.nn.Module, x: torch.Tensor, noise: Noise) -> torch.Tensor:
            return self.consistency.teacher_loss(n, x, mean=mean, noise=noise)

        self._fit("teacher", self._network(), loss, progress)

    def _consistency(self, progress: Progress) -> None:
        """Distillation (13.32) with Heun steps, from the teacher's weights."""
        teacher = self.trained["teacher"].network
        student = _trainable(teacher)
        target = EMA(student, TARGET_DECAY)

        def loss(n: torch.nn.Module, x: torch.Tensor, noise: Noise) -> torch.Tensor:
            return self.consistency.loss(
                n, x, teacher=teacher, target=target.module, n_steps=DISTILLATION_TIMES, noise=noise
            )

        self._fit("consistency", student, loss, progress, lr=1e-3, after_step=lambda: target.update(student))

    def _network(self, time_scale: float = 1.0) -> torch.nn.Module:
        """A new network; its weights are a function of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return DigitNetwork(time_scale=time_scale).to(self.digits.images.device)

    def _fit(
        self,
        key: str,
        network: torch.nn.Module,
        loss: LossFn,
        progress: Progress,
        *,
        source: torch.Tensor | None = None,
        lr: float = 2e-3,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        family = list(self.steps).index(key)
        images = self.digits.images if source is None else source
        average = EMA(network, EMA_DECAY)

        def loss_fn(index: torch.Tensor, step: int) -> torch.Tensor:
            return loss(network, images[index], Noise(self.seed, stream=family << 32 | step))

        def update(step: int) -> None:
            # A short memory at first: the initial weights are no part of the average.
            average.update(network, decay=min(EMA_DECAY, (1 + step) / (10 + step)))
            if after_step is not None:
                after_step()

        indices = data.batches(len(images), self.budget.batch, self.seed + family, images.device)
        losses = trainer.fit(
            network.parameters(), loss_fn, indices, steps=self.steps[key], lr=lr, after_step=update, progress=progress
        )
        self.trained[key] = Trained(average.module.eval(), losses)


def _trainable(network: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(network).requires_grad_(True).train()
