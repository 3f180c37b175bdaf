"""How tools/consistency_table.py trains and samples a network of few calls, each in every way that genkern has.

    teacher          F of a denoiser (EDM), sampled by Heun's method
    CD               distillation (13.32) with Heun steps of the teacher, by four distances
    CT, iCT          consistency training without a teacher, from new weights
    ECT              consistency training from the teacher's weights
    sCM              continuous time, from the teacher's weights: distillation from it, and training without it
    MeanFlow         the average velocity, from new weights

sCM's networks are the teacher's: at tan(t) = sigma / sd TrigFlow's input x / sd is EDM's c_in x, and its F is -F, so

    F_Trig(x / sd, t) = -F(x / sd, ln(sd tan t) / 4).

Every student is sampled as a running average of itself. A way with n calls is asked at the upper n of n + 1 times
(13.30), sCM at their angles, MeanFlow on an even grid.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from consistency_tasks import Task
from torch import Tensor, nn

import genkern as gk
from genkern.demo import data
from genkern.methods import curricula
from genkern.noise import Noise
from genkern.training import EMA, trainer

AVERAGE, LR, SCM_LR = 0.995, 1e-3, 3e-4
CD_DECAY = 0.95  # of the target in (13.32)
# Neighbouring times end further apart than in the papers, whose trainings are hundreds of times as long: what a student
# knows at small times has to reach the large ones, through as many neighbours as lie between. Chosen for patches, where
# ECT by 8 stages and iCT by s1 = 160 were worse at 4 calls than at 1; on digits those were the better
# ones. sCM's rate, of 1e-3 and 3e-4, is the better one for 4 calls on patches, and for distillation on both.
CT_S1, CT_MU0, ICT_S1, ECT_STAGES = 16, 0.9, 40, 4
# What results depend on beside the command's arguments.
SETTINGS = {"average": AVERAGE, "lr": LR, "scm_lr": SCM_LR, "cd_decay": CD_DECAY, "ct_s1": CT_S1, "ct_mu0": CT_MU0,
            "ict_s1": ICT_S1, "ect_stages": ECT_STAGES}  # fmt: skip
TEACHER_STEPS = 18  # Heun's, the last one Euler's: 35 calls
TEACHER_CALLS = 2 * TEACHER_STEPS - 1


class OnCircle(nn.Module):
    """TrigFlow's F out of EDM's.

    Args:
        inner: EDM's F, called as inner(c_in x, c_noise).
        sd: the data's deviation.
    """

    def __init__(self, inner: nn.Module, sd: float) -> None:
        super().__init__()
        self.inner, self.sd = inner, sd

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.inner(x, (self.sd * t.tan()).log() / 4.0)


class Run:
    """A data set, its methods, and the teacher once it is trained."""

    def __init__(self, task: Task, steps: int, teacher_steps: int, batch: int, seed: int) -> None:
        self.task, self.steps, self.teacher_steps, self.batch, self.seed = task, steps, teacher_steps, batch, seed
        self.consistency = gk.Consistency(*task.sigma, sigma_data=task.std)
        self.trig = gk.TrigFlow(sigma_data=task.std, sigma_max=task.sigma[1])
        self.mean_flow = gk.MeanFlow()
        # Means of ln sigma are given in the papers for data of deviation 0.5.
        self.shift = math.log(task.std / 0.5)
        self.teacher: nn.Module | None = None

    def upper_times(self, calls: int) -> np.ndarray[Any, Any]:
        """The upper `calls` of the times (13.30), decreasing."""
        return self.consistency.times(calls + 1)[::-1][:-1]


Loss = Callable[[Run, nn.Module, nn.Module, Tensor, int, Noise], Tensor]  # run, student, target, data, step, noise
Draw = Callable[[Run, nn.Module, tuple[int, ...], int, int], Tensor]  # run, network, shape, calls, seed


@dataclasses.dataclass(frozen=True)
class Way:
    """How a network is trained and sampled.

    start: a new network, or one with the teacher's weights.   decay: of the target's running average by (run, step);
    None: the loss needs no target.   function: it is f of (13.29), so that its self-consistency is measured.
    lr: the peak of the learning rate.
    """

    name: str
    start: Callable[[Run], nn.Module]
    loss: Loss
    draw: Draw
    calls: tuple[int, ...] = (1, 2, 4)
    decay: Callable[[Run, int], float] | None = None
    function: bool = False
    lr: float = LR


def trained(run: Run, way: Way, number: int, net: nn.Module) -> tuple[nn.Module, float]:
    """The running average of a network after its training, and the training's seconds.

    number: of the way: of which the noise and the order of the batches are a function.
    """
    images, steps = run.task.images, run.teacher_steps if run.teacher is None else run.steps
    average, target = EMA(net, AVERAGE), EMA(net, 0.0)

    def loss(index: Tensor, step: int) -> Tensor:
        return way.loss(run, net, target.module, images[index], step, Noise(run.seed, stream=number << 32 | step))

    def update(step: int) -> None:
        # A short memory at first: the initial weights are no part of the average.
        average.update(net, decay=min(AVERAGE, (1 + step) / (10 + step)))
        if way.decay is not None:
            target.update(net, decay=way.decay(run, step))

    def progress(done: int) -> None:
        if done % max(1, steps // 4) == 0:
            print(f"  {way.name}: {done} of {steps} steps, {time.perf_counter() - begin:.0f} s", flush=True)

    indices = data.batches(len(images), run.batch, run.seed + number, images.device)
    begin = time.perf_counter()
    trainer.fit(net.parameters(), loss, indices, steps=steps, lr=way.lr, after_step=update, progress=progress)
    seconds = time.perf_counter() - begin  # fit() reads its losses at the end, and so has waited for the device
    return average.module.eval(), seconds


def _new(run: Run) -> nn.Module:
    return run.task.network()


def _of_teacher(run: Run) -> nn.Module:
    return copy.deepcopy(run.teacher).requires_grad_(True).train()  # type: ignore[union-attr]


def _on_circle(run: Run) -> nn.Module:
    return OnCircle(_of_teacher(run), run.task.std)


def _draw_function(run: Run, net: nn.Module, shape: tuple[int, ...], calls: int, seed: int) -> Tensor:
    return run.consistency.sample(net, shape, times=run.upper_times(calls), seed=seed)


def _draw_trig(run: Run, net: nn.Module, shape: tuple[int, ...], calls: int, seed: int) -> Tensor:
    return run.trig.sample(net, shape, times=np.arctan(run.upper_times(calls) / run.task.std), seed=seed)


def _draw_mean_flow(run: Run, net: nn.Module, shape: tuple[int, ...], calls: int, seed: int) -> Tensor:
    return run.mean_flow.sample(net, shape, steps=calls, seed=seed)


def _draw_teacher(run: Run, net: nn.Module, shape: tuple[int, ...], calls: int, seed: int) -> Tensor:
    return run.consistency.sample_ode(net, shape, steps=(calls + 1) // 2, to_zero=True, seed=seed)


def _teacher_loss(run: Run, net: nn.Module, target: nn.Module, x: Tensor, step: int, noise: Noise) -> Tensor:
    return run.consistency.teacher_loss(net, x, mean=-1.2 + run.shift, noise=noise)


def _cd(name: str, distance: Callable[[Run], dict[str, Any]]) -> Way:
    def loss(run: Run, net: nn.Module, target: nn.Module, x: Tensor, step: int, noise: Noise) -> Tensor:
        return run.consistency.loss(
            net, x, teacher=run.teacher, target=target, n_steps=run.task.times, noise=noise, **distance(run)
        )

    return Way(f"CD, {name}", _of_teacher, loss, _draw_function, decay=lambda run, step: CD_DECAY, function=True)


def _ct_loss(run: Run, net: nn.Module, target: nn.Module, x: Tensor, step: int, noise: Noise) -> Tensor:
    n_steps = curricula.ct_steps(step, run.steps, s1=CT_S1)
    return run.consistency.training_loss(net, x, target=target, n_steps=n_steps, noise=noise)


def _ct_decay(run: Run, step: int) -> float:
    return curricula.ct_decay(step, run.steps, s1=CT_S1, mu0=CT_MU0)


def _ict_loss(run: Run, net: nn.Module, target: nn.Module, x: Tensor, step: int, noise: Noise) -> Tensor:
    n_steps = curricula.ict_steps(step, run.steps, s1=ICT_S1)
    return run.consistency.improved_loss(net, x, n_steps=n_steps, mean=-1.1 + run.shift, noise=noise)


def _ect_loss(run: Run, net: nn.Module, target: nn.Module, x: Tensor, step: int, noise: Noise) -> Tensor:
    stage = curricula.ect_stage(step, max(1, run.steps // ECT_STAGES))
    return run.consistency.tuning_loss(net, x, stage=stage, mean=-1.1 + run.shift, noise=noise)


def _scm(name: str, distilled: bool) -> Way:
    def loss(run: Run, net: nn.Module, target: nn.Module, x: Tensor, step: int, noise: Noise) -> Tensor:
        teacher = OnCircle(run.teacher, run.task.std) if distilled and run.teacher is not None else None
        warmup = min(1.0, 4.0 * step / run.steps)
        return run.trig.loss(net, x, teacher=teacher, warmup=warmup, mean=-1.0 + run.shift, noise=noise)

    return Way(f"sCM, {name}", _on_circle, loss, _draw_trig, lr=SCM_LR)


def _mean_flow_loss(run: Run, net: nn.Module, target: nn.Module, x: Tensor, step: int, noise: Noise) -> Tensor:
    return run.mean_flow.loss(net, x, noise=noise)


TEACHER = Way("teacher (EDM), Heun", _new, _teacher_loss, _draw_teacher, calls=(TEACHER_CALLS,))
WAYS = (
    _cd("L1", lambda run: {"kind": "l1"}),
    _cd("L2", lambda run: {"kind": "l2"}),
    _cd("pseudo-Huber", lambda run: {"kind": "pseudo_huber"}),
    _cd("features", lambda run: {"metric": run.task.metric}),
    Way("CT", _new, _ct_loss, _draw_function, decay=_ct_decay, function=True),
    Way("iCT", _new, _ict_loss, _draw_function, function=True),
    Way("ECT", _of_teacher, _ect_loss, _draw_function, function=True),
    _scm("distillation", True),
    _scm("training", False),
    Way("MeanFlow", lambda run: run.task.network(2), _mean_flow_loss, _draw_mean_flow),
)
