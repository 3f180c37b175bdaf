"""Exponential moving average of a model's parameters: a <- a + (1 - decay)(p - a), kept in float32.

In half precision the update is lost: (1 - decay)(p - a) is below half a unit in the last place of a. One fused launch
for all parameters, of one average or of several (EMASet in emas.py); one more before it for the model's numbers in
float32 where it is in half precision, and one after it for each dtype of what is copied: buffers, and the average in
half precision. Nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import check

if TYPE_CHECKING:
    from .guard import Guard


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
        self.decay = checked_decay(decay)
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._held = list(self.module.parameters())
        self._wide = {k: p.detach().float() for k, p in enumerate(self._held) if _is_half(p)}

    @property
    def _average(self) -> list[Tensor]:
        """The average itself: the module's own parameters where they are precise enough, else float32 copies."""
        return [self._wide.get(k, p.detach()) for k, p in enumerate(self._held)]

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float | None = None, *, guard: Guard | None = None) -> None:
        """Move toward the model's parameters; copy its buffers.

        Args:
            model: of the same parameters.
            decay: of this update alone.
            guard: of the training: from its first bad step on the average stays where it is. Five launches, not one.
        """
        update_all([self], [self.decay if decay is None else checked_decay(decay)], model, guard)

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

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what state_dict() gave. ValueError: other names or shapes; then nothing is changed."""
        self.check_state(state)
        self._load(state)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """ValueError: a state of other names or shapes, or of a decay outside [0, 1)."""
        checked_decay(state["decay"])
        for kind, tensors in self._tensors().items():
            got: Mapping[str, Tensor] = state[kind]
            for name in tensors.keys() | got.keys():
                if name not in tensors or name not in got or tensors[name].shape != got[name].shape:
                    raise ValueError(f"state: expected the {kind} of the averaged model, got another {name!r}")

    @torch.no_grad()
    def _load(self, state: Mapping[str, Any]) -> None:
        self.decay = checked_decay(state["decay"])
        for kind, tensors in self._tensors().items():
            for name, tensor in tensors.items():
                tensor.copy_(state[kind][name])
        self._write()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """The averages and the buffers by name."""
        names = [name for name, _ in self.module.named_parameters()]
        return {
            "parameters": dict(zip(names, self._average, strict=True)),
            "buffers": dict(self.module.named_buffers()),
        }

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
        _copy([self._held[k] for k in self._wide], list(self._wide.values()))


@torch.no_grad()
def update_all(emas: Sequence[EMA], decays: Sequence[float], model: nn.Module, guard: Guard | None = None) -> None:
    """Move averages of one model toward its parameters, each by its decay, unless the guard has seen a bad step; copy
    its buffers."""
    for ema in emas:
        ema._check(model)
    new, buffers = [p.detach() for p in model.parameters()], list(model.buffers())
    mine: list[Tensor] = []
    toward: list[Tensor] = []
    weights: list[float] = []
    cast: dict[tuple[Any, ...], list[Tensor]] = {}
    for ema, decay in zip(emas, decays, strict=True):
        average = ema._average
        kind = tuple((a.device, a.dtype) for a in average)
        if kind not in cast:
            cast[kind] = _like(new, average)
        mine, toward, weights = mine + average, toward + cast[kind], weights + [1.0 - decay] * len(average)
    if mine and guard is None:
        torch._foreach_lerp_(mine, toward, weights)
    elif mine and guard is not None:
        moves = torch._foreach_sub(toward, mine)
        torch._foreach_mul_(moves, weights)
        torch._foreach_mul_(moves, 1.0 - guard.flag)
        torch._foreach_add_(mine, moves)
    pairs: list[tuple[Tensor, Tensor]] = [(e._held[k], wide) for e in emas for k, wide in e._wide.items()]
    pairs += [pair for e in emas for pair in zip(e.module.buffers(), buffers, strict=True)]
    _copy([to for to, _ in pairs], [source for _, source in pairs])


def _like(given: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Tensors of the devices and dtypes of others."""
    there = [a.device == t.device and a.dtype == t.dtype for t, a in zip(given, like, strict=True)]
    found = [t if same else torch.empty_like(a) for t, a, same in zip(given, like, there, strict=True)]
    changed = [k for k, same in enumerate(there) if not same]
    _copy([found[k] for k in changed], [given[k] for k in changed])
    return found


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    """One launch for the pairs of each two dtypes: lists of mixed ones are copied tensor by tensor."""
    alike: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for a, b in zip(to, source, strict=True):
        targets, sources = alike.setdefault((a.device, a.dtype, b.device, b.dtype), ([], []))
        targets.append(a)
        sources.append(b)
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)


def _is_half(t: Tensor) -> bool:
    return t.dtype in (torch.float16, torch.bfloat16)


def checked_decay(value: float) -> float:
    found = check.number("decay", value, 0.0)
    if found >= 1.0:
        raise ValueError(f"decay: expected a number in [0, 1), got {value}")
    return found
