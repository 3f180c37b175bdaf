"""The CUDA kernels' sources, run on a CPU: their indexing, rows and reductions are tested where there is no GPU.

tests/native/emulation/check.cpp and check_stat.cpp send random passes (shapes, strides, types, terms, the ways a row
arrives) through the CPU kernels of every instruction set and through the emulated CUDA kernels, and compare what they
wrote.
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
PROGRAMS = {"check": 300, "check_stat": 120}  # passes

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="compares the x86-64 instruction sets"
    ),
]


def few_blocks(folder: Path) -> Path:
    """A copy of the kernels' headers by which small passes, too, give a block several chunks or tiles."""
    shutil.copytree(KERNELS, folder)
    launch = folder / "launch_cuda.cuh"
    text = launch.read_text()
    many = "constexpr int64_t kManyBlocks = 4096;"
    assert text.count(many) == 1
    launch.write_text(text.replace(many, many.replace("4096", "2")))
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled comparisons."""
    build = tmp_path_factory.mktemp("emulation")
    jobs: list[list[str]] = []
    headers = few_blocks(build / "kernels")
    for kernel in ("map", "map_elementwise", "reduce", "stat", "quantile"):
        emulated = build / f"{kernel}_cuda.cpp"
        subprocess.run([sys.executable, EMULATION / "prepare.py", KERNELS / f"{kernel}_cuda.cu", emulated], check=True)
        jobs.append([f"-I{headers}", *FLAGS, "-mfma", "-c", str(emulated), "-o", str(build / f"{kernel}_cuda.o")])
        source = KERNELS / f"{kernel}_cpu.cpp"
        for isa, flags in ISA_FLAGS.items() if source.exists() else ():
            target = build / f"{kernel}_{isa}.o"
            jobs.append([*FLAGS, *flags, f"-DGENKERN_ISA={isa}", "-c", str(source), "-o", str(target)])
    jobs += [
        [*FLAGS, "-c", str(source), "-o", str(build / f"{source.stem}.o")]
        for source in (*KERNELS.glob("*dispatch.cpp"), KERNELS / "streamed.cpp")
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: subprocess.run(["g++", *job], check=True), jobs))
        links = [[*FLAGS, str(EMULATION / f"{name}.cpp"), *map(str, build.glob("*.o"))] for name in PROGRAMS]
        names = [["-o", str(build / name)] for name in PROGRAMS]
        list(pool.map(lambda link, name: subprocess.run(["g++", *link, *name], check=True), links, names))
    return build


@pytest.mark.parametrize("name", PROGRAMS)
def test_emulated_cuda_kernels_write_the_bits_of_the_cpu_kernels(name: str, programs: Path) -> None:
    done = subprocess.run([programs / name, str(PROGRAMS[name])], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == f"passes {PROGRAMS[name]}"
