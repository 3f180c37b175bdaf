"""A coupling of the whole batch of several processes: gathered, solved once, and each given its own part.

A process of torch.distributed sees B of the N B samples of a batch, and transport within its B alone is farther from
the optimal coupling than transport within N B. What is small goes to every process: all sources, and what the costs are
of (the samples, or features of them). The first process solves, and its index goes to all, so that every one has its
part of one and the same coupling. It waits for the device: the batches' sizes and the index are looked at on the host.

Noise has to differ between the processes, as Noise(seed, sample_ids=) of each sample's place in the whole batch does:
two with the same torch.manual_seed and no Noise draw the same sources, and the coupling has each of them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ranks
from .couplings import Coupling


class Gathered:
    """`coupling` over the processes of torch.distributed; without them, of the batch as it is.

    Args:
        coupling: Optimal(), Sinkhorn(), Independent(), or another of flows.couplings. Where it has `labels`, cond is
            given to it with that key alone.
        features: of x0 and of x1, [B, ...] to [B, D], what the costs are of: a smaller image, say. Default the samples
            themselves. Without features, what a process receives is N times the batch's x0 and x1; with them, x1's
            part is N B D numbers.
        group: of torch.distributed; default all processes.

    Raises (in every process, when it is used):
        ValueError: another batch size than in the other processes; an x0 that requires a gradient in one of several
            processes, to which the others' part of the coupling would not bring it. RuntimeError: the first process's
            coupling failed.
    """

    def __init__(
        self, coupling: Coupling, *, features: Callable[[Tensor], Tensor] | None = None, group: Any = None
    ) -> None:
        self.coupling, self.features, self.group = coupling, features, group

    def sources(self, x0: Tensor, x1: Tensor, cond: Mapping[str, Any], u: Tensor) -> Tensor:
        """The sources of this process's data, [B, ...] of x0's dtype; without other processes with x0's gradient.

        Args:
            x0, x1: this process's sources and data.  [B, ...], as many in every process.
            cond: of its data.
            u: uniforms.  [B].
        """
        dist = ranks.distributed()
        alone = dist is None or dist.get_world_size(self.group) == 1
        if not alone:
            # In every process what is refused in one, so that none waits for another.
            mine = [len(x0), int(x0.requires_grad and torch.is_grad_enabled())]
            sizes, graphs = self._gather(torch.tensor([mine], device=x0.device)).T.tolist()
            if len(set(sizes)) > 1:
                raise ValueError(f"x0: expected as many samples in every process, got {sizes}")
            if any(graphs):
                raise ValueError("x0: expected no gradient among several processes, got sources that require one")
        label: Any = getattr(self.coupling, "labels", None)
        seen = cond if label is None else {label: cond[label]} if label in cond else {}
        with torch.no_grad():
            f0, f1 = (x0, x1) if self.features is None else (self.features(x0), self.features(x1))
            index = self.coupling(f0, f1, seen, u) if alone else None
        if index is not None:
            return x0.index_select(0, index)  # with its gradient
        all_x0 = self._gather(x0)
        all_f0 = all_x0 if self.features is None else self._gather(f0)
        given = {label: self._gather(seen[label].to(x0.device))} if label in seen else {}
        index = self._solved(all_f0, self._gather(f1), given, self._gather(u))
        rank, n = dist.get_rank(self.group), len(x0)
        return all_x0.index_select(0, index[rank * n : (rank + 1) * n])

    @torch.no_grad()
    def _solved(self, x0: Tensor, x1: Tensor, cond: Mapping[str, Any], u: Tensor) -> Tensor:
        """The index of the whole batch, the first process's in every one."""
        dist, failed = ranks.distributed(), None
        index = torch.full((len(x0),), -1, dtype=torch.int64, device=x0.device)
        if dist.get_rank(self.group) == 0:
            try:
                index.copy_(self.coupling(x0, x1, cond, u))
            except Exception as error:  # the others wait for an answer
                failed = error
        dist.broadcast(index, 0 if self.group is None else dist.get_global_rank(self.group, 0), group=self.group)
        if failed is not None:
            raise failed
        if len(index) and bool((index < 0).any()):
            raise RuntimeError("coupling: the first process could not solve it; its own error says why")
        return index

    def _gather(self, part: Tensor) -> Tensor:
        """Every process's part, one after another along dimension 0."""
        dist = ranks.distributed()
        part = part.detach().contiguous()
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, part, group=self.group)
        return torch.cat(parts)
