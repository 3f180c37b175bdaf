"""What is compiled, with which flags, into which library: written down as one ninja file.

    csrc/kernels/*_cpu.cpp    once for each instruction set     ┐
    csrc/kernels/*.cpp        the others once                   ├─ objects of both libraries
    csrc/kernels/*_cuda.cu    once, for every GPU architecture  ┘
    csrc/torch/*.cpp      ->  genkern/_lib/libgenkern_torch.so  LibTorch stable ABI
    csrc/python/*.cpp     ->  genkern/_arrays.*.so              pybind11

Nothing but the fused multiply-adds that the sources name may be contracted (-ffp-contract=off, -fmad=false): the CPU's
and the GPU's results are the same bits. The libraries carry no path of the build: libtorch is the one that
`import torch` has loaded, and the CUDA runtime is linked in.
"""

from __future__ import annotations

import dataclasses
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from .toolchain import Compiler, Nvcc, Package, gencode

CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math"
    " -Wall -Wextra".split()
)
NVCC_FLAGS = (
    "-std=c++17 -O3 -fmad=false -cudart static"
    " --compiler-options -fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra".split()
)
# The oldest torch whose stable ABI is used, as torch's headers encode it: 2.10.
TORCH_TARGET_VERSION = "0x020a000000000000"

INSTRUCTION_SETS = {
    "x86_64": {
        "scalar": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512".split(),
    },
    "aarch64": {"scalar": []},
}


@dataclasses.dataclass(frozen=True)
class Tools:
    """Everything that a build was given."""

    machine: str
    compiler: Compiler
    torch: Package
    pybind11: Package
    nvcc: Nvcc | None
    architectures: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Libraries:
    """The two results, relative to the repository's root."""

    torch: Path
    arrays: Path


def _quoted(words: Iterable[str]) -> str:
    """Words of a command in a ninja file, for a shell."""
    return " ".join("'" + w.replace("$", "$$") + "'" if set(w) & set(" '\"$();&<>") else w for w in words)


def _escaped(path: Path | str) -> str:
    """A path in a build statement."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _linked(folder: Path, name: str, package: Package, target: Path) -> Path:
    """A link to a package's folder, so that commands are the same when an isolated build installs it elsewhere."""
    link = folder / f"{name}-{package.version}"
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target.resolve(), target_is_directory=True)
    return link


def write(root: Path, folder: Path, tools: Tools) -> Libraries:
    """Writes folder/build.ninja, whose commands run in root; paths in it are relative to root."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    torch = _linked(root / folder, "torch", tools.torch, tools.torch.path).relative_to(root)
    pybind11 = _linked(root / folder, "pybind11", tools.pybind11, tools.pybind11.path / "include").relative_to(root)
    libraries = Libraries(
        folder / "libgenkern_torch.so", folder / ("_arrays" + str(sysconfig.get_config_var("EXT_SUFFIX")))
    )
    with_cuda = ["-DGENKERN_WITH_CUDA"] if tools.nvcc else []
    cuda_headers = [word for include in tools.nvcc.includes for word in ("-isystem", include)] if tools.nvcc else []
    lines = ["ninja_required_version = 1.8", f"builddir = {_escaped(folder)}", *_rules(tools)]
    objects: list[Path] = []

    def compile_one(rule: str, source: Path, flags: Iterable[str], tag: str = "") -> Path:
        relative = source.relative_to(root)
        target = folder / "objects" / relative.with_name(f"{relative.stem}{tag}.o")
        lines.append(f"build {_escaped(target)}: {rule} {_escaped(relative)}\n  flags = {_quoted(flags)}")
        return target

    for source in sorted((root / "csrc/kernels").glob("*.cpp")):
        if source.stem.endswith("_cpu"):
            for isa, flags in INSTRUCTION_SETS[tools.machine].items():
                objects.append(compile_one("cxx", source, [f"-DGENKERN_ISA={isa}", *flags], f".{isa}"))
        else:
            objects.append(compile_one("cxx", source, with_cuda))
    if tools.nvcc:
        for source in sorted((root / "csrc/kernels").glob("*_cuda.cu")):
            objects.append(compile_one("nvcc", source, gencode(tools.architectures), ".cu"))

    torch_flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", str(torch / "include"), *with_cuda]
    if tools.nvcc:
        torch_flags.append("-DUSE_CUDA")
    faces = [compile_one("cxx", source, torch_flags) for source in sorted((root / "csrc/torch").glob("*.cpp"))]
    link_torch = ["-Wl,--no-as-needed", f"-L{torch / 'lib'}", "-ltorch"]
    lines.append(_link(libraries.torch, [*faces, *objects], link_torch, tools))

    python = [
        "-isystem",
        sysconfig.get_path("include"),
        "-isystem",
        str(pybind11),
        "-fopenmp",
        *with_cuda,
        *cuda_headers,
    ]
    faces = [compile_one("cxx", source, python) for source in sorted((root / "csrc/python").glob("*.cpp"))]
    lines.append(_link(libraries.arrays, [*faces, *objects], ["-fopenmp"], tools))
    (root / folder / "build.ninja").write_text("\n".join(lines) + "\n")
    return libraries


def _rules(tools: Tools) -> list[str]:
    # -MMD leaves system headers out: those of torch and pybind11 are followed by the version in their links' names.
    def rule(name: str, command: list[str], words: str, described: str, depfile: bool = True) -> str:
        text = f"rule {name}\n  command = {_quoted(command)} {words}\n  description = {described} $out"
        return text + ("\n  depfile = $out.d\n  deps = gcc" if depfile else "")

    cxx = list(tools.compiler.command)
    rules = [rule("cxx", [*cxx, *CXX_FLAGS], "$flags -MMD -MF $out.d -c $in -o $out", "C++")]
    if tools.nvcc:
        nvcc = [tools.nvcc.path, *NVCC_FLAGS]
        rules.append(rule("nvcc", nvcc, "$flags -MMD -MF $out.d -c $in -o $out", "CUDA"))
        # nvcc knows where its own static runtime is. Nothing is relocatable device code, so no device link.
        link = [tools.nvcc.path, "-shared", "-cudart", "static", "-nodlink"]
        rules.append(rule("link", link, "$in -o $out $flags", "link", depfile=False))
    else:
        rules.append(rule("link", [*cxx, "-shared"], "$in -o $out $flags", "link", depfile=False))
    return rules


def _link(library: Path, objects: list[Path], flags: list[str], tools: Tools) -> str:
    if tools.nvcc:  # nvcc hands on what it does not know itself
        flags = [word for flag in ["-Wl,--exclude-libs,ALL", *flags] for word in _through_nvcc(flag)]
    inputs = " ".join(map(_escaped, objects))
    return f"build {_escaped(library)}: link {inputs}\n  flags = {_quoted(flags)}"


def _through_nvcc(flag: str) -> list[str]:
    if flag.startswith("-Wl,"):
        return ["-Xlinker", flag.removeprefix("-Wl,")]
    return ["-Xcompiler", flag] if flag.startswith("-f") else [flag]


def build_folder(machine: str) -> Path:
    """Where objects are kept between builds, relative to the repository's root: one folder a Python version."""
    suffix = str(sysconfig.get_config_var("EXT_SUFFIX")).split(".")[1]
    return Path("build", f"genkern-{machine}-{suffix}") if os.name == "posix" else Path("build", "genkern")
