"""Builds genkern's compiled halves: libgenkern_torch.so and _arrays (build_tools/plan.py says from what).

GENKERN_CUDA chooses the CUDA half: "auto" (the default) builds it where a usable nvcc is found, "1" insists, "0" leaves
it out. TORCH_CUDA_ARCH_LIST overrides the GPU architectures, CXX names the C++ compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_tools import plan, record, toolchain  # noqa: E402  (a PEP 517 build does not put this folder on the path)
from build_tools.toolchain import BuildProblem  # noqa: E402


def find_tools(switch: str) -> tuple[plan.Tools | None, str | None]:
    """The tools of this build (None where the platform has no kernels), and why there is no CUDA half."""
    if switch not in ("auto", "0", "1"):
        raise BuildProblem(f"GENKERN_CUDA is {switch!r}: set it to auto, 0 or 1.")
    machine = toolchain.machine()
    if machine is None:
        return None, "kernels are built on Linux x86-64 and aarch64"
    nvcc, why_not = None, "GENKERN_CUDA=0"
    if switch != "0":
        try:
            nvcc, why_not = toolchain.find_nvcc(), None
        except BuildProblem as problem:
            if switch == "1":
                raise BuildProblem(f"GENKERN_CUDA=1, but {problem}") from None
            why_not = str(problem)
    architectures = toolchain.cuda_architectures(nvcc) if nvcc else []
    compiler, torch = toolchain.find_compiler(), toolchain.find_torch()
    pybind11 = toolchain.find_package("pybind11")
    return plan.Tools(machine, compiler, torch, pybind11, nvcc, tuple(architectures)), why_not


class BuildKernels(build_ext):
    """Compiles through ninja, into the wheel's tree or, for an editable install, into the source tree."""

    def run(self) -> None:
        try:
            self.build_kernels()
        except BuildProblem as problem:
            # SystemExit is what pip shows without a traceback.
            raise SystemExit(f"\nerror: {problem}") from None

    def build_kernels(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "genkern"
        tools, why_no_cuda = find_tools(os.environ.get("GENKERN_CUDA", "auto"))
        (package / "_lib").mkdir(parents=True, exist_ok=True)
        if tools is not None:
            folder = plan.build_folder(tools.machine)
            libraries = plan.write(ROOT, folder, tools)
            command = [toolchain.find_ninja(), "-f", str(folder / "build.ninja")]
            if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
                raise BuildProblem("compiling failed; what the compiler says is above.")
            replace(ROOT / libraries.torch, package / "_lib" / libraries.torch.name)
            replace(ROOT / libraries.arrays, package / libraries.arrays.name)
        built = record.of(tools, why_no_cuda)
        record.write(package / "_build.json", built)
        print("\n".join(record.lines(built)), flush=True)

    def get_outputs(self) -> list[str]:
        names = ["_build.json", "_lib/libgenkern_torch.so", Path(self.get_ext_filename("_arrays")).name]
        return [str(Path(self.build_lib, "genkern", name)) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        built = self.get_outputs() if self.inplace else []
        return {path: str(Path(os.path.relpath(path, self.build_lib))) for path in built}


def replace(source: Path, target: Path) -> None:
    """Puts a new file in target's place at once: a process that has the old library loaded keeps it."""
    fresh = target.with_name(target.name + ".new")
    shutil.copy2(source, fresh)
    os.replace(fresh, target)


setup(ext_modules=[Extension("genkern._arrays", sources=[])], cmdclass={"build_ext": BuildKernels})
