"""The CUDA kernels' sources, run on a CPU: their indexing, rows and reductions are tested where there is no GPU.

tests/native/emulation/check.cpp sends random passes (shapes, strides, types, terms, the ways a row arrives) through the
CPU kernels of every instruction set and through the emulated CUDA kernels, and compares every byte that they wrote.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "native" / "emulation"
KERNELS = ROOT / "csrc" / "kernels"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    f"-I{EMULATION}",
    f"-I{KERNELS}",
]
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="compares the x86-64 instruction sets"
    ),
]


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled comparison."""
    build = tmp_path_factory.mktemp("emulation")
    jobs: list[list[str]] = []
    for kernel in ("map", "map_elementwise", "reduce"):
        emulated = build / f"{kernel}_cuda.cpp"
        subprocess.run([sys.executable, EMULATION / "prepare.py", KERNELS / f"{kernel}_cuda.cu", emulated], check=True)
        jobs.append([*FLAGS, "-mfma", "-c", str(emulated), "-o", str(build / f"{kernel}_cuda.o")])
        if not (KERNELS / f"{kernel}_cpu.cpp").exists():
            continue
        for isa, flags in ISA_FLAGS.items():
            source, target = KERNELS / f"{kernel}_cpu.cpp", build / f"{kernel}_{isa}.o"
            jobs.append([*FLAGS, *flags, f"-DGENKERN_ISA={isa}", "-c", str(source), "-o", str(target)])
    jobs.append([*FLAGS, "-c", str(KERNELS / "dispatch.cpp"), "-o", str(build / "dispatch.o")])
    jobs.append([*FLAGS, "-c", str(EMULATION / "check.cpp"), "-o", str(build / "check.o")])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: subprocess.run(["g++", *job], check=True), jobs))
    program = build / "check"
    subprocess.run(["g++", *map(str, build.glob("*.o")), "-o", str(program)], check=True)
    return program


def test_emulated_cuda_kernels_write_the_bits_of_the_cpu_kernels(check: Path) -> None:
    done = subprocess.run([check, "300"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "passes 300"
