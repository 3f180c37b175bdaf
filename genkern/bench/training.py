"""Everything around the network in a training step of a consistency model, as cases: the inputs of the networks, the
loss, and the gradient of the student's output. Tensors stand for what the networks return, so that these cost nothing.

    CD     distillation (13.32) with a Heun step of the teacher, squared error
    ECT    two times of the same data and noise, pseudo-Huber distance over the gap of the times
    sCM    the tangent of TrigFlow, normalised, and the squared error; the forward-mode pass returns a tensor too

The baselines are in consistency_baselines.py; the written ones are compiled piece by piece, a graph between any two
calls of a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genkern as gk
from genkern.noise import Purpose

from .baselines import Normals, per_sample
from .consistency_baselines import (
    EPSILON,
    TANGENT_C,
    Continuous,
    Distillation,
    Found,
    MergedContinuous,
    MergedDistillation,
    MergedTuning,
    Tuning,
)
from .world import CAREFUL, COMPILED, GENKERN, TEXTBOOK, Case, World

TIMES, STAGE = 18, 4  # N of (13.30), ECT's a
CONSISTENCY, TRIG = gk.Consistency(), gk.TrigFlow()


class Returns(torch.autograd.Function):
    """A network that returns a tensor, and another one as its forward derivative."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, value: Tensor, tangent: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.tangent = inputs[2]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return ctx.tangent.view_as(ctx.tangent)


class Returned:
    """Networks that return tensors in turn, and keep what they were given."""

    def __init__(self, *values: Tensor) -> None:
        self.values, self.seen = values, list[Tensor]()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x)
        return self.values[len(self.seen) - 1]

    def taken(self) -> list[Tensor]:
        found, self.seen = self.seen, []
        return found


def with_gradient(loss: Tensor, m: Tensor, *seen: Tensor) -> Found:
    return (*seen, loss.detach(), *torch.autograd.grad(loss, m))


def distillation(world: World) -> Case:
    """CD."""
    x, m = world.state("x"), world.state("m").detach().requires_grad_()
    first, second, goal = (world.state(name) for name in ("first", "second", "goal"))
    normals, teacher = world.normals(world.noise.at(Purpose.TRAINING)), Returned(first, second)
    target, student = Returned(goal), Returned(m)
    n = torch.arange(len(x), device=world.device) % (TIMES - 1)
    grid = torch.tensor(CONSISTENCY.times(TIMES), dtype=torch.float32, device=world.device)
    t, s = (per_sample(grid[n + k], x) for k in (0, 1))

    def fused() -> Found:
        loss = CONSISTENCY.loss(student, x, teacher=teacher, target=target, n=n, n_steps=TIMES, noise=world.noise)
        (seen,), (_, lower), (last,) = student.taken(), teacher.taken(), target.taken()
        return with_gradient(loss, m, seen, lower, last)

    def step(normals: Normals, of: Any) -> Callable[[], Found]:
        def run() -> Found:
            x_s, seen = of.start(x, normals.like(x), s)
            x_hat, slope, lower = of.euler(x_s, first, t, s)
            x_hat, last = of.heun(x_s, x_hat, slope, second, t, s)
            return with_gradient(of.loss(m, x_s, goal, x_hat, t, s), m, seen, lower, last)

        return run

    compiled = _compiled(world, Distillation, ("start", "euler", "heun", "loss"))
    # Read and written: x, x_s, input; x_s, output, x_hat, input; x_s, x_hat, output, x_hat, input; m, goal, x_s, x_hat,
    # gradient.
    return world.case("CD, around the networks", "training", [x] * 17, {
        GENKERN: fused,
        TEXTBOOK: step(normals, Distillation),
        CAREFUL: step(normals, MergedDistillation),
        COMPILED: None if compiled is None else step(normals, compiled),
    })  # fmt: skip


def tuning(world: World) -> Case:
    """ECT."""
    x, m, goal = world.state("x"), world.state("m").detach().requires_grad_(), world.state("goal")
    normals, networks = world.normals(world.noise.at(Purpose.TRAINING)), Returned(goal, m)
    times = EPSILON + (2.0 * world.coefficient("t"))
    above = times.double() - EPSILON
    lower = EPSILON + above * (1.0 - (1.0 + 8.0 * torch.sigmoid(-above)) / 2.0**STAGE)
    t, r = per_sample(times, x), per_sample(lower, x)

    def fused() -> Found:
        loss = CONSISTENCY.tuning_loss(networks, x, stage=STAGE, t=times, noise=world.noise)
        seen_r, seen = networks.taken()
        return with_gradient(loss, m, seen, seen_r)

    def step(normals: Normals, of: Any) -> Callable[[], Found]:
        def run() -> Found:
            x_t, x_r, seen, seen_r = of.start(x, normals.like(x), t, r)
            return with_gradient(of.loss(m, goal, x_t, x_r, t, r), m, seen, seen_r)

        return run

    compiled = _compiled(world, Tuning, ("start", "loss"))
    # Read and written: x, both inputs; m, goal, x, gradient.
    return world.case("ECT, around the networks", "training", [x] * 7, {
        GENKERN: fused,
        TEXTBOOK: step(normals, Tuning),
        CAREFUL: step(normals, MergedTuning),
        COMPILED: None if compiled is None else step(normals, compiled),
    })  # fmt: skip


def continuous(world: World) -> Case:
    """sCM, consistency training. The forward-mode pass is torch's in all contenders, over the tensors that stand."""
    x, m = world.state("x"), world.state("m").detach().requires_grad_()
    still, turn = world.state("still"), world.state("turn")
    normals, t = world.normals(world.noise.at(Purpose.TRAINING)), world.coefficient("t")
    t_x, seen = per_sample(t, x), list[Tensor]()

    def student(x: Tensor, t: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(x)
            return m
        found: Tensor = Returns.apply(x, still, turn)
        return found

    def fused() -> Found:
        loss = TRIG.loss(student, x, t=t, tangent_c=TANGENT_C, noise=world.noise)
        return with_gradient(loss, m, seen.pop())

    def step(normals: Normals, of: Any) -> Callable[[], Found]:
        def run() -> Found:
            x_t, dx, given, along = of.start(x, normals.like(x), t_x)
            with torch.no_grad():
                value, tangent, *_ = torch.func.jvp(lambda x: student(x, t), (given,), (along,))
                g = of.tangent(x_t, dx, value, tangent, t_x)
            return with_gradient(of.loss(m, value, g), m, given)

        return run

    compiled = _compiled(world, Continuous, ("start", "tangent", "loss"))
    # Read and written: x, input, direction; x, still, turn, g; m, still, g, gradient.
    return world.case("sCM, around the network", "training", [x] * 11, {
        GENKERN: fused,
        TEXTBOOK: step(normals, Continuous),
        CAREFUL: step(normals, MergedContinuous),
        COMPILED: None if compiled is None else step(normals, compiled),
    })  # fmt: skip


def _compiled(world: World, of: type, names: tuple[str, ...]) -> Any:
    """The functions of a class, each compiled by itself; None where there is no working compiler."""
    found = {name: world.compiled(getattr(of, name)) for name in names}
    return None if None in found.values() else type("Compiled", (), {k: staticmethod(v) for k, v in found.items()})
