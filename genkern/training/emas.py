"""Several running averages of one model at once, and averages whose length grows with the training.

After the update of step t = 1, 2, ... the power-function average has the decay and so the weights

    beta(t) = (1 - 1/t)^(gamma + 1),      w(i; t) = (i^(gamma + 1) - (i - 1)^(gamma + 1)) / t^(gamma + 1),    i = 1 .. t

of the parameters of step i, since the product of the decays telescopes: the profile (gamma + 1) tau^gamma over
t^(gamma + 1). The standard deviation of this profile over t is its relative length

    sigma_rel = ((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))^(1/2),      gamma >= 0:  sigma_rel <= 12^(-1/2).

Karras, Aittala, Lehtinen, Hellsten, Aila, Laine, arXiv:2312.02696, section 3.1; appendix C, eqs. (121), (123), (127).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from .. import check
from .ema import EMA, checked_decay, update_all

if TYPE_CHECKING:
    from .guard import Guard

LONGEST = 12.0**-0.5  # sigma_rel at gamma = 0: all steps alike


@dataclasses.dataclass(frozen=True)
class PowerDecay:
    """The decay of a power-function average, by step.

    Args:
        sigma_rel: its relative length, in (0, 12^(-1/2)]; 0.05 to 0.1 are usual.

    Attributes:
        gamma: the power, >= 0.

    Raises:
        ValueError: sigma_rel outside its range.
    """

    sigma_rel: float
    gamma: float = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        if not 0.0 < check.number("sigma_rel", self.sigma_rel) <= LONGEST:
            raise ValueError(f"sigma_rel: expected a number in (0, 12^(-1/2)], got {self.sigma_rel}")
        # gamma + 1 = sigma_rel^2 (gamma + 2)^2 (gamma + 3), a cubic of one root >= 0.
        square = float(self.sigma_rel) ** -2
        roots = np.roots([1.0, 7.0, 16.0 - square, 12.0 - square])
        object.__setattr__(self, "gamma", max(0.0, float(roots.real.max())))

    def decay(self, step: int) -> float:
        """beta of update t = 1, 2, ...; 0 at the first, which copies."""
        return (1.0 - 1.0 / check.integer("step", step, 1)) ** (self.gamma + 1.0)

    def weights(self, step: int) -> np.ndarray:
        """Of the parameters of steps 1 .. t in the average after step t; [t] float64, of sum 1."""
        ends = (np.arange(check.integer("step", step, 1) + 1) / step) ** (self.gamma + 1.0)
        return np.diff(ends)


class EMASet:
    """Running averages of one model at several rates, moved by one multi-tensor launch.

    Args:
        model: averaged; not changed.
        decays: of each average: a number in [0, 1), or a PowerDecay.

    Attributes:
        averages: an EMA for each, whose `module` holds the average, and whose `decay` is that of its last update.
        steps: updates so far.

    Raises:
        ValueError: no decays, or one outside its range; a model of other parameters or buffers given to a method. Then
            nothing is changed.
    """

    def __init__(self, model: nn.Module, decays: Sequence[float | PowerDecay]) -> None:
        if not len(decays):
            raise ValueError("decays: expected at least one, got none")
        self.decays = tuple(d if isinstance(d, PowerDecay) else checked_decay(d) for d in decays)
        self.averages = tuple(EMA(model, d if isinstance(d, float) else 0.0) for d in self.decays)
        self.steps = 0

    def update(self, model: nn.Module, *, guard: Guard | None = None) -> None:
        """Move all averages toward the model's parameters; copy its buffers. guard: as of EMA.update(); `steps` counts
        the bad ones too."""
        step = self.steps + 1
        decays = [d if isinstance(d, float) else d.decay(step) for d in self.decays]
        update_all(self.averages, decays, model, guard)
        self.steps = step
        for average, decay in zip(self.averages, decays, strict=True):
            average.decay = decay

    def state_dict(self) -> dict[str, Any]:
        """The number of updates, the decays (sigma_rel of a PowerDecay), and the state of each average."""
        return {"steps": self.steps, "decays": self._names(), "averages": [a.state_dict() for a in self.averages]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what state_dict() gave. ValueError: other decays, names or shapes; then nothing is changed."""
        steps = check.integer("steps", state["steps"], 0)
        if list(state["decays"]) != self._names():
            raise ValueError(f"state: expected the decays {self._names()}, got {list(state['decays'])}")
        for average, held in zip(self.averages, state["averages"], strict=True):
            average.check_state(held)
        for average, held in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(held)
        self.steps = steps

    def _names(self) -> list[tuple[str, float]]:
        return [("decay", d) if isinstance(d, float) else ("sigma_rel", d.sigma_rel) for d in self.decays]
