"""The tools of a build, each found or missing in one sentence.

Needed always: a C++17 compiler with OpenMP, ninja, pybind11, torch's headers. Needed for the CUDA half: nvcc.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

TORCH_MINIMUM = (2, 10)
NVCC_OLDEST, NVCC_NEWEST_MAJOR = (12, 0), 13

# One entry a major architecture: code for 8.0 also runs on 8.6 and 8.9, that for 10.0 on 10.3, that for 12.0 on 12.1.
# The kernels are bound by memory, so finer entries would bring compile time and nothing else. PTX of the last serves
# what comes after.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")

MACHINES = ("x86_64", "aarch64")


class BuildProblem(Exception):
    """A sentence that says why the build cannot go on, and what to do."""


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command, and what it calls itself."""

    command: tuple[str, ...]
    version: str


@dataclasses.dataclass(frozen=True)
class Nvcc:
    """nvcc: its path, its version, its headers, and the architectures that it compiles for ("9.0", ...)."""

    path: str
    version: str
    includes: tuple[str, ...]
    architectures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Package:
    """An installed Python package that brings headers: its folder and version."""

    path: Path
    version: str


def machine() -> str | None:
    """The machine that kernels are compiled for, None where there are none."""
    return platform.machine() if sys.platform.startswith("linux") and platform.machine() in MACHINES else None


