"""The handwritten digits that ship with scikit-learn: 1,797 scans of 8 x 8 pixels, in ten classes. No download.

A pixel counts 0 to 16 inked dots; here 0 is -1 and 16 is 1, and an image is [1, 8, 8].

Alpaydin, Kaynak 1998, "Optical recognition of handwritten digits", UCI machine learning repository.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

SHAPE = (1, 8, 8)
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Digits:
    """All the digits, in an order drawn from the seed; the last fifth is held out from the classifier.

    images: float32 [1797, 1, 8, 8] in [-1, 1].   labels: int64 [1797], 0 to 9.
    """

    images: torch.Tensor
    labels: torch.Tensor

    @property
    def held_out(self) -> int:
        """Index of the first image that the classifier is tested on."""
        return len(self.images) - len(self.images) // 5

    @property
    def std(self) -> float:
        """Standard deviation of the pixels: the sigma_data of a consistency model."""
        return float(self.images.std())


def load(seed: int, device: torch.device) -> Digits:
    """The digits, on the device, shuffled by the seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().reshape(-1, *SHAPE) / 8.0 - 1.0
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Digits(images[order].to(device), labels[order].to(device))


def batches(count: int, size: int, seed: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Without end: indices int64 [size] into `count` samples, each once an epoch, in an order drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size].to(device)
        order = order[size:]
