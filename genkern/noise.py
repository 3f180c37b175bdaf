"""Noise: where random numbers come from, as a plain value.

    z[b, i] = f(seed, stream, draw, sample_id[b], i)

and nothing else: not the batch's size or order, ranks, dtype, device, strides or launch shape. f is Philox-4x32-10
with key = seed xor mix64(stream) and counter = (i // 4, draw, sample_id low, sample_id high), then Box-Muller on its
words (`csrc/kernels/philox.h`). i is an element's C-order index inside its sample.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box, Muller 1958.
"""

from __future__ import annotations

import dataclasses
import enum
import secrets
from typing import TYPE_CHECKING, Any

from . import check

if TYPE_CHECKING:
    import torch

_MASK64 = (1 << 64) - 1


class Purpose(enum.IntEnum):
    """What a draw is for. draw = purpose << 24 | k, so that no two uses of one seed meet."""

    USER = 0
    INITIAL = 1
    STEP = 2
    CHURN = 3
    TRAINING = 4
    TIMES = 5
    CONDITION_DROPOUT = 6
    PROBES = 7
    BROWNIAN = 8
    KNOWN = 9


@dataclasses.dataclass(frozen=True, eq=False)
class Noise:
    """A value that names Gaussian (or uniform) numbers; it has no state and draws nothing by itself.

    Args:
        seed: 0 to 2^64 - 1, or a one-element int64 tensor (under torch.compile and torch.export, so that a new
            seed is no new graph).
        stream: 0 to 2^64 - 1, or a one-element int64 tensor. Trainers set it to the global step.
        sample_ids: int64 [B], the identity of each sample; default 0 .. B-1. A tensor, an array or a sequence.
        draw: 0 to 2^32 - 1: purpose << 24 | k.

    Raises:
        ValueError: a seed, stream or draw outside its range. TypeError: one that is no integer.
    """

    seed: int | torch.Tensor
    stream: int | torch.Tensor = 0
    sample_ids: Any = None
    draw: int = 0

    def __post_init__(self) -> None:
        for name, bits in (("seed", 64), ("stream", 64), ("draw", 32)):
            value = getattr(self, name)
            if not check.is_tensor(value) or name == "draw":
                object.__setattr__(self, name, check.unsigned(name, value, bits))
            else:
                check.key_tensor(name, value)

    def at(self, purpose: Purpose, k: int = 0) -> Noise:
        """The same seed, stream and samples, for another use: draw = purpose << 24 | k, k below 2^24."""
        return Noise(self.seed, self.stream, self.sample_ids, int(purpose) << 24 | check.unsigned("k", k, 24))

    def of_samples(self, sample_ids: Any) -> Noise:
        """The same numbers of other samples."""
        return Noise(self.seed, self.stream, sample_ids, self.draw)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Noise):
            return NotImplemented
        return self is other or _numbers(self) == _numbers(other)

    def __hash__(self) -> int:
        return hash(self.draw)  # the other numbers may be in arrays, and in device memory

    @property
    def on_device(self) -> bool:
        """Whether the seed or the stream is a tensor."""
        return check.is_tensor(self.seed) or check.is_tensor(self.stream)

    @staticmethod
    def fresh(generator: torch.Generator | None = None, *, torch_governs: bool = True) -> Noise:
        """Noise with a seed drawn from `generator`, by default torch's CPU generator, so that torch.manual_seed
        governs it; from the operating system where torch does not (NumPy arrays)."""
        if not torch_governs:
            return Noise(seed=secrets.randbits(64))
        import torch

        device = "cpu" if generator is None else generator.device
        halves = torch.randint(0, 1 << 32, (2,), dtype=torch.int64, generator=generator, device=device)
        # A tensor where the numbers are not known: traced, so that a new seed is no new graph, or one seed a lane.
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(halves):
            return Noise(seed=(halves[:1] << 32) | halves[1:])
        high, low = halves.tolist()
        return Noise(seed=high << 32 | low)


def _numbers(noise: Noise) -> tuple[Any, ...]:
    ids = noise.sample_ids
    listed = ids if ids is None else ids.tolist() if hasattr(ids, "tolist") else [int(i) for i in ids]
    return as_int64(int(noise.seed)), as_int64(int(noise.stream)), noise.draw, listed


def as_int64(value: int) -> int:
    """An unsigned 64-bit number in two's complement, as torch and the kernels carry it."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value
