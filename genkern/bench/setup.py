"""What a run of the benchmark is given, checked before anything is measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pathlib

import torch

from .. import _library
from .._command import CannotRun, writable
from . import cases, host, table
from .world import DTYPES


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured: MiB of a float32 tensor, rounds at most, seconds for the rounds of a case."""

    mib: float
    repeats: int
    seconds: float


SIZES = {"cpu": Size(64.0, 15, 1.0), "cuda": Size(256.0, 31, 10.0)}
QUICK = {"cpu": Size(8.0, 5, 0.3), "cuda": Size(64.0, 9, 1.0)}
USUAL = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that can start: the device works, the folder can be written, the cases exist."""

    device: torch.device
    mib: float
    dtypes: tuple[str, ...]
    only: str | None
    repeats: int
    seconds: float
    out: pathlib.Path
    quick: bool
    readme: pathlib.Path | None

    def arguments(self) -> dict[str, object]:
        """As the JSON has them."""
        names = ("mib", "dtypes", "only", "repeats", "quick")
        return {"device": self.device.type, **{name: getattr(self, name) for name in names}}


@dataclasses.dataclass(frozen=True)
class Redraw:
    """Results to draw again: the folder holds some, and the README, if any, can be rewritten."""

    out: pathlib.Path
    readme: pathlib.Path | None


def to_redraw(out: pathlib.Path, readme: pathlib.Path | None = None) -> Redraw:
    """Checks what redrawing needs.

    Raises:
        CannotRun: matplotlib is missing, the folder holds no result, the README has not its markers.
    """
    _needs_matplotlib()
    if not any(out.glob("*.json")):
        raise CannotRun(f"--out: {out} holds no results to redraw")
    _markers(readme)
    writable(out)
    return Redraw(out, readme)


def prepare(
    device: str = "auto",
    mib: float | None = None,
    dtypes: str | None = None,
    only: str | None = None,
    repeats: int | None = None,
    out: pathlib.Path = pathlib.Path("benchmarks/results"),
    quick: bool = False,
    readme: pathlib.Path | None = None,
) -> Setup:
    """Checks everything that a run needs, and makes the folder.

    Args:
        device: "auto", "cpu" or "cuda".
        mib: MiB of a float32 tensor; other dtypes have as many elements. Default 256 on CUDA, 64 on the CPU.
        dtypes: names of world.DTYPES, with commas between. Default float32,bfloat16.
        only: cases whose name contains it or matches it; default all.
        repeats: rounds; default up to 31 on CUDA and 15 on the CPU, as many as some seconds a case allow.
        out: the folder of the results, made where it is missing.
        quick: smaller and fewer, to end in a minute; float32 alone unless dtypes are given.
        readme: a file whose table is rewritten.

    Raises:
        CannotRun: an argument is not what it may be, the device or the compiled kernels are absent.
    """
    _needs_matplotlib()
    where = _device(device)
    if where.type not in _library.torch_devices():
        reason = _library.why_missing() or f"it was built without {where.type.upper()}"
        raise CannotRun(f"genkern has no {where.type} kernels here, and plain PyTorch is no benchmark of it: {reason}")
    usual = (QUICK if quick else SIZES)[where.type]
    mib = usual.mib if mib is None else mib
    if not 0.0625 <= mib <= 16384.0:
        raise CannotRun(f"--mib: expected a number from 0.0625 to 16384, got {mib:g}")
    seconds = usual.seconds if repeats is None else math.inf
    repeats = usual.repeats if repeats is None else repeats
    if repeats < 1:
        raise CannotRun(f"--repeats: expected 1 or more, got {repeats}")
    names = (USUAL[:1] if quick else USUAL) if dtypes is None else tuple(n.strip() for n in dtypes.split(","))
    for name in names:
        if name not in DTYPES:
            raise CannotRun(f"--dtypes: expected names of {', '.join(DTYPES)} with commas between, got {name!r}")
    found = cases.chosen(where, only)
    if not any(set(names) & set(spec.dtypes) for spec in found) and not host.asked(only):
        known = "; ".join([*(spec.name for spec in cases.specs(where)), host.NAME])
        raise CannotRun(f"--only: no case of {', '.join(names)} matches {only!r}; there are: {known}")
    _markers(readme)
    writable(out)
    return Setup(where, mib, names, only, repeats, seconds, out, quick, readme)


def _needs_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise CannotRun("the benchmark needs matplotlib, not installed here: pip install 'genkern[bench]'")


def _markers(readme: pathlib.Path | None) -> None:
    if readme is None:
        return
    try:
        table.check_markers(readme)
    except OSError as error:
        raise CannotRun(f"--readme: {readme} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise CannotRun(f"--readme: {error}") from None


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise CannotRun(f"--device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise CannotRun("--device: cuda is not usable here; this machine has cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
