"""Philox and Box-Muller as the kernels have them, compiled for each instruction set: known answers, accuracy, bits."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from native_noise import ISA_FLAGS, ROOT, NativeNoise, why_not

ISAS = [pytest.param(isa, marks=pytest.mark.skipif(bool(why_not(isa)), reason=why_not(isa) or "")) for isa in ISA_FLAGS]
VECTORS = [isa for isa in ISAS if isa.values != ("scalar",)]
EXTREMES = (0, 1, 2**63 - 1, 2**63, 2**64 - 1)

# Random123's kat_vectors, philox4x32 10: counter, key, words.
KNOWN_ANSWERS = (
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NativeNoise]:
    folder = tmp_path_factory.mktemp("noise")
    return {isa: NativeNoise(isa, folder) for isa in ISA_FLAGS if why_not(isa) is None}


def box_muller(w0: np.ndarray, w1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float64; log1p keeps the digits of u near 1."""
    below = (w0 + 0.5) * 2.0**-32
    above = ((0xFFFFFFFF - w0) + 0.5) * 2.0**-32
    log = np.where(w0 < 2**31, np.log(below), np.log1p(-above))
    radius, angle = np.sqrt(-2.0 * log), w1 * (2.0 * np.pi * 2.0**-32)
    return radius * np.cos(angle), radius * np.sin(angle)


def worst_error(library: NativeNoise, w0: np.ndarray, w1: np.ndarray) -> float:
    """max |z - formula| / max(1, |formula|)."""
    exact = box_muller(w0.astype(np.float64), w1.astype(np.float64))
    return max(
        float(np.max(np.abs(z - e) / np.maximum(1.0, np.abs(e))))
        for z, e in zip(library.pairs(w0, w1), exact, strict=True)
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_its_authors(libraries, isa, counter, key, words):
    assert libraries[isa].philox(counter, key) == words


@pytest.mark.parametrize("isa", ISAS)
def test_mix64_is_the_finaliser_of_splitmix64(libraries, isa):
    # The generator's published outputs are mix64(k * golden ratio) for seed 0.
    golden = 0x9E3779B97F4A7C15
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert libraries[isa].mix64(0) == 0
    assert [libraries[isa].mix64(k * golden % 2**64) for k in (1, 2, 3)] == expected


@pytest.mark.parametrize("isa", ISAS)
def test_normals_are_within_1e_6_of_box_muller_at_the_edges(libraries, isa):
    centres = [0, *(1 << k for k in range(32))]
    centres += [round(2**32 * c) for c in (2**-0.5, 1 - 2**-0.5, 2**-1.5, 2**-2.5, 3 / 8, 5 / 8, 3 / 4, 7 / 8)]
    edges = np.unique([(c + d) % 2**32 for c in centres for d in range(-20, 21)]).astype(np.uint32)
    w0, w1 = (w.ravel().copy() for w in np.meshgrid(edges, edges))
    assert worst_error(libraries[isa], w0, w1) <= 4e-7


@pytest.mark.parametrize("isa", VECTORS)
def test_normals_are_within_1e_6_of_box_muller_over_2_to_the_25_random_words(libraries, isa):
    random = np.random.default_rng(0)
    for _ in range(8):
        w0, w1 = (random.integers(0, 2**32, 1 << 21, dtype=np.uint32) for _ in range(2))
        assert worst_error(libraries[isa], w0, w1) <= 4e-7


@pytest.mark.parametrize("isa", ISAS)
def test_uniforms_are_rounded_to_nearest_and_stay_inside_0_and_1(libraries, isa):
    edges = [(c + d) % 2**32 for c in (0, *(1 << k for k in range(32))) for d in range(-300, 301)]
    random = np.random.default_rng(0).integers(0, 2**32, 1 << 20, dtype=np.uint32)
    words = np.concatenate([np.array(edges, np.uint32), random])
    exact = (words.astype(np.float64) + 0.5) * 2.0**-32  # exact: 33 bits
    expected = np.minimum(exact.astype(np.float32), np.nextafter(np.float32(1), np.float32(0)))
    found = libraries[isa].uniform_of(words)
    np.testing.assert_array_equal(found, expected)
    assert 0 < found.min() and found.max() < 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["normals", "uniforms"])
def test_every_instruction_set_has_the_bits_of_one_quad_at_a_time(libraries, isa, name):
    for k, sample_id in enumerate(EXTREMES):
        noise = {"seed": EXTREMES[-1 - k], "stream": k, "draw": 2**32 - 1 - k, "sample_id": sample_id}
        expected = libraries["scalar"].quads(f"{name}_by_quad", 2**32 - 2**16, 2**16, **noise)  # the last of a sample
        np.testing.assert_array_equal(libraries[isa].quads(name, 2**32 - 2**16, 2**16, **noise), expected)


@pytest.mark.parametrize("isa", VECTORS)
def test_2_to_the_24_normals_are_those_of_the_scalar_code(libraries, isa):
    for part in range(4):
        expected = libraries["scalar"].quads("normals", part << 20, 1 << 20, seed=1)
        np.testing.assert_array_equal(libraries[isa].quads("normals", part << 20, 1 << 20, seed=1), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["normals", "uniforms"])
def test_any_run_and_any_elements_are_pieces_of_one_sequence(libraries, isa, name):
    whole = libraries[isa].quads(name, 0, 400, seed=5, sample_id=2**40)
    for count in (0, 1, 2, 15, 16, 17, 63, 64, 65, 129):
        for first in (0, 1, 7, 64, 200):
            part = libraries[isa].quads(name, first, count, seed=5, sample_id=2**40)
            np.testing.assert_array_equal(part, whole[4 * first : 4 * (first + count)])
        index = np.random.default_rng(count).integers(0, 1600, 4 * count + 3).astype(np.uint64)
        np.testing.assert_array_equal(libraries[isa].at(f"{name}_of", index, seed=5, sample_id=2**40), whole[index])


def test_the_header_holds_the_coefficients_that_the_tool_derives():
    pytest.importorskip("mpmath")
    printed = subprocess.run(
        [sys.executable, ROOT / "tools" / "minimax.py"], capture_output=True, text=True, check=True
    )
    pattern = r"constexpr (?:float|double) (k\w+) = (-?0x\S+?)f?;"
    header = dict(re.findall(pattern, "".join((ROOT / "csrc/kernels" / f).read_text() for f in ("philox.h", "exp.h"))))
    derived = dict(re.findall(pattern, printed.stdout))
    assert len(derived) == 36
    assert {name: float.fromhex(value) for name, value in header.items()} == {
        name: float.fromhex(value) for name, value in derived.items()
    }
