"""The network of all four families: small enough for two cores, large enough for digits one can read.

An image [1, 8, 8] is read as 4 x 4 patches of 2 x 2 pixels, so that a convolution sees 16 places instead of 64, and
passes residual blocks that the time scales and shifts:

    h <- h + W2 silu((1 + s(t)) W1 h + b(t))

one dense block over the whole image between two 3 x 3 convolutions. The time enters as sines and cosines,
sin(2 pi f t) and cos(2 pi f t), with frequencies f from 1/4 to 8. On two cores a step on 128 images takes about 13 ms.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import data

PATCH = 2


class DigitNetwork(nn.Module):
    """network(x, t) -> [B, 1, 8, 8]: noise, velocity or F of (13.29), whichever the method trains it to be.

    Args:
        width: channels of a patch.
        hidden: width of the dense block.
        time_scale: t is multiplied by it first, so that every family's time spans about 1.
        times: 1, or 2 for a network of two times, called as network(x, t, r).
    """

    frequencies: torch.Tensor

    def __init__(self, width: int = 64, hidden: int = 256, time_scale: float = 1.0, times: int = 1) -> None:
        super().__init__()
        channels, side = PATCH * PATCH, data.SHAPE[-1] // PATCH
        frequencies = torch.logspace(math.log10(0.25), math.log10(8.0), 16)
        self.register_buffer("frequencies", 2.0 * math.pi * time_scale * frequencies)
        self.time = nn.Sequential(nn.Linear(2 * times * len(frequencies), 64), nn.SiLU())
        self.widths = (width, hidden, width)
        self.modulation = nn.Linear(64, 2 * sum(self.widths))
        self.read = nn.Conv2d(channels, width, 3, padding=1)
        self.near_in = nn.Conv2d(width, width, 3, padding=1)
        self.dense_up = nn.Linear(side * side * width, hidden)
        self.dense_down = nn.Linear(hidden, side * side * width)
        self.near_out = nn.Conv2d(width, width, 3, padding=1)
        self.write = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor | None = None) -> torch.Tensor:
        """x: [B, 1, 8, 8].  t, r: [B], integer or float."""
        told = t[:, None, None] if r is None else torch.stack([t, r], dim=1)[:, :, None]
        angle = (told.to(x.dtype) * self.frequencies).flatten(1)
        modulation = self.modulation(self.time(torch.cat([angle.sin(), angle.cos()], dim=1)))
        near_in, dense, near_out = (m.chunk(2, dim=1) for m in modulation.split([2 * w for w in self.widths], dim=1))
        h = self.read(F.pixel_unshuffle(x, PATCH))
        h = h + _modulated(self.near_in(h), *near_in)
        h = h + self.dense_down(_modulated(self.dense_up(h.flatten(1)), *dense)).view_as(h)
        h = h + _modulated(self.near_out(h), *near_out)
        return F.pixel_shuffle(self.write(h), PATCH)


def _modulated(h: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """silu((1 + scale) h + shift); scale and shift [B, C] hold for every place."""
    if h.dim() == 4:
        scale, shift = scale[:, :, None, None], shift[:, :, None, None]
    return F.silu(torch.addcmul(h + shift, h, scale))
