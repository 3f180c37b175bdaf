"""What this installation is: version, compiled halves, architectures, torch, devices. `genkern info` prints it."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from . import _diagnose, _library


def as_dict() -> dict[str, Any]:
    """The facts, by name.

    Returns:
        version: genkern's, None where it is not installed.
        python: the interpreter's version.  platform: the operating system and machine.
        built: what the build wrote down (its compiler, torch, nvcc, architectures), None where nothing was built.
        torch: {"version", "cuda"} at run time, cuda the version that torch was built with; None without torch.
        kernels: device types that torch tensors have kernels for, "cpu" and "cuda".
        arrays: whether NumPy and DLPack arrays have them.
        instruction_set: what the CPU's kernels use here: "scalar", "avx2", "avx512"; None without them.
        devices: the GPUs, {"name", "capability", "gib"} each.
        missing: a sentence on what did not load, or None.
    """
    ops = _library.torch_ops()
    torch, devices = _torch_and_devices()
    return {
        "version": _version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "built": _diagnose.build(),
        "torch": torch,
        "kernels": sorted(_library.torch_devices()),
        "arrays": _library.arrays() is not None,
        "instruction_set": None if ops is None else ops.cpu_isa(""),
        "devices": devices,
        "missing": _library.why_missing(),
    }


def report() -> str:
    """The facts for a reader, a line each."""
    facts = as_dict()
    built, torch = facts["built"], facts["torch"]
    lines = [("genkern", facts["version"] or "not installed")]
    lines.append(("python", f"{facts['python']}, {facts['platform']}"))
    lines.append(("torch", "not installed" if torch is None else f"{torch['version']}, {_cuda_of(torch)}"))
    lines.append(("CPU half", _cpu_half(facts)))
    lines.append(("CUDA half", _cuda_half(facts)))
    lines.append(("arrays", "NumPy and DLPack" if facts["arrays"] else "no kernels: NumPy arrays run in plain PyTorch"))
    if built and built["cpu"]:
        lines.append(
            ("built with", f"torch {built['cpu']['torch']}, {built['cpu']['compiler']}, Python {built['python']}")
        )
    for index, device in enumerate(facts["devices"]):
        text = f"{device['name']}, compute capability {device['capability']}, {device['gib']:.0f} GiB"
        lines.append((f"cuda:{index}", text))
    if not facts["devices"]:
        lines.append(("devices", "cpu"))
    if facts["missing"]:
        lines.append(("missing", facts["missing"]))
    return "\n".join(f"{name:<11} {text}" for name, text in lines)


def _cpu_half(facts: dict[str, Any]) -> str:
    if "cpu" not in facts["kernels"]:
        return "none: torch tensors run in plain PyTorch (genkern.reference)"
    built = facts["built"]
    compiled = f", of {', '.join(built['cpu']['instruction_sets'])}" if built and built["cpu"] else ""
    return f"{facts['instruction_set']}{compiled}"


def _cuda_half(facts: dict[str, Any]) -> str:
    built = facts["built"]
    if "cuda" not in facts["kernels"]:
        why = built and built["why_no_cuda"]
        return f"none: {why}" if why else "none"
    if built and built["cuda"]:
        return f"architectures {', '.join(built['cuda']['architectures'])}, nvcc {built['cuda']['nvcc']}"
    return "built"


def _cuda_of(torch: dict[str, Any]) -> str:
    return f"CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA"


def _version() -> str | None:
    try:
        return metadata.version("genkern")
    except metadata.PackageNotFoundError:
        return None


def _torch_and_devices() -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    try:
        import torch
    except ImportError:
        return None, []
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        devices.append({"name": properties.name, "capability": capability, "gib": properties.total_memory / 2**30})
    return {"version": str(torch.__version__), "cuda": torch.version.cuda}, devices
