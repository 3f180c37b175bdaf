"""The data sets of tools/consistency_table.py: images, a network for them, a judge, and a distance of features.

    digits     the 1,797 digits of `genkern demo`, 1 x 8 x 8, judged by its classifier
    patches    32 x 32 patches in colour of the two photographs that ship with scikit-learn, a patch every 8 pixels

The judge of patches looks at features that nothing has trained: 64 convolutions of 5 x 5 with random weights, from a
fixed seed, at two scales, a mean and a deviation over places of each, and the 4 x 4 means of the colours; each is
divided by its deviation over the real patches. The Frechet distance is that of the demo, in those features.

The distance of features stands for LPIPS: a classifier's layers (of digits, or of the quarter of the photograph that a
patch is from), each normalised over channels, squared differences summed over channels and averaged over places. Its
classifier is not the judge.

Zhang, Isola, Efros, Shechtman, Wang, arXiv:1801.03924 (LPIPS).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from genkern.bench.networks import Residual
from genkern.demo import data, quality
from genkern.demo.networks import DigitNetwork
from genkern.training import trainer

JUDGE_STEPS, METRIC_STEPS = 500, 400
SIDE, STRIDE = 32, 8
TIME_SCALE = 0.25  # of what networks are told: high frequencies make derivatives by the time noisy
FLOOR_SPLITS = 5


class PatchNetwork(nn.Module):
    """A UNet of two levels on [B, 3, 32, 32], read as 16 x 16 places of 2 x 2 pixels. It has forward derivatives.

    Args:
        width: channels at the upper level.
        times: 1, or 2 for a network of two times, called as network(x, t, r).
    """

    frequencies: Tensor

    def __init__(self, width: int = 64, times: int = 1) -> None:
        super().__init__()
        frequencies = TIME_SCALE * torch.logspace(math.log10(0.25), math.log10(8.0), 16)
        self.register_buffer("frequencies", 2.0 * math.pi * frequencies)
        told = 2 * width
        self.time = nn.Sequential(nn.Linear(32 * times, told), nn.SiLU(), nn.Linear(told, told), nn.SiLU())
        self.first = nn.Conv2d(12, width, 3, padding=1)
        self.above = nn.ModuleList([Residual(width, width, told), Residual(width, width, told)])
        self.below = nn.ModuleList([Residual(width, told, told), Residual(told, told, told)])
        self.after = nn.ModuleList([Residual(told + width, width, told), Residual(width, width, told)])
        self.norm, self.last = nn.GroupNorm(8, width), nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
        """x: [B, 3, 32, 32].  t, r: [B]."""
        told = t[:, None, None] if r is None else torch.stack([t, r], dim=1)[:, :, None]
        angle = (told.to(x.dtype) * self.frequencies).flatten(1)
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        h = self.first(functional.pixel_unshuffle(x, 2))
        for block in self.above:
            h = block(h, time)
        kept, h = h, functional.avg_pool2d(h, 2)
        for block in self.below:
            h = block(h, time)
        h = torch.cat([functional.interpolate(h, scale_factor=2.0), kept], dim=1)
        for block in self.after:
            h = block(h, time)
        return functional.pixel_shuffle(self.last(functional.silu(self.norm(h))), 2)


class Judge(Protocol):
    """What samples are judged by: figures by name, of which "frechet" is one."""

    def assess(self, samples: Tensor) -> dict[str, float]: ...

    def floor(self, seed: int) -> float: ...


class DigitJudge:
    """The demo's classifier."""

    def __init__(self, digits: data.Digits, steps: int, seed: int) -> None:
        self._judge = quality.train_judge(digits, steps=steps, seed=seed)

    def assess(self, samples: Tensor) -> dict[str, float]:
        found = self._judge.assess(samples)
        return {"frechet": found.frechet, "confidence": found.confidence, "rarest class": found.smallest_share}

    def floor(self, seed: int) -> float:
        return self._judge.floor(seed, FLOOR_SPLITS)


