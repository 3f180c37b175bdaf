"""Writes tests/data/noise_vectors.json: vectors that freeze the noise contract. Run once; a change of the file is
a change of every seed's numbers.

Words come from Philox in Python's integers and uniforms from exact fractions, both written here from their definitions.
Normals are the float32 numbers of csrc/kernels/philox.h, compiled for the baseline instruction set; before they are
written they are compared with Box-Muller in 120-bit arithmetic, and the uniforms with the compiled ones.

    python tools/freeze_noise.py            write the file
    python tools/freeze_noise.py --check    compare it with what would be written
"""

from __future__ import annotations

import json
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

from mpmath import mp, mpf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from native_noise import NativeNoise  # noqa: E402

PATH = ROOT / "tests" / "data" / "noise_vectors.json"
MASK32, MASK64, TOP = (1 << 32) - 1, (1 << 64) - 1, (1 << 64) - 1
mp.prec = 120

# (seed, stream, draw, sample id, first quad); ids in two's complement. Four quads each.
CASES = (
    (0, 0, 0, 0, 0),
    (0, 0, 0, 1, 0),
    (0, 1, 0, 0, 0),
    (1, 0, 0, 0, 0),
    (0, 0, 1, 0, 0),
    (TOP, TOP, MASK32, TOP, 0),
    (1 << 63, 1 << 63, 1 << 31, 1 << 63, 0),
    ((1 << 63) - 1, (1 << 32) - 1, 2 << 24 | 49, (1 << 63) - 1, 0),
    (1 << 32, 1 << 32, 4 << 24, 1 << 32, 0),
    (0x0123456789ABCDEF, 0xFEDCBA9876543210, 5 << 24 | 7, 123456789012, 0),
    (42, 1000, 1 << 24, 17, 0),
    (42, 1000, 1 << 24, 17, 4),
    (42, 1000, 1 << 24, 17, 1000),
    (42, 1000, 1 << 24, 17, (1 << 31) - 2),
    (42, 1000, 1 << 24, 17, (1 << 32) - 4),
)
QUADS = 4


def mix64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK64
    return x ^ x >> 31


def philox(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & MASK32, p0 >> 32 ^ c3 ^ k1, p0 & MASK32
        k0, k1 = k0 + 0x9E3779B9 & MASK32, k1 + 0xBB67AE85 & MASK32
    return [c0, c1, c2, c3]


def words(seed: int, stream: int, draw: int, sample_id: int, quad: int) -> list[int]:
    key = seed ^ mix64(stream)
    return philox([quad, draw, sample_id & MASK32, sample_id >> 32], [key & MASK32, key >> 32])


def uniform(word: int) -> float:
    """(word + 1/2) 2^-32 to the nearest float32, or the one below 1."""
    u = Fraction(2 * word + 1, 1 << 33)
    scale = 1 << 24
    while u * scale < 1 << 23:
        scale *= 2
    return min(float(Fraction(round(u * scale), scale)), 1.0 - 2.0**-24)


def box_muller(w0: int, w1: int) -> tuple[Any, Any]:
    radius = mp.sqrt(-2 * mp.log((w0 + mpf(1) / 2) / 2**32))
    angle = 2 * mp.pi * w1 / 2**32
    return radius * mp.cos(angle), radius * mp.sin(angle)


def vectors() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        native = NativeNoise("scalar", Path(folder))
    found = []
    for seed, stream, draw, sample_id, first in CASES:
        four = [words(seed, stream, draw, sample_id, first + q) for q in range(QUADS)]
        flat = [w for quad in four for w in quad]
        noise = {"seed": seed, "stream": stream, "draw": draw, "sample_id": sample_id}
        normals = native.quads("normals_by_quad", first, QUADS, **noise).tolist()
        exact = [z for w in four for z in (*box_muller(w[0], w[1]), *box_muller(w[2], w[3]))]
        for z, e in zip(normals, exact, strict=True):
            if abs(z - e) > 1e-6 * max(1, abs(e)):
                raise ArithmeticError(f"{noise}: normal {z}, expected {e}")
        uniforms = [uniform(w) for w in flat]
        if uniforms != native.quads("uniforms_by_quad", first, QUADS, **noise).tolist():
            raise ArithmeticError(f"{noise}: uniforms differ")
        case = {name: hex(value) for name, value in noise.items()}
        found.append(
            case
            | {"first": 4 * first, "words": [f"{w:08x}" for w in flat]}
            | {"uniforms": [u.hex() for u in uniforms], "normals": [z.hex() for z in normals]}
        )
    return found


def text() -> str:
    rows = [json.dumps(case) for case in vectors()]
    return "[\n" + ",\n".join(rows) + "\n]\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PATH.read_text() == text() else f"{PATH}: differs from what would be written")
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text())
