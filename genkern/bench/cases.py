"""The list of cases, in the order of the table, each with the dtypes that it exists in."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

import genkern as gk
from genkern import _library

from . import loops, ops, peers, training
from .world import CAREFUL, DTYPES, GENKERN, TEXTBOOK, Case, World

ALL = tuple(DTYPES)
STORED = ("float32", "bfloat16", "float16")  # where there is no network output, mixed precision is nothing new


@dataclasses.dataclass(frozen=True)
class Spec:
    """A case that can be built: its name, the dtypes that it exists in, and the function that builds it.

    compared_in: the dtype in which results are compared, where in 16 bits a baseline's own roundings, one an operation,
    add up to more than what tells it from another formula; None: that of the case.
    """

    name: str
    dtypes: tuple[str, ...]
    build: Callable[[World], Case]
    compared_in: str | None = None


def normals_name(threads: int | None, isa: str | None) -> str:
    """The name of a case of normals()."""
    return "normals" if threads is None else f"normals, {isa}, {threads} thread{'s' * (threads > 1)}"


def normals(world: World, threads: int | None, isa: str | None) -> Case:
    """float32 normals into a given tensor, by threads and instruction set."""
    out, drawn = world.state("out"), world.normals()
    name = normals_name(threads, isa)
    case = world.case(name, "normals", [out], {
        GENKERN: lambda: gk.ops.randn(world.shape, noise=world.noise, out=out),
        TEXTBOOK: lambda: drawn.like(out),
        CAREFUL: lambda: drawn.into(out),
    })  # fmt: skip
    case.threads, case.isa = threads, isa
    if not world.same_noise:  # its numbers are its own: nothing to compare
        peers.add(case, "torch.func._random", _keyed_normals, out)
    return case


def _keyed_normals(out: torch.Tensor) -> Callable[[], Any]:
    random = peers.load("torch.func._random")
    key = random.key(1, device=out.device)
    try:
        random.normal_(key, out)
    except RuntimeError:  # NotImplementedError is one
        raise peers.Missing(f"torch.func._random has no {out.device.type} kernel") from None
    return lambda: random.normal_(key, out)


def instruction_sets() -> list[str]:
    """What this CPU has of AVX2 and AVX-512."""
    isa = _library.torch_ops().cpu_isa
    found, before = [], isa("")
    for name in ("avx2", "avx512"):
        with contextlib.suppress(RuntimeError):
            isa(name)
            found.append(name)
    isa(before)
    return found


@contextlib.contextmanager
def setting(case: Case) -> Iterator[None]:
    """The threads and instruction set of a case, and what was before."""
    threads, isa = torch.get_num_threads(), _library.torch_ops().cpu_isa
    before = isa("")
    try:
        if case.threads is not None:
            torch.set_num_threads(case.threads)
        if case.isa is not None:
            isa(case.isa)
        yield
    finally:
        torch.set_num_threads(threads)
        isa(before)


def specs(device: torch.device) -> list[Spec]:
    """Every case of a device."""
    bind = functools.partial
    found = [
        Spec("randn", STORED, ops.randn),
        Spec("add_noise", STORED, ops.add_noise),
        Spec("add_noise, by sample", STORED, ops.add_noise_per_sample),
        Spec("add_noise, noise written", STORED, ops.add_noise_written),
        Spec("add_noise, channels_last", STORED, bind(ops.add_noise, channels_last=True)),
        Spec("ddim_step", ALL, ops.ddim_step),
        Spec("ddim_step, clipped", ALL, bind(ops.ddim_step, variant="clipped")),
        Spec("ddim_step, guided", ALL, bind(ops.ddim_step, variant="guided")),
        Spec("ddim_step, eta 1", ALL, bind(ops.ddim_step, variant="eta 1")),
        Spec("ddim_step, data predicted", ALL, ops.ddim_step_of_data),
        Spec("learned variance, step", ALL, ops.learned_variance_step),
        Spec("inpainting, step", ALL, ops.inpainting_step),
        Spec("euler_step", ALL, ops.euler_step),
        Spec("heun_step", ALL, ops.heun_step),
        Spec("consistency_skip", ALL, ops.consistency_skip),
        Spec("consistency_skip, by sample", STORED, bind(ops.consistency_skip, by_sample=True)),
        Spec("path_loss", STORED, ops.path_loss),
        Spec("path_loss, forward and backward", STORED, bind(ops.path_loss, backward=True)),
        Spec("flow matching, around the network", STORED, loops.flow_training),
        # Not in float16: the written formula's slope (x - D) / t rounds 2% of the largest number away.
        Spec("CD, around the networks", STORED[:2], training.distillation, "float32"),
        Spec("ECT, around the networks", STORED, training.tuning, "float32"),
        Spec("sCM, around the network", STORED, training.continuous, "float32"),
    ]
    if device.type == "cpu":
        for isa in instruction_sets():
            for threads in sorted({1, min(2, torch.get_num_threads())}):
                build = bind(normals, threads=threads, isa=isa)
                found.append(Spec(normals_name(threads, isa), ("float32",), build))
    else:
        found.append(Spec("normals", ("float32",), bind(normals, threads=None, isa=None)))
    one = ("float32",)
    large = [
        *(Spec(loops.unet_name(batch), one, bind(loops.flow_unet, batch=batch)) for batch in (1, 16)),
        Spec(loops.dit_name(), one, loops.flow_dit),
    ]
    return [
        *found,
        Spec(f"flow, Euler, MLP {loops.BATCH}x{loops.WIDTH}", one, loops.flow_mlp),
        Spec(f"flow, Heun, MLP {loops.BATCH}x{loops.WIDTH}", one, loops.heun_mlp),
        Spec(f"DDIM, MLP {loops.BATCH}x{loops.WIDTH}", one, loops.ddim_mlp),
        Spec(f"flow, Euler, conv {loops.IMAGES}x{loops.SIDE}x{loops.SIDE}", one, loops.flow_conv),
        *(large if device.type == "cuda" else []),
    ]


def chosen(device: torch.device, only: str | None) -> list[Spec]:
    """The cases whose name contains `only`, or matches it as a pattern of * and ?."""
    if only is None:
        return specs(device)
    return [s for s in specs(device) if only in s.name or fnmatch.fnmatchcase(s.name, only)]


def elements_of(mib: float) -> int:
    """Elements of a tensor whose float32 is `mib` MiB."""
    return max(math.prod((4, 64, 64)), round(mib * (1 << 20)) // 4)