class PatchJudge:
    """Random features of patches [N, 3, 32, 32]."""

    def __init__(self, images: Tensor) -> None:
        g = torch.Generator().manual_seed(0)
        weights = torch.randn(2, 64, 3, 5, 5, generator=g) / math.sqrt(75.0)
        self.weights = weights.to(images.device)
        self.scale = torch.ones((), dtype=torch.float64)
        real = self._features(images)
        self.scale = real.std(dim=0)
        self.real = real / self.scale

    def assess(self, samples: Tensor) -> dict[str, float]:
        return {"frechet": quality.frechet(self.real, self._features(samples))}

    def floor(self, seed: int) -> float:
        g, found = torch.Generator().manual_seed(seed), []
        for _ in range(FLOOR_SPLITS):
            first, second = torch.randperm(len(self.real), generator=g).chunk(2)
            found.append(quality.frechet(self.real[first], self.real[second]))
        return sum(found) / len(found)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self._of_part(part) for part in images.clamp(-1.0, 1.0).split(512)]) / self.scale

    def _of_part(self, x: Tensor) -> Tensor:
        found = []
        for k, weight in enumerate(self.weights):
            h = functional.conv2d(functional.avg_pool2d(x, 2) if k else x, weight).relu()
            found += [h.mean(dim=(2, 3)), h.std(dim=(2, 3))]
        found.append(functional.avg_pool2d(x, SIDE // 4).flatten(1))
        return torch.cat(found, dim=1).double().cpu()


class FeatureDistance:
    """d(f, f^-) of a classifier's layers, [B]: a metric of Consistency's losses."""

    def __init__(self, images: Tensor, labels: Tensor, steps: int, batch: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            c, classes = images.shape[1], int(labels.max()) + 1
            self.layers = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in ((c, 32), (32, 64), (64, 64))])
            head = nn.Linear(64, classes)
        self.layers.to(images.device)
        head.to(images.device)

        def loss(index: Tensor, step: int) -> Tensor:
            return functional.cross_entropy(head(self._outputs(images[index])[-1].mean(dim=(2, 3))), labels[index])

        params = [*self.layers.parameters(), *head.parameters()]
        indices = data.batches(len(images), batch, seed, images.device)
        trainer.fit(params, loss, indices, steps=steps, lr=3e-3, weight_decay=0.01)
        self.layers.requires_grad_(False)

    def __call__(self, f: Tensor, target: Tensor) -> Tensor:
        """[B]."""
        found = torch.zeros(len(f), device=f.device)
        for a, b in zip(self._outputs(f), self._outputs(target), strict=True):
            a, b = functional.normalize(a, dim=1), functional.normalize(b, dim=1)
            found = found + (a - b).square().sum(dim=1).mean(dim=(1, 2))
        return found

    def _outputs(self, x: Tensor) -> list[Tensor]:
        found = []
        for k, layer in enumerate(self.layers):
            x = layer(functional.max_pool2d(x, 2) if k else x).relu()
            found.append(x)
        return found


class Task:
    """A data set, ready for training and judging.

    images: float32 [N, C, H, W] in [-1, 1], on the device.   std: of all their numbers.   sigma: (sigma_min, sigma_max)
    of the consistency models.
    times: N of (13.30) in distillation; its intervals split evenly into 2 and 4.   network: times -> a new network.
    judge, metric: of samples, and of two images.
    """

    def __init__(
        self, name: str, images: Tensor, labels: Tensor, sigma: tuple[float, float], times: int,
        network: Callable[[int], nn.Module], judge: Judge, steps: int, batch: int, seed: int,
    ) -> None:  # fmt: skip
        self.name, self.images, self.sigma, self.times, self.judge = name, images, sigma, times, judge
        self.metric = FeatureDistance(images, labels, steps, batch, seed + 1)
        self.std = float(images.std())
        self._network, self._seed = network, seed

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def network(self, times: int = 1) -> nn.Module:
        """A new network; its weights are a function of the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return self._network(times).to(self.images.device)


def digits(device: torch.device, batch: int, quick: bool, seed: int) -> Task:
    found = data.load(seed, device)
    judge = DigitJudge(found, 100 if quick else JUDGE_STEPS, seed)
    return Task(
        "digits", found.images, found.labels, (0.02, 20.0), 13, _digit_network, judge,
        50 if quick else METRIC_STEPS, batch, seed,
    )  # fmt: skip


def _digit_network(times: int) -> nn.Module:
    return DigitNetwork(time_scale=TIME_SCALE, times=times)


def patches(device: torch.device, batch: int, quick: bool, seed: int) -> Task:
    """As digits; sigma_max is larger, since what neighbouring pixels share is drowned later than a pixel is."""
    images, labels = (t.to(device) for t in _patches(4 * STRIDE if quick else STRIDE))
    steps = 50 if quick else METRIC_STEPS
    return Task("patches", images, labels, (0.01, 80.0), 17, _patch_network, PatchJudge(images), steps, batch, seed)


def _patch_network(times: int) -> nn.Module:
    return PatchNetwork(times=times)


def _patches(stride: int) -> tuple[Tensor, Tensor]:
    """Patches [N, 3, 32, 32] in [-1, 1] every `stride` pixels, in an order drawn at random, and the photograph and
    quarter that each is from."""
    from sklearn.datasets import load_sample_images

    images: list[np.ndarray[Any, Any]] = []
    labels: list[int] = []
    for k, photo in enumerate(load_sample_images().images):
        height, width = photo.shape[0] - SIDE, photo.shape[1] - SIDE
        for top in range(0, height + 1, stride):
            for left in range(0, width + 1, stride):
                images.append(photo[top : top + SIDE, left : left + SIDE])
                labels.append(4 * k + 2 * (top > height // 2) + (left > width // 2))
    found = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return found[order].contiguous(), torch.tensor(labels)[order]


TASKS: dict[str, Callable[[torch.device, int, bool, int], Task]] = {"digits": digits, "patches": patches}
