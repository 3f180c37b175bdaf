"""What was built: genkern/_build.json, which `genkern info` reads, and the lines at the end of a build."""

from __future__ import annotations

import json
import platform
import sysconfig
from pathlib import Path
from typing import Any

from .plan import INSTRUCTION_SETS, Tools


def of(tools: Tools | None, why_no_cuda: str | None) -> dict[str, Any]:
    """The record of a build; without tools, of one that compiled nothing."""
    record: dict[str, Any] = {
        "platform": sysconfig.get_platform(),
        "python": platform.python_version(),
        "cpu": None,
        "cuda": None,
        "why_no_cuda": why_no_cuda,
    }
    if tools is not None:
        record["cpu"] = {
            "instruction_sets": list(INSTRUCTION_SETS[tools.machine]),
            "compiler": tools.compiler.version,
            "torch": tools.torch.version,
        }
        if tools.nvcc is not None:
            record["cuda"] = {"nvcc": tools.nvcc.version, "architectures": list(tools.architectures)}
    return record


def lines(record: dict[str, Any]) -> list[str]:
    """The record for a reader."""
    cpu, cuda = record["cpu"], record["cuda"]
    if cpu is None:
        return [f"genkern: no kernels on {record['platform']}; everything runs in plain PyTorch"]
    built = [f"genkern: CPU half ({', '.join(cpu['instruction_sets'])}), {cpu['compiler']}, torch {cpu['torch']}"]
    if cuda is not None:
        built.append(f"genkern: CUDA half ({', '.join(cuda['architectures'])}), nvcc {cuda['nvcc']}")
    else:
        built.append(f"genkern: no CUDA half: {record['why_no_cuda']}")
    return built


def write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")
