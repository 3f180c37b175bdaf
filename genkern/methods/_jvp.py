"""A network's output and its derivative along a direction, forward mode."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..samplers import network
from ._replay import drawn_again
from ._training import Batch


def along(
    batch: Batch, model: Any, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, extra: dict[str, Tensor], name: str
) -> tuple[Tensor, Tensor]:
    """F(x, t) and dF/dx dx + dF/dt dt, in one pass through the network and without a graph of either.

    A module that is wrapped for several processes is looked into: its own forward would begin a synchronisation of
    gradients that never come. The gradient is that of a plain call after this one, which the wrapper sees, and which
    draws the same dropout. Buffers that a network writes in its forward are written by both calls.

    Args:
        x, t: the network's input.  [B, ...], [B].
        dx, dt: the direction.  As x and t.
        extra: further keyword arguments, held fixed.
        name: of the network, in messages.

    Raises:
        ValueError, TypeError: the output has another shape than x, or is no floating tensor.
        NotImplementedError, RuntimeError: torch's own, for operations in the network without a forward derivative. In
            torch 2.13 GroupNorm has none on channels_last tensors.
    """
    wrapped = isinstance(model, torch.nn.parallel.DistributedDataParallel)
    inner = model.module if wrapped else model

    def call(x: Tensor, t: Tensor) -> Tensor:
        return network.call(inner, x, t, {**batch.cond, **extra}, name)

    # Dual tensors are what torch.func.jvp makes, without a transform around every operation: less for the host. Inside
    # another transform they would have no tangents, nor would anything in inference mode, which is left for the pass.
    transformed = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    inference = not transformed and torch.is_inference_mode_enabled()
    left = torch.inference_mode(False) if inference else contextlib.nullcontext()
    with left, torch.no_grad(), drawn_again(inner, x.device):
        if transformed:
            value, tangent, *_ = torch.func.jvp(call, (x, t), (dx, dt))
        else:
            x, t, dx, dt = (v.clone() if inference else v for v in (x, t, dx, dt))
            with _uncompiled(), forward_ad.dual_level():
                found = call(forward_ad.make_dual(x, dx), forward_ad.make_dual(t, dt))
                value, tangent = forward_ad.unpack_dual(found)
    tangent = torch.zeros_like(value) if tangent is None else tangent  # of a network that looks at neither
    return network.at_most(value, batch.x.dtype), network.at_most(tangent, batch.x.dtype)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled networks run as they were written: a graph that was compiled without gradients drops tangents."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
