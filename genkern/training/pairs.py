"""Training on the pairs of a coupling from the disk: genkern.training.fit, an average, and one process or several."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from .. import check, ranks
from ..flows.pair_store import PairStore
from ..noise import Noise
from ..samplers.callback import bar
from .checkpoint import Checkpoint
from .ema import EMA
from .trainer import fit


class PairFitOptions(TypedDict, total=False):
    """How a network is trained on pairs.

    steps: optimiser steps, >= 1; default 10,000.
    batch_size: pairs a step, over all processes; default 256.
    lr, warmup, weight_decay, betas: as of training.fit; lr defaults to 2e-4.
    ema_decay: of the average that is returned, in [0, 1); default 0.999, less over the first steps.
    loss_options: further arguments of the loss, such as times=, kind=, weight=; reduction "mean" or "sum", over the
        whole batch.
    checkpoint_every: steps between two writes of a checkpoint, 0 for none; default 1000.
    """

    steps: int
    batch_size: int
    lr: float
    warmup: int
    weight_decay: float
    betas: tuple[float, float]
    ema_decay: float
    loss_options: Mapping[str, Any]
    checkpoint_every: int


DEFAULTS = {
    "steps": 10_000, "batch_size": 256, "lr": 2e-4, "ema_decay": 0.999, "loss_options": {}, "checkpoint_every": 1000,
}  # fmt: skip


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """PairFitOptions with their defaults. TypeError: an unknown option; ValueError: checkpoint_every < 0."""
    unknown = options.keys() - PairFitOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"fit: expected {', '.join(PairFitOptions.__annotations__)}, got {sorted(unknown)[0]!r}")
    check.integer("checkpoint_every", options.get("checkpoint_every", 0), 0)
    return {**DEFAULTS, **options}


def fit_pairs(
    network: nn.Module,
    loss: Callable[..., Tensor],
    store: PairStore,
    *,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | pathlib.Path | None = None,
    **options: Any,
) -> nn.Module:
    """Trains a network on a store of pairs, in place.

    Where torch.distributed is initialised every process has its part of each batch, and gradients are averaged by
    DistributedDataParallel; noise and times are functions of a sample's place in the whole batch: of "stratified" times
    the strata are the whole batch's. So the training is the same for any number of processes, up to rounding, but for
    what a process does with its part alone: a coupling that is not flows.Gathered, and a network's own random numbers
    (dropout) and statistics of a batch.

    Args:
        network: those of its parameters that require a gradient are trained, at least one.
        loss: loss(network, x1, x0, cond=, noise=, **options["loss_options"]), such as that of RectifiedFlow.
        store: complete.
        seed: of the batches' order and of the losses' noise.
        progress: show a bar (tqdm).
        checkpoint: a file, written every `checkpoint_every` steps: the same call goes on after the last of them, and
            ends, in one process on one machine, with the bits of a call that was not cut off. It stays at the end.
            A loss that is a method is told by its name: what its object holds is the caller's to keep.
        options: PairFitOptions.

    Returns:
        The average of the network, in eval mode, without gradients.

    Raises:
        ValueError: the store is not complete; batch_size is no multiple of the number of processes; a reduction of
            "none"; a checkpoint of other pairs, options or another network, which are named; as of fit().
        TypeError: an unknown option.
        FloatingPointError: as of fit(); in every process at the same step.
    """
    asked = checked_options(options)
    missing = store.missing()
    if missing:
        raise ValueError(f"pairs: expected all {store.shards} shards in {store.path}, {len(missing)} are missing")
    every = asked.pop("checkpoint_every")
    told = {} if checkpoint is None else _told(network, loss, store, {"seed": seed, **asked})
    steps, batch_size, decay = asked.pop("steps"), asked.pop("batch_size"), asked.pop("ema_decay")
    further = _of_whole(asked.pop("loss_options"), batch_size)
    rank, world_size = ranks.placed(None, None)
    if check.integer("batch_size", batch_size, 1) % world_size:
        raise ValueError(f"batch_size: expected a multiple of {world_size}, the processes, got {batch_size}")
    size = batch_size // world_size
    device = next(network.parameters()).device
    average = EMA(network, decay)
    called: nn.Module = network
    if world_size > 1:
        called = nn.parallel.DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    # DDP averages the processes' gradients, which is the whole batch's for a mean, and 1 / world_size of it for a sum.
    scale = world_size if further.get("reduction") == "sum" else 1
    places = torch.arange(rank * size, (rank + 1) * size, device=device)

    def of_batch(pairs: Any, step: int) -> Tensor:
        noise = Noise(seed, stream=step, sample_ids=places)
        return scale * loss(called, pairs.x1, pairs.x0, cond=pairs.cond, noise=noise, **further)

    def update(step: int) -> None:
        average.update(network, decay=min(decay, (1 + step) / (10 + step)))  # the initial weights are no part of it

    kept = None
    if checkpoint is not None and every:
        kept = Checkpoint(checkpoint, told, network=network, average=average, every=every)
    with bar(progress, steps, "train") as tick:

        def batches(start: int) -> Iterator[Any]:
            tick(start)
            return store.batches(size, seed=seed, start=start, device=device)

        fit(
            [parameter for parameter in network.parameters() if parameter.requires_grad], of_batch, batches,
            steps=steps, after_step=update, progress=lambda _: tick(), checkpoint=kept, **asked,
        )  # fmt: skip
    return average.module.eval()


def _told(network: nn.Module, loss: Any, store: PairStore, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a training is a function of, for its checkpoint."""
    from ..methods._pair_settings import digest, told  # genkern.methods imports this module

    frozen = sorted(name for name, parameter in network.named_parameters() if not parameter.requires_grad)
    of = {"pairs": store.fingerprint, "network": digest(network), "frozen": frozen, "loss": told(loss)}
    return {**of, **{name: told(value) for name, value in options.items()}}


def _of_whole(options: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """The loss's options, with the strata of the whole batch. ValueError: a reduction that gives no number."""
    from ..methods.times import Stratified  # genkern.methods imports this module

    found = dict(options)
    check.choice("reduction", found.get("reduction", "mean"), ("mean", "sum"))
    times = found.get("times")
    if times == "stratified":
        times = Stratified()
    if isinstance(times, Stratified) and times.strata is None:
        found["times"] = dataclasses.replace(times, strata=batch_size)
    return found
