"""The noise contract in plain PyTorch: Philox-4x32-10 in int64 arithmetic, Box-Muller in float64.

    key     = seed xor mix64(stream), low word first
    counter = (i // 4, draw, sample id low, sample id high)
    w0..w3  = Philox-4x32-10(counter, key), of which element i of a sample takes number i mod 4

    uniform   u = (w + 1/2) 2^-32, below 1
    normals   z0 = r cos(2 pi w1 2^-32), z1 = r sin(2 pi w1 2^-32), r = sqrt(-2 log((w0 + 1/2) 2^-32));
              z2, z3 from w2, w3

It is the oracle of the kernels' normals, which agree with it within 1e-6 max(1, |z|), and what runs on devices without
a kernel. Words are held in int64, 32 bits each; a device without float64 computes in float32.

Salmon et al. 2011; Steele, Lea, Flood 2014 (mix64); Box, Muller 1958.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise import Noise, as_int64

_MASK32 = 0xFFFFFFFF
_BELOW_ONE = 1.0 - 2.0**-24  # the float32 below 1
_NO_FLOAT64 = ("mps",)


def randn(shape: Sequence[int], *, noise: Noise, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normals of `noise`.  [B, ...], of `dtype` (default torch's default dtype).

    Computed in float64 and rounded once. Shapes and ids as in genkern.ops.randn.
    """
    return _alone(1, shape, noise, device).to(dtype or torch.get_default_dtype())


def uniform(shape: Sequence[int], *, noise: Noise, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """Uniforms in (0, 1) of `noise`, rounded to float32.  [B, ...], of `dtype` (default torch's default dtype)."""
    return _alone(2, shape, noise, device).to(dtype or torch.get_default_dtype())


def randn_at(index: Tensor, *, noise: Noise, sample_id: int) -> Tensor:
    """The normals of elements `index` (int64, C-order indices) of one sample, float64."""
    ids = torch.full_like(index, sample_id)
    return _normals(_words_at(index, ids, _key(noise), noise.draw), index)


def draw(
    kind: int,
    key: Sequence[int],
    device_key: Tensor | None,
    sample_ids: Tensor | None,
    shape: Sequence[int],
    device: Any,
) -> Tensor:
    """What the kernels draw as z, in float64 (uniforms: the float32 numbers).

    Args:
        kind: 1 normal, 2 uniform.
        key: seed, stream, draw in two's complement.
        device_key: int64 [3]: seed and stream in their place, and an offset of draw.
        sample_ids: int64 [B]; None: 0 .. B-1.
        shape: of the result, dimension 0 the batch.
    """
    batch, n = shape[0], math.prod(shape[1:])
    ids = torch.arange(batch, device=device) if sample_ids is None else sample_ids.to(device).reshape(batch)
    index = torch.arange(n, device=device).expand(batch, n)
    seed, stream, number = (torch.tensor(k, device=device) for k in key)
    if device_key is not None:
        seed, stream, number = device_key[0], device_key[1], number + device_key[2]
    key64 = seed ^ _mix64(stream)
    words = _words_at(index, ids[:, None], (key64 & _MASK32, _shift(key64, 32)), number & _MASK32)
    return (_normals if kind == 1 else _uniforms)(words, index).reshape(tuple(shape))


def philox4x32_10(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Ten rounds of Philox on words held in int64.  counter: four, key: two, of shapes that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return [c0, c1, c2, c3]


def _alone(kind: int, shape: Sequence[int], noise: Noise, device: Any) -> Tensor:
    ids = noise.sample_ids
    if ids is not None:
        ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
    seed, stream = (v if isinstance(v, Tensor) else torch.tensor(as_int64(v)) for v in (noise.seed, noise.stream))
    key = torch.stack([seed.reshape(()), stream.reshape(()).to(seed.device), torch.zeros_like(seed.reshape(()))])
    return draw(kind, (0, 0, noise.draw), key.to(device or "cpu"), ids, tuple(shape), device)


def _key(noise: Noise) -> tuple[Tensor, Tensor]:
    seed, stream = (v if isinstance(v, Tensor) else torch.tensor(as_int64(v)) for v in (noise.seed, noise.stream))
    key64 = seed ^ _mix64(stream)
    return key64 & _MASK32, _shift(key64, 32)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of a 64-bit word in int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 products wrap, as unsigned ones do."""
    x = (x ^ _shift(x, 30)) * as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * as_int64(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of 32-bit words. In halves of b, so that no partial product passes 2^63."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)  # below 2^48 + 2^32
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def _words_at(index: Tensor, ids: Tensor, key: Sequence[Any], number: Any) -> list[Tensor]:
    quad = index >> 2
    counter = [quad & _MASK32, torch.zeros_like(quad) + number, ids & _MASK32, _shift(ids, 32)]
    return philox4x32_10(counter, key)


def _pick(four: Sequence[Tensor], index: Tensor) -> Tensor:
    lane = index & 3
    second = torch.where(lane == 3, four[3], four[2])
    return torch.where(lane >= 2, second, torch.where(lane == 1, four[1], four[0]))


def _float(words: Tensor) -> Tensor:
    return words.to(torch.float32 if words.device.type in _NO_FLOAT64 else torch.float64)


def _normals(words: Sequence[Tensor], index: Tensor) -> Tensor:
    four = []
    for w0, w1 in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log((_float(w0) + 0.5) * 2.0**-32))
        angle = _float(w1) * (2.0 * math.pi * 2.0**-32)
        four += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return _pick(four, index)


def _uniforms(words: Sequence[Tensor], index: Tensor) -> Tensor:
    # (2 w + 1) 2^-33 from an integer of 33 bits: rounded once, with or without float64.
    return ((2 * _pick(words, index) + 1).to(torch.float32) * 2.0**-33).clamp(max=_BELOW_ONE)
