"""What a result was measured on: the processor, versions of everything compared, the revision, the date."""

from __future__ import annotations

import datetime
import pathlib
import platform
import re
import subprocess
from importlib import metadata
from typing import Any

import torch

from .. import _diagnose, info

COMPARED = (
    "genkern",
    "torch",
    "triton",
    "diffusers",
    "flow_matching",
    "torchcfm",
    "torchdiffeq",
    "k-diffusion",
    "numpy",
)


def describe(device: torch.device) -> dict[str, Any]:
    """The facts that go with a result, by name."""
    facts = info.as_dict()
    found = {
        "name": name_of(device),
        "device": device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": facts["instruction_set"],
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "revision": revision(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "built": facts["built"],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["driver"] = _diagnose.driver_version()
        found["cuda"] = torch.version.cuda
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["gib"] = round(properties.total_memory / 2**30, 1)
    return found


def name_of(device: torch.device) -> str:
    """The GPU's name, or the processor's with its threads in use."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name as the kernel tells it, without its trademarks."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return re.sub(r"\s+", " ", re.sub(r"\((R|TM|tm|r)\)", "", name)).strip()


def slug(device: torch.device) -> str:
    """The stem of a result's files: the machine's name and the device."""
    return re.sub(r"[^a-z0-9]+", "-", name_of(device).lower()).strip("-") + f"-{device.type}"


def versions() -> dict[str, str]:
    """Versions of what is compared and installed."""
    found = {}
    for package in COMPARED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)
    return found


def revision() -> str | None:
    """The revision of the checkout that this package lies in, with "+" where files were changed; None outside one."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + "+" * bool(_git(root, "status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: pathlib.Path, *arguments: str) -> str:
    found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return found.stdout.strip()
