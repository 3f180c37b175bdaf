"""Exponential moving average of a model's parameters: a <- a + (1 - decay)(p - a), kept in float32.

In half precision the update is lost: (1 - decay)(p - a) is below half a unit in the last place of a. One fused launch
for all parameters; nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import check


class EMA:
    """The running average of a model.

    Args:
        model: averaged; not changed.
        decay: in [0, 1); 0 copies.

    Attributes:
        module: a copy of the model that holds the average (in the model's dtypes), without gradients: a sampler's
            model, or the target of Consistency.loss.

    Raises:
        ValueError: decay outside its range; a model of other parameters or buffers given to a method. Then nothing is
            changed.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay = _decay(decay)
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._held = list(self.module.parameters())
        self._wide = {k: p.detach().float() for k, p in enumerate(self._held) if _is_half(p)}

    @property
    def _average(self) -> list[Tensor]:
        """The average itself: the module's own parameters where they are precise enough, else float32 copies."""
        return [self._wide.get(k, p.detach()) for k, p in enumerate(self._held)]

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float | None = None) -> None:
        """Move toward the model's parameters; copy its buffers.

        Args:
            model: of the same parameters.
            decay: of this update alone.
        """
        decay = self.decay if decay is None else _decay(decay)
        self._check(model)
        new = [p.detach() for p in model.parameters()]
        mine = self._average
        if mine:
            toward = [p.to(a.device, a.dtype) for p, a in zip(new, mine, strict=True)]
            torch._foreach_lerp_(mine, toward, 1.0 - decay)
        self._write()
        for buffer, current in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(current)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into a model's parameters, and its buffers."""
        self._check(model)
        for parameter, average in zip(model.parameters(), self._average, strict=True):
            parameter.copy_(average)
        for buffer, current in zip(model.buffers(), self.module.buffers(), strict=True):
            buffer.copy_(current)

    @contextlib.contextmanager
    def swap(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model holds the average inside this context, and its own parameters again after it."""
        self._check(model)
        with torch.no_grad():
            tensors = [*model.parameters(), *model.buffers()]
            before = [t.detach().clone() for t in tensors]
        try:
            self.copy_to(model)
            yield model
        finally:
            with torch.no_grad():
                for t, own in zip(tensors, before, strict=True):
                    t.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """decay, the averages by parameter name (float32 for half-precision parameters), the buffers by name."""
        names = [name for name, _ in self.module.named_parameters()]
        return {
            "decay": self.decay,
            "parameters": {name: a.clone() for name, a in zip(names, self._average, strict=True)},
            "buffers": {name: b.clone() for name, b in self.module.named_buffers()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what state_dict() gave. ValueError: other names or shapes; then nothing is changed."""
        mine = {
            "parameters": dict(zip((n for n, _ in self.module.named_parameters()), self._average, strict=True)),
            "buffers": dict(self.module.named_buffers()),
        }
        decay = _decay(state["decay"])
        for kind, tensors in mine.items():
            got: Mapping[str, Tensor] = state[kind]
            for name in tensors.keys() | got.keys():
                if name not in tensors or name not in got or tensors[name].shape != got[name].shape:
                    raise ValueError(f"state: expected the {kind} of the averaged model, got another {name!r}")
        self.decay = decay
        for kind, tensors in mine.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[kind][name])
        self._write()

    def _check(self, model: nn.Module) -> None:
        """The model has the averaged one's parameters and buffers, by their shapes."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
        for kind in ("parameters", "buffers"):
            mine, given = ([tuple(t.shape) for t in getattr(m, kind)()] for m in (self.module, model))
            if mine != given:
                raise ValueError(f"model: expected the {kind} of the averaged model, {mine}, got {given}")

    def _write(self) -> None:
        """Round the average into the module where it is kept apart."""
        for k, average in self._wide.items():
            self._held[k].copy_(average)


def _is_half(t: Tensor) -> bool:
    return t.dtype in (torch.float16, torch.bfloat16)


def _decay(value: float) -> float:
    found = check.number("decay", value, 0.0)
    if found >= 1.0:
        raise ValueError(f"decay: expected a number in [0, 1), got {value}")
    return found
