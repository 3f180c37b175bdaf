"""Which process of several this is: of torch.distributed where it is initialised, or as the caller says."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def all_or_none(name: str, device: torch.device) -> Iterator[None]:
    """A block that fails in every process of the group where it fails in one, so that none waits for the others.

    name: what failed, in the message of those that did not.   device: as of barrier().

    Raises:
        ValueError: the block failed in another process. What it raised itself, where it failed in this one.
    """
    own: BaseException | None = None
    try:
        yield
    except Exception as error:
        own = error
    group = distributed()
    if group is not None:
        import torch

        failed = torch.tensor(float(own is not None), device=device)
        group.all_reduce(failed)
        if own is None and failed.item() > 0.0:
            raise ValueError(f"{name}: expected what every process can take, it failed in another one")
    if own is not None:
        raise own
