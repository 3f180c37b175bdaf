"""What a case is built from and what it is: tensors, a compiler, and the contenders that do the same work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genkern as gk

from .baselines import Normals

Run = Callable[[], Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "mixed": torch.float32}
SAMPLE = (4, 64, 64)
GENKERN = "genkern"
TEXTBOOK, CAREFUL, COMPILED = "eager", "careful eager", "torch.compile"
GRAPHED = "genkern, CUDA graph"
FLOOR, FLOOR_GRAPHED = "network alone", "network alone, CUDA graph"  # no contenders: a loop cannot be faster
FLOORS = (FLOOR, FLOOR_GRAPHED)
OURS = (GENKERN, TEXTBOOK, CAREFUL, COMPILED, GRAPHED)  # the others are libraries


@dataclasses.dataclass
class Case:
    """The same work by several contenders.

    name: the op or loop, and its variant.   kind: "op", "normals", "loop" or "training".   dtype: a key of DTYPES.
    moved: bytes that the formula reads and writes, each tensor once; None for loops.
    contenders: callables that do it once and return the result, genkern's first.   skipped: those that do not run
    here, with the reason.   notes: where a contender's work differs in kind.
    threads, isa: the CPU's threads and instruction set while it is timed, None as they are.   count: elements made,
    or steps of a loop.
    """

    name: str
    kind: str
    dtype: str
    moved: int | None
    contenders: dict[str, Run]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    threads: int | None = None
    isa: str | None = None
    count: int = 0


class Compiler:
    """torch.compile, or why it does not work here."""

    def __init__(self, wanted: bool = True) -> None:
        self.reason = self._try() if wanted else "not asked for"

    def __call__(self, function: Any) -> Any:
        return torch.compile(function, dynamic=False)

    @staticmethod
    def _try() -> str | None:
        try:
            torch.compile(lambda x: 2.0 * x + 1.0)(torch.ones(8))
        except Exception as error:  # whatever a missing compiler, header or Triton raises
            return f"torch.compile does not work here: {str(error).strip().splitlines()[0]}"
        return None


class World:
    """The tensors of one dtype and size, made when first asked for, and the noise.

    Args:
        device: where.
        dtype: a key of DTYPES; "mixed" is a float32 state with a bfloat16 network output.
        elements: of a tensor, about: whole samples of SAMPLE.
        compiler: for torch.compile.
        same_noise: the baselines are given genkern's normals instead of drawing their own, to compare results.
    """

    def __init__(
        self, device: torch.device, dtype: str, elements: int, compiler: Compiler, same_noise: bool = False
    ) -> None:
        self.device, self.name, self.dtype, self.compiler = device, dtype, DTYPES[dtype], compiler
        self.output_dtype = torch.bfloat16 if dtype == "mixed" else self.dtype
        self.shape = (max(1, elements // math.prod(SAMPLE)), *SAMPLE)
        self.noise = gk.Noise(seed=1)
        self.same_noise = same_noise
        self._generator = torch.Generator(device).manual_seed(0)
        self._made: dict[str, Tensor] = {}

    def state(self, name: str) -> Tensor:
        """A tensor of the state's dtype. [B, 4, 64, 64]"""
        return self._tensor(name, self.dtype)

    def output(self, name: str) -> Tensor:
        """A tensor of the network's dtype. [B, 4, 64, 64]"""
        return self._tensor(name, self.output_dtype)

    def coefficient(self, name: str) -> Tensor:
        """Numbers in (0, 1), one a sample, float32, each a number of the state's dtype. [B]"""
        if name not in self._made:
            u = torch.rand(self.shape[0], generator=self._generator, device=self.device)
            self._made[name] = (0.1 + 0.8 * u).to(self.dtype).float()
        return self._made[name]

    def normals(self, noise: gk.Noise | None = None, like: Tensor | None = None) -> Normals:
        """The baselines' noise: torch's, or that of `noise` where results are compared."""
        return Normals(self.drawn(noise, like) if self.same_noise else None)

    def drawn(self, noise: gk.Noise | None = None, like: Tensor | None = None) -> Tensor:
        """genkern's normals, stored."""
        dtype = self.dtype if like is None else like.dtype
        z = gk.ops.randn(self.shape, noise=noise or self.noise, device=self.device, dtype=dtype)
        return z if like is None else torch.empty_like(like).copy_(z)

    def case(self, name: str, kind: str, tensors: list[Tensor], contenders: dict[str, Run | None]) -> Case:
        """A Case that moves `tensors` once; a contender that is None is torch.compile where it does not work."""
        found = Case(name, kind, self.name, sum(t.nbytes for t in tensors), {}, count=math.prod(self.shape))
        for contender, run in contenders.items():
            if run is None:
                found.skipped[contender] = str(self.compiler.reason)
            else:
                found.contenders[contender] = run
        return found

    def compiled(self, function: Any) -> Any:
        """The compiled function, None where there is no working compiler."""
        return None if self.compiler.reason else self.compiler(function)

    def _tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self._made:
            z = torch.randn(self.shape, generator=self._generator, device=self.device)
            self._made[name] = z.to(dtype)
        return self._made[name]
