"""A test's body in two processes of torch.distributed: on the CPU by gloo, or with a GPU each by NCCL.

No process outlives its test: a collective ends after GROUP seconds, a process after PROCESS (which prints where all of
its threads are), and the test after TEST. Of several test runs at a time one has the GPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import os
import pathlib
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import cuda_works
from torch.utils._pytree import tree_map_only

PROCESSES = 2
GROUP, PROCESS, TEST = 60, 90, 100  # seconds
NO_GPUS = "fewer than two CUDA devices here, or no NCCL, or genkern was built without CUDA"
Body = Callable[[int, torch.device, pathlib.Path], Any]


def two_gpus() -> bool:
    return cuda_works() and torch.cuda.device_count() >= PROCESSES


NCCL = two_gpus() and dist.is_available() and dist.is_nccl_available()
BACKENDS = ["gloo", pytest.param("nccl", marks=[pytest.mark.cuda, pytest.mark.skipif(not NCCL, reason=NO_GPUS)])]


def device_of(backend: str, rank: int = 0) -> torch.device:
    return torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")


def run(body: Body, backend: str, folder: pathlib.Path) -> list[Any]:
    """What body(rank, device, folder) finds in each process, on the CPU. Its device is the current one.

    Raises:
        torch.multiprocessing.ProcessRaisedException, ProcessExitedException: one failed; the others are ended.
        TimeoutError: they have not ended.
    """
    with _turn(backend):
        context = torch.multiprocessing.spawn(_started, (body, backend, folder), nprocs=PROCESSES, join=False)
        end = time.monotonic() + TEST
        try:
            while not context.join(timeout=max(end - time.monotonic(), 0.0)):
                if time.monotonic() >= end:
                    raise TimeoutError(f"{body.__name__}: expected an end within {TEST} s under {backend}")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def _started(rank: int, body: Body, backend: str, folder: pathlib.Path) -> None:
    faulthandler.dump_traceback_later(PROCESS, exit=True)
    torch.set_num_threads(1)
    device = device_of(backend, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = datetime.timedelta(seconds=GROUP)
    dist.init_process_group(backend, f"file://{folder}/meet", rank=rank, world_size=PROCESSES, timeout=limit)
    try:
        found = body(rank, device, folder)
    except BaseException:  # the group is left as it is: to end it would wait for the other process
        traceback.print_exc()
        raise
    torch.save(tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), found), folder / f"{rank}.pt")
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def _turn(backend: str) -> Iterator[None]:
    """Where tests run side by side, one group at a time is on the GPUs: NCCL's kernels wait for each other there."""
    if backend != "nccl":
        yield
        return
    import fcntl

    with open(pathlib.Path(tempfile.gettempdir()) / f"genkern-nccl-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
