"""A training loop that a reader can see through: AdamW on minibatches, a warm-up and a cosine, one hook.

    lr(k) = lr min(1, (k + 1) / warmup) (1 + cos(pi k / steps)) / 2,      k = 0 .. steps - 1

It knows nothing of methods: the loss is a function of a batch and of the step's number, which the methods here take as
the stream of their noise, so that a run is a function of its seed.

Loshchilov, Hutter, "Decoupled weight decay regularization", arXiv:1711.05101; "SGDR", arXiv:1608.03983.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .. import check
from .._debug import debug
from .checkpoint import Checkpoint
from .guard import Guard


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The rate of step k = 0 .. steps - 1: linear up to `peak` over `warmup` steps, and a cosine down towards 0."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return peak * rise * (1.0 + math.cos(math.pi * step / steps)) / 2.0


def fit(
    params: Iterable[torch.nn.Parameter],
    loss_fn: Callable[[Any, int], torch.Tensor],
    batches: Iterable[Any] | Callable[[int], Iterable[Any]],
    *,
    steps: int,
    lr: float = 2e-3,
    warmup: int = 100,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.99),
    after_step: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
    guard: Guard | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Minimises loss_fn(batch, step) over the parameters, in place.

    Args:
        params: the parameters; each has to require a gradient.
        loss_fn: (batch, step) -> scalar loss with gradient.
        batches: at least `steps` batches, of whatever loss_fn takes; or a function of a step, giving those from it on,
            as a checkpoint needs.
        steps: optimiser steps, 1 or more.
        lr: the peak of the learning rate.
        warmup: steps of linear warm-up, 0 for none.
        weight_decay: AdamW's, decoupled from the gradient.
        betas: AdamW's averages of the gradient and of its square.
        after_step: called with the step's number after each update, for an EMA or a target network.
        progress: called with the number of steps done, after each.
        guard: watches the steps; default a new one, of all processes where torch.distributed is initialised: for one
            that trains by itself Guard(device, alone=True). Given to EMA.update() in after_step too, it keeps bad steps
            out of the average.
        checkpoint: what is kept on disk every few steps; where its file is there, the training goes on after the last
            step that it has.

    Returns:
        The loss of every step. It stays on the device until the end: reading it would wait for the device each step.

    Raises:
        ValueError: steps < 1 or warmup < 0; lr, weight_decay < 0; no parameters; fewer batches than steps; a guard that
            found a bad step before; a checkpoint of another training. TypeError: batches that are no function of a step
            beside a checkpoint.
        FloatingPointError: the loss or a gradient became NaN or infinite; the message says at which step, and where
            loss_fn, called once more on that step's batch under gk.debug(values=True), says which network had them,
            that too. The parameters are then those of the step before it. On the CPU it is raised in that step; on
            CUDA as soon as the host knows, a few steps later, up to which after_step is called. Of several processes
            all raise it in the same step (on CUDA eight later, or at the end), and none calls loss_fn again, whose
            collectives the others might not enter.
    """
    params = list(params)
    steps, warmup = check.integer("steps", steps, 1), check.integer("warmup", warmup, 0)
    lr, weight_decay = check.number("lr", lr, 0.0), check.number("weight_decay", weight_decay, 0.0)
    if not params:
        raise ValueError("params: expected at least one parameter, got none")
    if checkpoint is not None and not callable(batches):
        raise TypeError(f"batches: expected a function of a step beside a checkpoint, got {type(batches).__name__}")
    # One fused kernel a step instead of a few launches a tensor, where torch has it.
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)
    optimizer = torch.optim.AdamW(params, lr, betas=betas, weight_decay=weight_decay, fused=fused)
    if guard is None:
        guard = Guard(params[0].device)
    elif guard.finish() is not None or float(guard.flag):
        where = "" if guard.bad is None else f" at step {guard.bad}"
        raise ValueError(f"guard: expected one that has found no bad step, got one that found one{where}")
    losses: list[torch.Tensor] = [] if checkpoint is None else checkpoint.restore(optimizer, steps)
    start = len(losses)
    recent: collections.deque[Any] = collections.deque()  # batches of steps that the host has not looked at
    source = iter(batches(start) if callable(batches) else batches)
    for step in range(start, steps):
        try:
            batch = next(source)
        except StopIteration:
            raise ValueError(f"batches: expected at least {steps} (one a step), got {step}") from None
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup)
        loss = loss_fn(batch, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        losses.append(loss.detach())
        recent.append(batch)
        if guard.watch(step, loss, params) is not None:
            raise _not_finite(guard, losses, recent, loss_fn, steps)
        while len(recent) > guard.behind:
            recent.popleft()
        guard.step(optimizer)
        if after_step is not None:
            after_step(step)
        if checkpoint is not None and checkpoint.due(step + 1, steps):
            if guard.finish() is not None:  # the file stays as it was before the bad step
                raise _not_finite(guard, losses, recent, loss_fn, steps)
            checkpoint.save(optimizer, losses)
        if progress is not None:
            progress(step + 1)
    if guard.finish() is not None:
        raise _not_finite(guard, losses, recent, loss_fn, steps)
    found: list[float] = torch.stack(losses).double().tolist()
    return found


def _not_finite(
    guard: Guard, losses: list[torch.Tensor], recent: collections.deque[Any],
    loss_fn: Callable[[Any, int], torch.Tensor], steps: int,
) -> FloatingPointError:  # fmt: skip
    """The error of the guard's bad step, as exact as a second call of the loss makes it."""
    step = guard.bad
    assert step is not None
    value, reason = float(losses[step]), ""
    if guard.shared:
        return FloatingPointError(
            f"loss or gradient: expected finite numbers in every process, got others at step {step} of {steps} "
            f"(the loss of this process was {value:g})"
        )
    what = "loss" if not math.isfinite(value) else "gradient"
    got = f"got {value}" if what == "loss" else f"got others, of a loss of {value:g},"
    back = len(losses) - step
    if back <= len(recent):
        try:
            with debug(values=True), torch.enable_grad():  # a loss may ask for gradients itself
                loss_fn(recent[-back], step)
        except (FloatingPointError, ValueError) as error:  # a network's, or a coefficient's
            reason = f" ({error})"
        except Exception as error:  # of the second call alone, and no reason to hide what it was made for
            reason = f" (called once more, the loss raised {type(error).__name__}: {error})"
    return FloatingPointError(f"{what}: expected finite numbers, {got} at step {step} of {steps}{reason}")