def version_of(text: str) -> tuple[int, int]:
    """(major, minor) of a version like "2.13.0+cpu"."""
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def output_of(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of a command; 127 where it cannot be started."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout


def compiles(command: Sequence[str], suffix: str, source: str, *flags: str) -> tuple[bool, str]:
    """Whether a small source is compiled and linked, and the first line of the complaint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe" + suffix)
        path.write_text(source)
        status, output = output_of([*command, *flags, str(path), "-o", str(path.with_suffix(".so"))])
    errors = [line.strip() for line in output.splitlines() if "error" in line] or output.strip().splitlines()
    return status == 0, errors[0] if errors else ""


def find_compiler(environ: Mapping[str, str] = os.environ) -> Compiler:
    """The C++ compiler: CXX, else c++, g++ or clang++ of the PATH.

    Raises:
        BuildProblem: there is none, or it compiles no C++17 with OpenMP for this machine's instruction sets.
    """
    named = shlex.split(environ.get("CXX", ""))
    found = named or next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])
    if not found or shutil.which(found[0]) is None:
        missing = (
            f"CXX names {found[0]}, which was not found" if found else "genkern needs a C++ compiler and found none"
        )
        raise BuildProblem(f"{missing}: install one (apt install g++, dnf install gcc-c++) and run the command again.")
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"] if machine() == "x86_64" else []
    source = (
        "#include <omp.h>\n#include <optional>\nint probe() { return std::optional(omp_get_max_threads()).value(); }\n"
    )
    flags = ("-std=c++17", "-shared", "-fPIC", "-fopenmp", *avx512)
    fine, complaint = compiles(found, ".cpp", source, *flags)
    version = output_of([*found, "--version"])[1].partition("\n")[0].strip()
    if not fine:
        raise BuildProblem(
            f"{shlex.join(found)} ({version}) compiles no C++17 with OpenMP here ({complaint}): use GCC 9 or newer, or "
            "clang 12 or newer with libomp; CXX names the compiler."
        )
    return Compiler(tuple(found), version)


def nvcc_path(environ: Mapping[str, str] = os.environ) -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of the PATH, or of /usr/local/cuda."""
    folders = [Path(environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    candidates = [*folders, *map(Path, environ.get("PATH", "").split(os.pathsep)), Path("/usr/local/cuda/bin")]
    return next((str(folder / "nvcc") for folder in candidates if os.access(folder / "nvcc", os.X_OK)), None)


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Nvcc:
    """nvcc, tried on an empty kernel with its host compiler.

    Raises:
        BuildProblem: there is none, its version is not supported, or it does not work with the host compiler.
    """
    path = nvcc_path(environ)
    if path is None:
        raise BuildProblem(
            "nvcc was not found: install the CUDA toolkit (12.0 to 13.x), or set CUDA_HOME to where it is, "
            "or set GENKERN_CUDA=0 to build the CPU half alone."
        )
    match = re.search(r"release (\d+)\.(\d+), V([\d.]+)", output_of([path, "--version"])[1])
    release = (int(match[1]), int(match[2])) if match else (0, 0)
    if not match or release < NVCC_OLDEST or release[0] > NVCC_NEWEST_MAJOR:
        found = match[3] if match else "of an unknown version"
        raise BuildProblem(
            f"{path} is {found}, and genkern is compiled by nvcc {NVCC_OLDEST[0]}.{NVCC_OLDEST[1]} to "
            f"{NVCC_NEWEST_MAJOR}.x: point CUDA_HOME at such a toolkit, or set GENKERN_CUDA=0 to build the CPU half "
            "alone."
        )
    fine, complaint = compiles([path], ".cu", "__global__ void probe() {}\n", "-shared", "-Xcompiler", "-fPIC")
    if not fine:
        raise BuildProblem(
            f"{path} ({match[3]}) does not compile an empty kernel ({complaint}): give it a host compiler that it "
            "supports with NVCC_PREPEND_FLAGS='-ccbin g++-12', or set GENKERN_CUDA=0 to build the CPU half alone."
        )
    listed = re.findall(r"compute_(\d+)(\d)\b", output_of([path, "--list-gpu-arch"])[1])
    # A dry run says where the headers are, whoever packaged the toolkit.
    settings = output_of([path, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull])[1]
    line = re.search(r"^#\$ INCLUDES=(.*)$", settings, re.MULTILINE)
    includes = [word.removeprefix("-I") for word in shlex.split(line[1])] if line else []
    return Nvcc(path, match[3], tuple(includes), tuple(f"{major}.{minor}" for major, minor in listed))


def cuda_architectures(nvcc: Nvcc, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The architectures to compile for: TORCH_CUDA_ARCH_LIST, else those of ARCHITECTURES that nvcc knows, the last
    with PTX.

    Raises:
        BuildProblem: TORCH_CUDA_ARCH_LIST names something that is no architecture of this nvcc.
    """
    asked = re.split(r"[\s;,]+", environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked == [""]:
        known = [name for name in ARCHITECTURES if name in nvcc.architectures]
        return [*known[:-1], known[-1] + "+PTX"]
    for name in asked:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", name)
        if match is None or match[1] not in nvcc.architectures:
            raise BuildProblem(
                f"TORCH_CUDA_ARCH_LIST names {name}, which is no architecture of nvcc {nvcc.version}: name some of "
                f"{', '.join(nvcc.architectures)}, with +PTX behind one that later GPUs shall run."
            )
    return list(dict.fromkeys(asked))


def gencode(architectures: Sequence[str]) -> list[str]:
    """nvcc's flags for architectures like "9.0" (code) or "12.0+PTX" (code, and PTX for what comes after)."""
    flags = []
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_package(name: str) -> Package:
    """An installed package, without importing it.

    Raises:
        BuildProblem: it is not installed where the build runs.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise BuildProblem(
            f"the build needs {name}, which is not installed here: leave out --no-build-isolation, "
            f"or install it first (pip install {name})."
        )
    return Package(Path(spec.origin).parent, importlib.metadata.version(name))


def find_torch() -> Package:
    """torch, whose headers and library the torch face is compiled against.

    Raises:
        BuildProblem: it is missing or older than 2.10, where the stable ABI lacks what genkern calls.
    """
    torch = find_package("torch")
    if version_of(torch.version) < TORCH_MINIMUM:
        raise BuildProblem(
            f"the build found torch {torch.version}, and genkern needs torch 2.10 or newer: "
            "leave out --no-build-isolation, or upgrade it first (pip install --upgrade torch)."
        )
    return torch


def find_ninja() -> str:
    """The path of ninja, of the ninja package or of the PATH."""
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja

        path = shutil.which("ninja", path=ninja.BIN_DIR)
        if path is not None:
            return path
    path = shutil.which("ninja")
    if path is None:
        raise BuildProblem(
            "the build needs ninja, which is not installed here: leave out --no-build-isolation, "
            "or install it first (pip install ninja)."
        )
    return path
