"""csrc/kernels/noise_block.h in Python: tests/native/noise_check.cpp compiled for an instruction set, by ctypes."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
)
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512".split(),
}
_CPU_FLAGS = {"scalar": (), "avx2": ("avx2", "fma"), "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl")}


def why_not(isa: str) -> str | None:
    """Why the library of an instruction set cannot be compiled and run here; None where it can."""
    if shutil.which("g++") is None:
        return "no g++ on this machine"
    if isa != "scalar" and platform.machine() != "x86_64":
        return f"{isa} is an instruction set of x86-64"
    here = Path("/proc/cpuinfo")
    flags = set(here.read_text().split()) if here.exists() else set()
    missing = [flag for flag in _CPU_FLAGS[isa] if flag not in flags]
    return f"this CPU has no {', '.join(missing)}" if missing else None


class NativeNoise:
    """The noise functions compiled for one instruction set. Seeds, streams and ids: 0 .. 2^64 - 1."""

    def __init__(self, isa: str, folder: Path) -> None:
        library = folder / f"noise_{isa}.so"
        source = ROOT / "tests" / "native" / "noise_check.cpp"
        include = f"-I{ROOT / 'csrc' / 'kernels'}"
        subprocess.run(
            ["g++", *FLAGS, *ISA_FLAGS[isa], include, f"-DGENKERN_ISA={isa}", source, "-o", library], check=True
        )
        self._library = ctypes.CDLL(str(library))
        self._library.mix.restype = ctypes.c_uint64

    def philox(self, counter: list[int], key: list[int]) -> list[int]:
        words = np.empty(4, np.uint32)
        self._library.philox(_p(np.array(counter, np.uint32)), _p(np.array(key, np.uint32)), _p(words))
        return words.tolist()

    def mix64(self, x: int) -> int:
        return int(self._library.mix(ctypes.c_uint64(x)))

    def pairs(self, w0: np.ndarray, w1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """z0, z1 of each pair of uint32 words, float32."""
        z0, z1 = np.empty(len(w0), np.float32), np.empty(len(w0), np.float32)
        self._library.pairs(_p(w0), _p(w1), len(w0), _p(z0), _p(z1))
        return z0, z1

    def uniform_of(self, words: np.ndarray) -> np.ndarray:
        u = np.empty(len(words), np.float32)
        self._library.uniform_of(_p(words), len(words), _p(u))
        return u

    def quads(
        self, name: str, first: int, count: int, seed: int = 0, stream: int = 0, draw: int = 0, sample_id: int = 0
    ) -> np.ndarray:
        """name: normals, uniforms, normals_by_quad or uniforms_by_quad, of `count` quads from `first` on."""
        # Four guards behind the end: a library that writes past it is found out.
        numbers = np.full(4 * count + 4, np.nan, np.float32)
        function = getattr(self._library, name)
        function(_p(numbers), ctypes.c_uint64(first), count, *_noise(seed, stream, draw, sample_id))
        assert np.isnan(numbers[4 * count :]).all(), f"{name} wrote past its end"
        return numbers[: 4 * count]

    def at(
        self, name: str, index: np.ndarray, seed: int = 0, stream: int = 0, draw: int = 0, sample_id: int = 0
    ) -> np.ndarray:
        """name: normals_of or uniforms_of, of the elements index (uint64)."""
        numbers = np.full(len(index) + 4, np.nan, np.float32)
        getattr(self._library, name)(_p(numbers), _p(index), len(index), *_noise(seed, stream, draw, sample_id))
        assert np.isnan(numbers[len(index) :]).all(), f"{name} wrote past its end"
        return numbers[: len(index)]


def _p(array: np.ndarray) -> Any:
    return ctypes.c_void_p(array.ctypes.data)


def _noise(seed: int, stream: int, draw: int, sample_id: int) -> tuple[Any, ...]:
    return ctypes.c_uint64(seed), ctypes.c_uint64(stream), ctypes.c_uint32(draw), ctypes.c_uint64(sample_id)
