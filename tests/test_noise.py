"""The noise contract: z[b, i] is a function of (seed, stream, draw, sample id, i), the same in the kernels and the
reference, and its numbers are independent standard normals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import genkern as gk
from genkern import fused
from genkern.noise import Purpose, as_int64
from genkern.reference import noise as reference

VECTORS = json.loads((Path(__file__).parent / "data" / "noise_vectors.json").read_text())
FROM_START = [v for v in VECTORS if v["first"] == 0]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fields(vector: dict) -> dict[str, int]:
    return {name: int(vector[name], 16) for name in ("seed", "stream", "draw")}


def numbers(vector: dict, name: str) -> list[float]:
    return [float.fromhex(value) for value in vector[name]]


def bits(z: torch.Tensor) -> list[str]:
    return [value.hex() for value in z.flatten().tolist()]


def assert_within(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-6) -> None:
    """|found - expected| <= bound max(1, |expected|)."""
    found, expected = found.double().cpu(), expected.double().cpu()
    worst = ((found - expected).abs() / expected.abs().clamp(min=1.0)).max().item()
    assert worst <= bound, worst


@pytest.mark.parametrize("vector", FROM_START)
def test_the_kernels_give_the_frozen_bits(kernels, device, vector):
    ids = torch.tensor([as_int64(int(vector["sample_id"], 16))], device=device)
    noise = gk.Noise(**fields(vector), sample_ids=ids)
    assert bits(gk.ops.randn((1, 16), noise=noise, device=device, dtype=torch.float32)) == vector["normals"]
    assert bits(gk.ops.uniform((1, 16), noise=noise, device=device, dtype=torch.float32)) == vector["uniforms"]


@pytest.mark.parametrize("vector", FROM_START)
def test_the_kernels_give_the_frozen_bits_for_a_key_in_device_memory(kernels, device, vector):
    seed, stream, draw = fields(vector).values()
    ids = torch.tensor([as_int64(int(vector["sample_id"], 16))], device=device)
    on_device = {
        "seed": torch.tensor([as_int64(seed)], device=device),
        "stream": torch.tensor([as_int64(stream)], device=device),
    }
    for given in (on_device, on_device | {"seed": seed}, on_device | {"stream": stream}):
        noise = gk.Noise(**given, draw=draw, sample_ids=ids)
        assert bits(gk.ops.randn((1, 16), noise=noise, device=device, dtype=torch.float32)) == vector["normals"]


@pytest.mark.parametrize("vector", VECTORS)
def test_the_reference_gives_the_frozen_vectors(device, vector):
    index = torch.arange(vector["first"], vector["first"] + 16, device=device)
    noise = gk.Noise(**fields(vector))
    sample_id = as_int64(int(vector["sample_id"], 16))
    found = reference.randn_at(index, noise=noise, sample_id=sample_id)
    assert_within(found, torch.tensor(numbers(vector, "normals"), dtype=torch.float64))
    if vector["first"] == 0:
        noise = noise.of_samples([sample_id])
        assert bits(reference.uniform((1, 16), noise=noise, device=device, dtype=torch.float32)) == vector["uniforms"]


@pytest.mark.parametrize("vector", VECTORS)
def test_frozen_uniforms_are_the_frozen_words(vector):
    for word, u in zip(vector["words"], numbers(vector, "uniforms"), strict=True):
        exact = (int(word, 16) + 0.5) * 2.0**-32
        assert 0.0 < u < 1.0 and u == min(float(np.float32(exact)), 1.0 - 2.0**-24)


@pytest.mark.parametrize("vector", VECTORS)
def test_frozen_normals_are_box_muller_of_the_frozen_words(vector):
    words = np.array([int(word, 16) for word in vector["words"]], np.float64).reshape(-1, 2)
    radius, angle = np.sqrt(-2.0 * np.log((words[:, 0] + 0.5) * 2.0**-32)), words[:, 1] * (2.0 * np.pi * 2.0**-32)
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()
    assert_within(torch.tensor(numbers(vector, "normals")), torch.tensor(expected))


def test_the_kernels_are_within_1e_6_of_the_reference_in_float64(kernels, device):
    noise = gk.Noise(seed=2**64 - 1, stream=3, draw=7)
    found = gk.ops.randn((64, 4097), noise=noise, device=device, dtype=torch.float32)
    assert_within(found, reference.randn((64, 4097), noise=noise, device=device, dtype=torch.float64))


def test_a_sample_has_the_same_noise_in_any_batch(device):
    noise = gk.Noise(seed=11)
    whole = gk.ops.randn((24, 3, 5, 7), noise=noise, device=device)
    for sizes in ([24], [1] * 24, [5, 7, 12]):
        parts, first = [], 0
        for size in sizes:
            ids = torch.arange(first, first + size, device=device)
            parts.append(gk.ops.randn((size, 3, 5, 7), noise=noise.of_samples(ids), device=device))
            first += size
        assert torch.equal(torch.cat(parts), whole)


def test_a_sample_has_the_same_noise_at_any_place_of_the_batch(device):
    noise = gk.Noise(seed=11)
    whole = gk.ops.randn((24, 101), noise=noise, device=device)
    order = torch.randperm(24)
    for ids in (order, order.tolist(), order.numpy(), order.to(device)):
        assert torch.equal(gk.ops.randn((24, 101), noise=noise.of_samples(ids), device=device), whole[order])
    twice = gk.ops.randn((2, 101), noise=noise.of_samples([4, 4]), device=device)
    assert torch.equal(twice, whole[[4, 4]])


def test_a_shorter_sample_is_the_beginning_of_a_longer_one(device):
    noise = gk.Noise(seed=11)
    whole = gk.ops.randn((3, 1200), noise=noise, device=device)
    for n in (0, 1, 2, 3, 4, 5, 63, 64, 257, 1023):
        assert torch.equal(gk.ops.randn((3, n), noise=noise, device=device), whole[:, :n])
    assert torch.equal(gk.ops.randn((3, 10, 12, 10), noise=noise, device=device), whole.reshape(3, 10, 12, 10))


def test_an_element_has_its_c_order_index_whatever_the_strides(device):
    noise = gk.Noise(seed=11)
    expected = gk.ops.randn((2, 6, 9, 5), noise=noise, device=device)
    for order in itertools.permutations(range(4)):
        out = torch.empty([(2, 6, 9, 5)[d] for d in order], device=device).permute(*np.argsort(order).tolist())
        assert torch.equal(gk.ops.randn((2, 6, 9, 5), noise=noise, out=out), expected)
    wide = torch.zeros((2, 6, 9, 11), device=device)
    gk.ops.randn((2, 6, 9, 5), noise=noise, out=wide[..., 1::2])
    assert torch.equal(wide[..., 1::2], expected) and not wide[..., ::2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_another_dtype_is_the_float32_number_converted(kernels, device, dtype):
    noise = gk.Noise(seed=11)
    expected = gk.ops.randn((3, 1021), noise=noise, device=device, dtype=torch.float32).to(dtype)
    assert torch.equal(gk.ops.randn((3, 1021), noise=noise, device=device, dtype=dtype), expected)


def test_seed_stream_sample_and_draw_each_change_every_number(device):
    base = gk.Noise(seed=5, stream=6, draw=7, sample_ids=[8])
    others = [gk.Noise(4, 6, [8], 7), gk.Noise(5, 7, [8], 7), gk.Noise(5, 6, [9], 7), gk.Noise(5, 6, [8], 6)]
    others += [gk.Noise(5 + 2**32, 6, [8], 7), gk.Noise(5, 6 + 2**32, [8], 7), gk.Noise(5, 6, [8 + 2**32], 7)]
    others += [base.at(purpose) for purpose in Purpose]
    drawn = [gk.ops.randn((1, 4096), noise=noise, device=device) for noise in [base, *others]]
    for a, b in itertools.combinations(drawn, 2):
        assert (a == b).sum() <= 4  # by chance: two of 2^24 or so float32 values


def test_normals_have_the_moments_and_the_distribution_of_a_standard_normal(device):
    stats = pytest.importorskip("scipy.stats")
    n = 1 << 22
    z = gk.ops.randn((4, n // 4), noise=gk.Noise(seed=2024), device=device, dtype=torch.float32).double().cpu()
    # E z^k and the standard deviation of its mean over n numbers: sqrt((E z^2k - (E z^k)^2) / n).
    even = {0: 1, 2: 1, 4: 3, 6: 15, 8: 105, 10: 945, 12: 10395}
    for k in range(1, 7):
        expected = even.get(k, 0)
        deviation = ((even[2 * k] - expected**2) / n) ** 0.5
        assert abs(z.pow(k).mean().item() - expected) < 5 * deviation, k
    for lane in range(4):  # cosines and sines apart
        assert stats.kstest(z.flatten()[lane::4].numpy(), "norm").pvalue > 1e-4
    beyond = (z.abs() > 4.0).sum().item()
    expected = n * 2 * stats.norm.sf(4.0)
    assert abs(beyond - expected) < 5 * expected**0.5


def test_uniforms_are_uniform(device):
    stats = pytest.importorskip("scipy.stats")
    u = gk.ops.uniform((4, 1 << 20), noise=gk.Noise(seed=2024), device=device, dtype=torch.float32).double().cpu()
    assert 0.0 < u.min() and u.max() < 1.0
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-4
    counts = np.bincount((u.flatten().numpy() * 4096).astype(np.int64), minlength=4096)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_neighbouring_seeds_streams_samples_and_draws_are_uncorrelated(device):
    n, base = 1 << 18, gk.Noise(seed=100, stream=100, sample_ids=[100], draw=100)
    noises = [base]
    for k in (1, 2, 3, 8, 2**31, 2**32, 2**62):
        noises += [
            gk.Noise(100 + k, 100, [100], 100),
            gk.Noise(100, 100 + k, [100], 100),
            gk.Noise(100, 100, [100 + k], 100),
        ]
    noises += [gk.Noise(100, 100, [100], 100 + k) for k in (1, 2, 3, 1 << 24, 2 << 24, 2**31)]
    z = torch.cat([gk.ops.randn((1, n), noise=noise, device=device).double().cpu() for noise in noises])
    # A correlation of n independent pairs has the standard deviation 1 / sqrt(n), that of squares too.
    for values in (z, z.square()):
        correlation = torch.corrcoef(values) - torch.eye(len(noises))
        assert correlation.abs().max().item() < 5 / n**0.5
    for lag in (1, 2, 3, 4, 8, 64, 4096):
        within = (z[:, lag:] * z[:, :-lag]).mean(1)
        assert within.abs().max().item() < 5 / (n - lag) ** 0.5


def test_fresh_noise_is_governed_by_torch_manual_seed():
    torch.manual_seed(3)
    first = gk.Noise.fresh()
    second = gk.Noise.fresh()
    torch.manual_seed(3)
    assert gk.Noise.fresh() == first != second
    generator = torch.Generator().manual_seed(3)
    assert gk.Noise.fresh(generator) == first
    assert gk.Noise.fresh(torch_governs=False).seed != gk.Noise.fresh(torch_governs=False).seed


@pytest.mark.parametrize("name, bits", [("seed", 64), ("stream", 64), ("draw", 32)])
def test_a_number_outside_its_bits_is_an_error(name, bits):
    assert getattr(gk.Noise(**({"seed": 0} | {name: 2**bits - 1})), name) == 2**bits - 1
    for wrong in (-1, 2**bits, True):
        with pytest.raises(ValueError, match=f"{name}: expected an integer from 0 to 2\\^{bits} - 1, got {wrong}"):
            gk.Noise(**({"seed": 0} | {name: wrong}))
    with pytest.raises(TypeError, match=f"{name}: expected an integer, got 0.5"):
        gk.Noise(**({"seed": 0} | {name: 0.5}))


def test_host_numbers_of_a_device_key_are_made_on_the_device():
    """A copy from the host's pageable memory is refused while a CUDA graph is captured."""

    class Copies(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.found += "copy" in str(function)
            return function(*args, **(kwargs or {}))

    seed = torch.zeros(1, dtype=torch.int64, device="meta")
    for noise in (gk.Noise(seed=seed), gk.Noise(seed=7, stream=seed)):
        with Copies() as copies:
            _, key = fused._key(noise, False, torch.device("meta"))
        assert key.device.type == "meta" and key.shape == (3,) and not copies.found


def test_a_seed_above_int64_beside_a_stream_in_a_tensor():
    seed = 2**64 - 3
    noise = gk.Noise(seed=seed, stream=torch.tensor([5]))
    expected = gk.ops.randn((2, 6), noise=gk.Noise(seed=seed, stream=5), dtype=np.float32)
    assert np.array_equal(gk.ops.randn((2, 6), noise=noise, dtype=np.float32), expected)


def test_noise_is_equal_to_noise_of_the_same_numbers():
    one = gk.Noise(seed=3, stream=2, sample_ids=np.arange(4))
    assert one == gk.Noise(seed=3, stream=2, sample_ids=[0, 1, 2, 3])
    assert one == gk.Noise(seed=3, stream=torch.tensor([2]), sample_ids=torch.arange(4))
    assert len({one, gk.Noise(seed=3, stream=2, sample_ids=range(4))}) == 1
    for other in (gk.Noise(seed=3, stream=2), one.of_samples([0, 1, 2, 4]), one.at(Purpose.STEP), 3):
        assert one != other


def test_vmap_without_a_given_noise_follows_its_randomness():
    x = torch.zeros(3, 2, 500)

    def drawn(randomness):
        torch.manual_seed(2)
        return torch.vmap(lambda x: gk.ops.add_noise(x, 1.0, 1.0), randomness=randomness)(x)

    same, different = drawn("same"), drawn("different")
    assert torch.equal(same[0], same[1])
    assert (different[0] != different[1]).all() and torch.equal(different, drawn("different"))
    assert abs(float(different.std()) - 1.0) < 4.0 / 6000**0.5
