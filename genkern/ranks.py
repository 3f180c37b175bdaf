"""Which process of several this is: of torch.distributed where it is initialised, or as the caller says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from . import check

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def distributed() -> Any:
    """torch.distributed where this process is one of an initialised group, else None."""
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() else None


def placed(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world_size): both given, or both None: those of torch.distributed, else 0 and 1.

    Raises:
        ValueError: one without the other; not 0 <= rank < world_size.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank: expected rank and world_size, or neither, got {rank} and {world_size}")
    if rank is None:
        group = distributed()
        return (0, 1) if group is None else (group.get_rank(), group.get_world_size())
    count = check.integer("world_size", world_size, 1)
    return check.integer("rank", rank, 0, count - 1), count


def barrier(device: torch.device | None = None) -> None:
    """Waits for every process of the group, where there is one. device: of this process, where it is a GPU: NCCL's own
    choice is the current device, and two processes may not have one."""
    group = distributed()
    if group is None:
        return
    if device is None or device.type != "cuda":
        group.barrier()
        return
    import torch

    met = torch.zeros((), device=device)
    group.all_reduce(met)
    met.item()  # NCCL lets the host go on


def of_first(find: Callable[[], T], device: torch.device | None = None) -> T:
    """What the first process of the group finds, in every process: one that a file may be written by meanwhile could
    find another answer. Without a group, what this one finds. find() may not fail: the others would wait. device: as
    of barrier()."""
    group = distributed()
    if group is None:
        return find()
    found: list[Any] = [find() if group.get_rank() == 0 else None]
    group.broadcast_object_list(found, src=0, device=device if device is not None and device.type == "cuda" else None)
    answer: T = found[0]
    return answer
