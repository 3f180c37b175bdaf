"""Where a training stands, on disk, so that one that was cut off goes on after the last step that was kept.

    state after step k = (parameters and buffers, their average, the optimiser's moments and count, losses 0 .. k - 1,
                          the states of torch's generators)
    state after step k + 1 = F(k, state after step k)

Where F has no other arguments, as where step k's batch and noise are functions of k (PairStore.batches(start=k),
Noise(seed, stream=k)), a training that was cut off ends with the bits of one that was not, on the same machine.

The file is safetensors: whole or absent (genkern.files), with the SHA-256 of its tensors, and with what the training is
a function of, by which another one is refused.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import check, files, ranks
from .ema import EMA

LOSSES, CPU, CUDA, OPTIMIZER = "losses", "generator.cpu", "generator.cuda", "optimizer"  # names in the file
KINDS = ("parameters", "buffers")


class Checkpoint:
    """The state of a training of one network, for fit(checkpoint=).

    What is not in it: what a network, a loss or a coupling keeps elsewhere than in parameters and buffers; of several
    processes, the generators. Of several processes the first one writes, and each reads: the file is one that all see.

    Args:
        path: the file, of one training; it stays when that ends.
        settings: what the training is a function of, by name: numbers, strings, lists and mappings of them.
        network: whose parameters are trained.
        average: of the network.
        every: steps between two writes, >= 1. Each takes about four times the network's size on disk, and waits for
            the device.

    Raises:
        ValueError: every < 1; a network without parameters. ImportError: safetensors is not installed.
    """

    def __init__(
        self, path: str | pathlib.Path, settings: Mapping[str, Any], *, network: nn.Module, average: EMA | None = None,
        every: int = 1000,
    ) -> None:  # fmt: skip
        files.safetensors()
        self.path, self.every = pathlib.Path(path), check.integer("every", every, 1)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as they will be read
        self._network, self._average = network, average
        first = next(network.parameters(), None)
        if first is None:
            raise ValueError("network: expected parameters, got none")
        self._device = first.device

    def due(self, done: int, steps: int) -> bool:
        """Whether the state is written after so many steps of all."""
        return done % self.every == 0 and done < steps

    def save(self, optimizer: torch.optim.Optimizer, losses: Sequence[Tensor]) -> None:
        """Writes the state, in the first of several processes. losses: of all steps so far."""
        rank, world_size = ranks.placed(None, None)
        if rank:
            return
        tensors = {**self._modules(), LOSSES: torch.stack(list(losses))}
        for k, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{OPTIMIZER}.{k}.{name}": value for name, value in state.items()}
        if world_size == 1:
            tensors[CPU] = torch.get_rng_state()
            if self._device.type == "cuda":
                tensors[CUDA] = torch.cuda.get_rng_state(self._device)
        files.save_tensors(tensors, self.path, json.dumps(self.settings))

    def restore(self, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
        """Takes up the file's state; nothing where it is missing, or, with a warning, where it is not whole.

        Args:
            optimizer: of the network's parameters, new.
            steps: of the training, >= those that are done.

        Returns:
            The losses of the steps that are done, on the network's device: as many as there were.

        Raises:
            ValueError: a file of other settings, which are named, of other tensors, or of more steps; one that cannot
                be read, or that one of several processes does not see. Then nothing is changed in any of them.
        """
        there, trouble = ranks.of_first(self._there, self._device)
        if trouble:
            raise ValueError(f"checkpoint: expected a file, got {self.path}: {trouble}")
        if there is None:
            if self.path.exists():
                warnings.warn(
                    f"checkpoint: expected a whole file, got {self.path}, which is cut off or has other bytes than "
                    "were written; the training starts from its beginning",
                    stacklevel=2,
                )
            return []
        words = files.differences(there, self.settings)
        if words:
            raise ValueError(
                f"checkpoint: expected one of the same training, {self.path} has {words}; without that file the "
                "training starts from its beginning"
            )
        with ranks.all_or_none("checkpoint", self._device):
            found, states = self._checked(optimizer, steps)
        self._take(found)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        return list(found[LOSSES].clone().to(self._device))

    def _checked(
        self, optimizer: torch.optim.Optimizer, steps: int
    ) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
        """The file's tensors and the optimiser's states among them. ValueError: they are not those of this training."""
        read = files.read_tensors(self.path)
        if read is None:
            raise ValueError(f"checkpoint: expected a file that every process sees, this one sees no {self.path}")
        _, found = read
        states, like = _states(found), self._modules()
        parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
        for k, state in states.items():  # moments are like their parameter, counts have no dimension
            of_k = parameters.get(k, torch.empty(()))
            like |= {f"{OPTIMIZER}.{k}.{name}": of_k for name, value in state.items() if value.ndim}
        for name, tensor in like.items():
            if name not in found or found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
                raise ValueError(f"checkpoint: expected tensors of this network, {self.path} has another {name}")
        if len(found[LOSSES]) > steps:
            raise ValueError(f"steps: expected {len(found[LOSSES])} or more, as {self.path} has, got {steps}")
        return found, states

    def _there(self) -> tuple[dict[str, Any] | None, str]:
        """The settings of the file, where it is whole; and why it could not be read, "" where it could."""
        try:
            read = files.read_tensors(self.path)
        except OSError as error:
            return None, str(error)
        with contextlib.suppress(ValueError):
            found = None if read is None else json.loads(read[0])
            if isinstance(found, dict):
                return found, ""
        return None, ""

    def _modules(self) -> dict[str, Tensor]:
        """Tensors of the network, and copies of its average's, by name."""
        own = {"parameters": dict(self._network.named_parameters()), "buffers": dict(self._network.named_buffers())}
        of_average = {} if self._average is None else self._average.state_dict()
        return _named("network", own) | _named("average", of_average)

    @torch.no_grad()
    def _take(self, found: Mapping[str, Tensor]) -> None:
        """Writes what a file has into the network, its average, and, in one process alone, torch's generators."""
        if self._average is not None:
            state = self._average.state_dict()
            for kind in KINDS:
                state[kind] = {name: found[f"average.{kind}.{name}"] for name in state[kind]}
            self._average.load_state_dict(state)
        for name, tensor in self._modules().items():
            if name.startswith("network."):
                tensor.copy_(found[name])
        if ranks.placed(None, None)[1] == 1 and CPU in found:
            torch.set_rng_state(found[CPU])
            if self._device.type == "cuda" and CUDA in found:
                torch.cuda.set_rng_state(found[CUDA], self._device)


def _named(of: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{of}.{kind}.{name}": t for kind in KINDS for name, t in state.get(kind, {}).items()}


def _states(found: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The optimiser's tensors by the number of their parameter."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        if name.startswith(f"{OPTIMIZER}."):
            _, k, kind = name.split(".", 2)
            states.setdefault(int(k), {})[kind] = tensor.clone()  # the optimiser may not write the file's memory
    return states
