"""What a run of the demo is given, checked before anything is trained."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib

import torch

from .._command import CannotRun, writable

NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long each part runs.

    judge, train, reflow, distill: optimiser steps of the classifier, of each family's network, of the 2-rectified flow
    and of the consistency model.   pairs: noise and image pairs of the reflow.   samples: judged at every point.
    """

    judge: int
    train: int
    reflow: int
    distill: int
    pairs: int
    samples: int
    batch: int = 128


FULL = Budget(judge=500, train=1500, reflow=1000, distill=900, pairs=8192, samples=1000)
QUICK = Budget(judge=100, train=30, reflow=10, distill=10, pairs=64, samples=100)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that can start: the folder exists and can be written, the device works, the packages are there."""

    out: pathlib.Path
    device: torch.device
    seed: int
    budget: Budget
    quick: bool


def prepare(out: pathlib.Path, device: str = "auto", seed: int = 0, quick: bool = False) -> Setup:
    """Checks everything that a run needs, and makes the folder.

    Args:
        out: the folder to write into; made where it is missing.
        device: "auto", or a name that torch knows: "cpu", "cuda", "cuda:1".
        seed: 0 to 2^63 - 1.
        quick: a run of seconds, which shows that everything works and nothing about quality.

    Raises:
        CannotRun: a package is missing, the device is unknown or absent, out cannot be written, seed is out of range.
    """
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CannotRun(f"the demo needs {' and '.join(missing)}, not installed here: pip install 'genkern[demo]'")
    if not 0 <= seed < 1 << 63:
        raise CannotRun(f"--seed: expected 0 to 2^63 - 1, got {seed}")
    chosen = _device(device)
    writable(out)
    return Setup(out, chosen, seed, QUICK if quick else FULL, quick)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CannotRun(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "meta":
        raise CannotRun(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    try:
        torch.zeros(1, device=device).sum().item()
    except Exception:  # torch raises AssertionError, RuntimeError or NotImplementedError, by device
        found = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
        raise CannotRun(f"--device: {name} is not usable here; this machine has {', '.join(['cpu', *found])}") from None
    return device
