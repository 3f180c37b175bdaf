"""What the demo promises of its samples, as thresholds; a run computes the values and says met or missed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from .quality import Quality

ACCURACY = 0.97  # of the classifier, on digits that it was not trained on
CONFIDENCE = 0.85  # mean top probability
SHARE = 0.04  # of each class among the samples
POINTS = (
    ("DDIM", 20),
    ("Flow matching, Euler", 20),
    ("Rectified flow, Euler", 10),
    ("2-rectified flow, Euler", 2),
    ("Consistency", 2),
)


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One promise: value >= threshold."""

    name: str
    value: float
    threshold: float

    @property
    def met(self) -> bool:
        """Whether it is kept."""
        return self.value >= self.threshold


def judge(accuracy: float, found: Mapping[tuple[str, int], Quality]) -> list[Criterion]:
    """Every criterion, given the classifier's accuracy and the quality of (sampler, calls)."""
    criteria = [Criterion("classifier: accuracy on held-out digits", accuracy, ACCURACY)]
    for name, calls in POINTS:
        quality = found[name, calls]
        criteria.append(Criterion(f"{name}, {calls} calls: confidence", quality.confidence, CONFIDENCE))
        criteria.append(Criterion(f"{name}, {calls} calls: rarest class", quality.smallest_share, SHARE))
    return criteria
