"""Why a compiled half does not load, in one sentence that also says what to do.

The loader's own words ("undefined symbol: ...", "invalid ELF header") name an effect. The cause is one of: a torch that
is older than the stable ABI in use, a library of another machine or Python, a system library older than the one that it
was built with, a torch that lacks a symbol, a GPU driver older than the CUDA runtime inside the library.
"""

from __future__ import annotations

import ctypes
import json
import pathlib
import platform
import re
import sys
from typing import Any

TORCH_MINIMUM = (2, 10)
REINSTALL = "run pip install --force-reinstall --no-deps . in genkern's source tree"

_ELF_MACHINES = {3: "32-bit x86", 40: "32-bit Arm", 62: "x86_64", 183: "aarch64", 243: "RISC-V"}
_PACKAGE = pathlib.Path(__file__).parent


def build() -> dict[str, Any] | None:
    """What the build wrote down (build_tools/record.py), None in a tree that was never built."""
    try:
        record: dict[str, Any] = json.loads((_PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return None
    return record


def old_torch(version: str) -> str | None:
    """A sentence where this torch is too old for the library, else None."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers >= TORCH_MINIMUM:
        return None
    return f"genkern's kernels need torch 2.10 or newer and this is torch {version}: pip install --upgrade torch"


def old_driver(driver: int, nvcc: str) -> str | None:
    """A sentence where the GPU driver cannot run the CUDA half, else None.

    Args:
        driver: the newest CUDA that the driver runs, as the driver reports it: 1000 major + 10 minor; 0 without one.
        nvcc: the version of the toolkit that compiled the CUDA half, as "13.0.88".
    """
    major = int(nvcc.partition(".")[0])
    if driver == 0 or driver // 1000 >= major:
        return None
    newest = f"{driver // 1000}.{driver % 1000 // 10}"
    return (
        f"genkern's CUDA half was compiled by CUDA {nvcc} and this GPU's driver runs CUDA up to {newest}: update the "
        f"driver, or set CUDA_HOME to a CUDA {driver // 1000} toolkit and {REINSTALL}"
    )


def driver_version() -> int:
    """The newest CUDA that this machine's GPU driver runs: 1000 major + 10 minor; 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def missing(library: str) -> str:
    """A sentence for a library that is not there."""
    built = build()
    if built is None:
        return f"{library} is not built: run pip install -e . in genkern's source tree"
    if built["cpu"] is None:
        return f"{library} is not built on {built['platform']}: kernels exist on Linux x86_64 and aarch64"
    if library.startswith("_arrays") and version_pair(built["python"]) != sys.version_info[:2]:
        here = ".".join(map(str, sys.version_info[:2]))
        return f"{library} was built for Python {built['python']} and this is Python {here}: {REINSTALL}"
    return f"{library} is missing from an installation that built it: {REINSTALL}"


def load_error(path: pathlib.Path, error: BaseException, torch_version: str | None = None) -> str:
    """A sentence for a library that is there and does not load.

    Args:
        path: the library.
        error: what the loader raised.
        torch_version: the torch at run time, for the library that needs one.
    """
    machine = elf_machine(path)
    if machine is None:
        return f"{path.name} is no library of Linux (damaged, or copied from another system): {REINSTALL}"
    if machine != platform.machine():
        return f"{path.name} was built for {machine} and this machine is {platform.machine()}: {REINSTALL}"
    text = str(error)
    version = re.search(r"version [`']((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)' not found", text)
    if version is not None:
        return f"{path.name} was built on a newer Linux (it needs {version[1]}, which this system lacks): {REINSTALL}"
    symbol = re.search(r"undefined symbol: (\w+)", text)
    if symbol is not None:
        built = build()
        of_build = built["cpu"]["torch"] if built and built["cpu"] else "another version"
        here = f"torch {torch_version}" if torch_version else "this environment"
        return f"{path.name}, built with torch {of_build}, asks {here} for {symbol[1]}, which it lacks: {REINSTALL}"
    library = re.search(r"([\w.+-]+\.so[\w.]*): cannot open shared object file", text)
    if library is not None:
        return (
            f"{path.name} needs {library[1]}, which was not found: install the package that brings it, or {REINSTALL}"
        )
    return f"{path.name} did not load ({text}): {REINSTALL}"


def elf_machine(path: pathlib.Path) -> str | None:
    """The machine that an ELF file was built for, as platform.machine() names it; None where it is no ELF file."""
    with path.open("rb") as file:
        head = file.read(20)
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    code = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    return _ELF_MACHINES.get(code, f"ELF machine {code}")


def version_pair(version: str) -> tuple[int, int]:
    """(3, 11) of "3.11.7"."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
