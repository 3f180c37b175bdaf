"""NaN and infinite numbers in training, found without waiting for the device, and kept out of the parameters.

    b_k = max(b_{k-1}, [loss or a gradient of step k is not finite]),      b_{-1} = 0

b lies on the device. An optimiser step under b = 1 changes nothing, and neither does an average that is given the
guard. b never returns to 0, so that from the first bad step on the parameters are those of the step before it, however
late the host looks. b_k is copied to pinned memory as step k is enqueued, and looked at in a later step, when the copy
has arrived; on the CPU in the same step.

Where several processes train together, b_k is the largest of theirs, by one reduction a step, and on CUDA the host
waits for b_{k - LAG} in step k, whether it has arrived or not: so they all know of a bad step in the same step.

The optimiser's part is the one that torch's gradient scaler uses: fused optimisers read b in their kernel.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import ranks

CHECKED = (torch.float32, torch.float16, torch.float64)  # by the gradient scaler's kernel, on every torch
SLOTS = 64  # copies under way at most: the host is never further ahead of what it has looked at
LAG = 8  # steps after which every one of several processes looks: the device has work while the host waits for a copy


class Guard:
    """Watches a training on one device, or the part of it in this process.

    Buffers that a forward pass writes, as BatchNorm's, are not guarded, nor is what else the caller does in a step. It
    is not for use with torch.amp.GradScaler, which skips bad steps itself, and looks for others to come. After a bad
    step a guard is spent: another training needs another one.

    Args:
        device: of the parameters.
        group: of torch.distributed, whose processes train together, each with a guard and as many steps. Default all
            processes, where it is initialised.
        alone: this process trains by itself, whatever torch.distributed is.

    Attributes:
        flag: b, float32 [], on the device.
        shared: whether b is that of several processes.
        bad: the first bad step that the host knows of; None as long as there is none.
    """

    def __init__(self, device: torch.device | str, *, group: Any = None, alone: bool = False) -> None:
        dist = None if alone else ranks.distributed()
        self._group = group
        self.shared: bool = dist is not None and dist.get_world_size(group) > 1
        self.flag = torch.zeros((), device=device)
        self.bad: int | None = None
        self._one = torch.ones((), device=device)
        self._on_cuda = self.flag.device.type == "cuda"
        self._copies = torch.zeros(SLOTS if self._on_cuda else 0, pin_memory=self._on_cuda)
        self._under_way: collections.deque[tuple[int, int, Any]] = collections.deque()
        self._next = 0

    @property
    def behind(self) -> int:
        """Steps whose flag the host has not looked at."""
        return len(self._under_way)

    @torch.no_grad()
    def watch(self, step: int, loss: Tensor, parameters: Iterable[torch.nn.Parameter]) -> int | None:
        """Between backward() and the optimiser's step: whether this step or one before it is bad.

        A few launches, however many the parameters are, and one pass over the gradients. No wait on CUDA unless 64
        steps are not looked at; of several processes, for the copy of eight steps ago.

        Args:
            step: its number, for the report.
            loss: of the step; a scalar, or any floating tensor.
            parameters: whose gradients the optimiser reads; dense ones.

        Returns:
            The first bad step that the host knows of by now; on CUDA that may be an earlier one. None: none. The same
            in every one of several processes.
        """
        alike: dict[torch.dtype, list[Tensor]] = {loss.dtype: [loss.detach().clone()]}
        for p in parameters:
            if p.grad is not None:
                alike.setdefault(p.grad.dtype, []).append(p.grad)
        for dtype, found in alike.items():
            tensors = [t for t in found if t.numel()]  # the norm of an empty one is an error
            if not tensors:
                continue
            if dtype in CHECKED and self.flag.device.type in ("cpu", "cuda"):
                torch._amp_foreach_non_finite_check_and_unscale_(tensors, self.flag, self._one)
            else:
                largest = torch.stack(torch._foreach_norm(tensors, math.inf))
                torch.maximum(self.flag, (~largest.isfinite()).any().float(), out=self.flag)
        if self.shared:
            dist = ranks.distributed()
            dist.all_reduce(self.flag, dist.ReduceOp.MAX, group=self._group)
        if self._on_cuda:
            self._send(step)
            self._look(arrived=not self.shared, most=LAG if self.shared else SLOTS - 1)
        elif self.bad is None and float(self.flag):
            self.bad = step
        return self.bad

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser's step, which changes nothing where b is 1: no parameter, no moment, no count.

        An optimiser that is not fused cannot read b on the device; then the host waits for it.
        """
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            holder: Any = optimizer
            holder.grad_scale, holder.found_inf = None, self.flag
            try:
                optimizer.step()
            finally:
                del holder.grad_scale, holder.found_inf
        elif not float(self.flag):
            optimizer.step()

    def finish(self) -> int | None:
        """At the end of a training: waits for the last copies. The first bad step, None if there was none."""
        self._look(arrived=False, most=0)
        return self.bad

    def _send(self, step: int) -> None:
        slot, self._next = self._next, (self._next + 1) % SLOTS
        self._copies[slot].copy_(self.flag, non_blocking=True)
        self._under_way.append((step, slot, self._event()))

    def _event(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.flag.device))
        return event

    def _look(self, *, arrived: bool, most: int) -> None:
        """At the oldest copies, waiting until `most` are left; arrived: at those too that are there by now."""
        while self._under_way:
            step, slot, event = self._under_way[0]
            if self.behind > most:
                event.synchronize()
            elif not (arrived and event.query()):
                return
            self._under_way.popleft()
            if self.bad is None and float(self._copies[slot]):
                self.bad = step
