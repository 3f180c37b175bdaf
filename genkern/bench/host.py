"""What a small eager call costs on the host, beside x * 2.0: tensors so small that a kernel's work is nothing.

Every named op without and with a gradient to record, and the raw call: a row laid out before, into a given output. The
same under no_grad through torch.ops shows what genkern.eager saves.
Calls are timed in turns; the fastest of the rounds counts, as whatever else runs on the machine only adds to it.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable
from typing import Any

import torch

import genkern as gk
from genkern import eager, functions, fused, rows, spec

from .world import Run

NAME = "host time of small calls"
SHAPE = (4, 8)
ROUNDS, CALLS, CALLS_ON_CUDA = 31, 300, 20  # few on CUDA, so that the queue of launches does not fill
UNIT = "x * 2.0"
RAW = "raw call, a ready row, out="


def asked(only: str | None) -> bool:
    """Whether `only` names this, as it names cases."""
    return only is None or only in NAME or fnmatch.fnmatchcase(NAME, only)


def measured(device: torch.device) -> list[dict[str, Any]]:
    """A row for each call: {"call", "seconds", "ratio", "dispatched_ratio"} under no_grad, and where it has a gradient,
    "gradient_seconds", "gradient_ratio"."""
    with torch.no_grad():
        plain = _timed(_calls(device, requires_grad=False), device)
        dispatched = _timed(_calls(device, requires_grad=False), device, through_torch=True)
    with torch.enable_grad():
        recorded = _timed(_calls(device, requires_grad=True), device)
    found = []
    for name, (seconds, ratio) in plain.items():
        row = {"call": name, "seconds": seconds, "ratio": ratio, "dispatched_ratio": dispatched[name][1]}
        if name in recorded:
            row["gradient_seconds"], row["gradient_ratio"] = recorded[name]
        found.append(row)
    return found


def _calls(device: torch.device, requires_grad: bool) -> dict[str, Run]:
    x, v, v_next, out = (torch.randn(SHAPE, device=device) for _ in range(4))
    noise, ops = gk.Noise(seed=1), gk.ops
    row, terms = fused.prepared(rows.Row((rows.Out(x=1.0, m=0.1),)), None, x, 0, (x.dtype,))
    text = spec.numbers(row)
    tensors = [x, v, *terms[2:]]
    x_in = x.clone().requires_grad_(requires_grad)
    v_in = v.clone().requires_grad_(requires_grad)
    calls: dict[str, Run] = {
        UNIT: lambda: x_in * 2.0,
        "euler_step": lambda: ops.euler_step(x_in, v, 0.1),
        "heun_step": lambda: ops.heun_step(x_in, v, v_next, 0.1),
        "ddim_step": lambda: ops.ddim_step(x_in, v, 0.8, 0.6, 0.9, 0.4),
        "add_noise": lambda: ops.add_noise(x_in, 0.8, 0.6, noise=noise),
        "consistency_skip": lambda: ops.consistency_skip(x_in, v, 0.3, 0.7),
        "path_loss": lambda: ops.path_loss(v_in, x, x_coef=1.0, noise_coef=-1.0, noise=noise),
    }
    if not requires_grad:
        calls["randn"] = lambda: ops.randn(SHAPE, noise=noise, device=device)
        if functions.direct(device):
            calls[RAW] = lambda: functions.run_numbers(text, (out,), tensors)
    return calls


def _timed(
    calls: dict[str, Run], device: torch.device, through_torch: bool = False
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Seconds of every call, and their ratio to the unit's under the same mode."""
    on_cuda = device.type == "cuda"
    synchronize: Callable[[], object] = torch.cuda.synchronize if on_cuda else lambda: None
    count = CALLS_ON_CUDA if on_cuda else CALLS
    found = dict.fromkeys(calls, float("inf"))
    before = eager.face
    if through_torch:
        eager.face = None
    try:
        for _ in range(ROUNDS):
            for name, run in calls.items():
                synchronize()
                begin = time.perf_counter()
                for _ in range(count):
                    run()
                found[name] = min(found[name], (time.perf_counter() - begin) / count)
        synchronize()
    finally:
        eager.face = before
    return {name: (seconds, seconds / found[UNIT]) for name, seconds in found.items()}
