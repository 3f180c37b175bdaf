"""Networks of the size of real ones, in plain PyTorch, for the loops of the benchmark: a small UNet and a transformer.

    UNet    residual blocks with the time added to their channels, attention at the two lower resolutions
    DiT     patches, blocks whose norms are shifted, scaled and gated by the time (adaLN); at its defaults the size of
            DiT-S/2 on 32 x 32 latents: 384 wide, 12 layers, 6 heads, 33 M parameters

Weights are random: what is measured is time. Ronneberger et al., arXiv:1505.04597, and Ho et al., arXiv:2006.11239;
Peebles, Xie, arXiv:2212.09748.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time, then two layers. [B] -> [B, width]"""

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 128) -> None:
        super().__init__()
        exponents = torch.arange(frequencies // 2) / (frequencies // 2)
        self.register_buffer("frequencies", 1000.0 * torch.exp(-math.log(10000.0) * exponents))
        self.first, self.last = nn.Linear(frequencies, width), nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * self.frequencies.float()
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.first.weight.dtype)
        return self.last(F.silu(self.first(waves)))


class Residual(nn.Module):
    """Two convolutions, the time between them."""

    def __init__(self, inward: int, outward: int, width: int) -> None:
        super().__init__()
        self.norm, self.first = nn.GroupNorm(8, inward), nn.Conv2d(inward, outward, 3, padding=1)
        self.time = nn.Linear(width, outward)
        self.norm_between, self.last = nn.GroupNorm(8, outward), nn.Conv2d(outward, outward, 3, padding=1)
        self.skip = nn.Identity() if inward == outward else nn.Conv2d(inward, outward, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(F.silu(self.norm(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.last(F.silu(self.norm_between(h)))


class Attention(nn.Module):
    """Self-attention over tokens. [B, N, width]"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.inward, self.outward = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.inward(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.outward(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class ImageAttention(nn.Module):
    """Self-attention over pixels, as a residual. [B, C, H, W]"""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(8, channels), Attention(channels, heads)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.attention(tokens).transpose(1, 2).reshape_as(x)


class UNet(nn.Module):
    """[B, image, H, W] and [B] -> [B, image, H, W]; H and W multiples of 2^(levels - 1)."""

    def __init__(self, channels: int = 64, factors: Sequence[int] = (1, 2, 2), image: int = 3) -> None:
        super().__init__()
        width, sizes = 4 * channels, [channels * factor for factor in factors]
        self.time, self.first = TimeEmbedding(width), nn.Conv2d(image, channels, 3, padding=1)
        self.down: Any = nn.ModuleList()
        self.up: Any = nn.ModuleList()
        inward = [channels, *sizes[:-1]]
        for level, (a, b) in enumerate(zip(inward, sizes, strict=True)):
            mix = ImageAttention(b) if level else nn.Identity()
            self.down.append(nn.ModuleList([Residual(a, b, width), Residual(b, b, width), mix]))
            below = sizes[level + 1] if level + 1 < len(sizes) else b
            mix = ImageAttention(b) if level else nn.Identity()
            self.up.append(nn.ModuleList([Residual(below + b, b, width), Residual(b, b, width), mix]))
        self.middle, self.mix = Residual(sizes[-1], sizes[-1], width), ImageAttention(sizes[-1])
        self.norm, self.last = nn.GroupNorm(8, sizes[0]), nn.Conv2d(sizes[0], image, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time, h, kept = F.silu(self.time(t)), self.first(x), []
        for level, (one, two, mix) in enumerate(self.down):
            h = mix(two(one(F.avg_pool2d(h, 2) if level else h, time), time))
            kept.append(h)
        h = self.mix(self.middle(h, time))
        for level in reversed(range(len(self.up))):
            one, two, mix = self.up[level]
            h = mix(two(one(torch.cat([h, kept[level]], dim=1), time), time))
            h = F.interpolate(h, scale_factor=2.0) if level else h
        return self.last(F.silu(self.norm(h)))


class Block(nn.Module):
    """Attention and two layers, each after a norm that the time shifts and scales, and gated by it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.modulation = Attention(width, heads), nn.Linear(width, 6 * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(time)[:, None].chunk(6, dim=2)
        x = x + gate * self.attention(self.norms[0](x) * (1.0 + scale) + shift)
        return x + gate_2 * self.layers(self.norms[1](x) * (1.0 + scale_2) + shift_2)


class DiT(nn.Module):
    """[B, image, H, W] and [B] -> [B, image, H, W]; H and W multiples of the patch, side the larger."""

    def __init__(
        self, width: int = 384, layers: int = 12, heads: int = 6, patch: int = 2, image: int = 4, side: int = 32
    ) -> None:
        super().__init__()
        self.patch, self.time = patch, TimeEmbedding(width)
        self.first = nn.Conv2d(image, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.modulation = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, patch * patch * image)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time, height = F.silu(self.time(t)), x.shape[2] // self.patch
        tokens = self.first(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens, time)
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=2)
        patches = self.last(self.norm(tokens) * (1.0 + scale) + shift).transpose(1, 2)
        return F.pixel_shuffle(patches.unflatten(2, (height, -1)), self.patch)
