"""How good samples are, by a judge trained on the real digits and never on generated ones.

The judge is a classifier p(class | image). Of a set of samples it gives

    confidence          mean over samples of max_c p(c | x)
    class shares        the share of samples whose most probable class is c, for c = 0 .. 9
    Frechet distance    (|mu - mu'|^2 + tr(C + C' - 2 (C C')^1/2)) / tr C

with mu, C the mean and covariance of the judge's 64 features (the layer before the last) over all the real digits,
mu', C' those over the samples. 0 is equality, and 1 is as much as the real digits vary themselves. The judge differs
between seeds, so distances compare within one run; the floor (two halves of the real digits) and the ceiling (noise)
give the scale. The floor is no bound: halves are small samples, and a network that has seen all the digits can come
closer to them than one half does to the other.

Heusel et al., "GANs trained by a two time-scale update rule", arXiv:1706.08500 (the distance).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..training import trainer
from . import data

FEATURES = 64


@dataclasses.dataclass(frozen=True)
class Quality:
    """The figures of one set of samples."""

    confidence: float
    class_shares: list[float]
    frechet: float

    @property
    def smallest_share(self) -> float:
        """The share of the class that is found least often."""
        return min(self.class_shares)


class Classifier(nn.Module):
    """Two convolutions, one dense layer of 64 features, ten logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, data.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, 1, 8, 8] -> logits [B, 10]."""
        return self.head(self.features(x))


class Judge:
    """A trained classifier with the real digits' statistics.

    accuracy: on the fifth of the digits that it was not trained on.
    """

    def __init__(self, classifier: Classifier, digits: data.Digits) -> None:
        self.classifier = classifier.eval()
        self.accuracy = self._accuracy(digits)
        self.real = self._features(digits.images)

    def assess(self, samples: torch.Tensor) -> Quality:
        """The figures of samples [N, 1, 8, 8], clamped to the pixels' range first."""
        samples = samples.clamp(-1.0, 1.0)
        with torch.no_grad():
            probability, label = self.classifier(samples).softmax(dim=1).max(dim=1)
        shares = torch.bincount(label, minlength=data.CLASSES) / len(samples)
        return Quality(float(probability.mean()), shares.tolist(), frechet(self.real, self._features(samples)))

    def floor(self, seed: int, splits: int = 5) -> float:
        """The distance between two halves of the real digits, mean over random splits."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(splits):
            first, second = torch.randperm(len(self.real), generator=generator).chunk(2)
            found.append(frechet(self.real[first], self.real[second]))
        return sum(found) / splits

    @torch.no_grad()
    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(images).double().cpu()

    @torch.no_grad()
    def _accuracy(self, digits: data.Digits) -> float:
        guess = self.classifier(digits.images[digits.held_out :]).argmax(dim=1)
        return float((guess == digits.labels[digits.held_out :]).double().mean())


def train_judge(digits: data.Digits, *, steps: int, seed: int, progress: Callable[[int], None] | None = None) -> Judge:
    """Trains the classifier on four fifths of the digits.

    It also learns to give noise the same probability in every class. Without that it is 80% sure of noise too, and its
    confidence would say little (Hendrycks, Mazeika, Dietterich, "Deep anomaly detection with outlier exposure",
    arXiv:1812.04606).
    """
    device = digits.images.device
    classifier = Classifier().to(device)

    def loss_fn(index: torch.Tensor, step: int) -> torch.Tensor:
        noise = torch.randn(len(index) // 2, *data.SHAPE, device=device).clamp(-1.0, 1.0)
        logits = classifier(torch.cat([digits.images[index], noise]))
        unsure = -logits[len(index) :].log_softmax(dim=1).mean()
        return F.cross_entropy(logits[: len(index)], digits.labels[index]) + 0.25 * unsure

    indices = data.batches(digits.held_out, 64, seed, device)
    trainer.fit(classifier.parameters(), loss_fn, indices, steps=steps, lr=3e-3, weight_decay=0.01, progress=progress)
    return Judge(classifier, digits)


def frechet(real: torch.Tensor, other: torch.Tensor) -> float:
    """The Frechet distance between Gaussians fitted to features [N, D] and [M, D], over the real ones' variance.

    The trace of (C C')^1/2 is that of the symmetric (C^1/2 C' C^1/2)^1/2: no square root of a non-symmetric matrix.
    """
    (mean, cov), (mean2, cov2) = ((f.mean(dim=0), torch.cov(f.T)) for f in (real, other))
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0.0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0.0).sqrt().sum()
    distance = (mean - mean2).square().sum() + cov.trace() + cov2.trace() - 2.0 * cross
    return float(distance.clamp(min=0.0) / cov.trace())
