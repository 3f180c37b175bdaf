"""Gradient guidance: an energy of the state, or of the data that the network predicts, steers the score.

    score' = score - w grad_x E(x, t, y),       y = a x + b m
    m'     = m - w sigma^2 / (alpha b) grad_x E

so that y' = y - w sigma^2 / alpha grad_x E, by Tweedie's formula y = (x + sigma^2 score) / alpha; epsilon' is epsilon
+ w sigma grad_x E. E of x and t is classifier guidance, E = -log p(c | x_t) (arXiv:2105.05233). E of y, whose gradient
goes through the network, is reconstruction guidance (arXiv:2204.03458), and with E = |A y - c| diffusion posterior
sampling (arXiv:2209.14687). Where alpha = 0 the state says nothing of the data, and where sigma = 0 everything: there E
does not act and is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from .. import check
from ..fused import apply_row
from ..rows import Out, Row, times
from . import guidance, network

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .guidance import Conditions
    from .loop import Run
    from .parameterization import Parameterization
    from .table import Stage


class GuideOptions(TypedDict, total=False):
    """The keyword arguments of every sample() for guidance by a gradient.

    guide: guide(x, t, y, **guide_cond), the energy E, a tensor [B] or the sum of one, low where the result is wanted;
        x the state [B, ...], t what the network is told [B], y the predicted data [B, ...], before any clamp. It is
        called after each network call, with gradients on. Not with differentiable, and never captured.
    guide_scale: w, a number or a tensor [B]; default 1.
    guide_through: whether y has the network's gradient, default True; without it the network keeps no activations, and
        E has to be of x.
    guide_cond: keyword arguments of guide; tensors have the batch as dimension 0.
    """

    guide: Callable[..., Tensor] | None
    guide_scale: Any
    guide_through: bool | None
    guide_cond: Mapping[str, Any] | None


class Guide(NamedTuple):
    """The options, checked; of all samples, or of a part."""

    energy: Callable[..., Tensor]
    scale: Any
    through: bool
    cond: dict[str, Any]

    def of_samples(self, low: int, high: int) -> Guide:
        scale = guidance.of_samples(self.scale, low, high)
        return self._replace(scale=scale, cond=network.of_samples(self.cond, low, high))


def checked(
    energy: Any, scale: Any, through: bool | None, cond: Mapping[str, Any] | None, stages: Sequence[Stage],
    along: Parameterization | None, like: Tensor,
) -> Guide | None:  # fmt: skip
    """The options guide, guide_scale, guide_through and guide_cond; None of the last three is their default.

    Args:
        like: an empty tensor of shape [B] on the run's device.

    Raises:
        ValueError, TypeError: an option is not what it may be.
    """
    if energy is None:
        for name, value in (("guide_scale", scale), ("guide_through", through), ("guide_cond", cond)):
            if value is not None:
                raise ValueError(f"{name}: expected None without guide, got {value}")
        return None
    if not callable(energy):
        raise TypeError(f"guide: expected a callable, got {type(energy).__name__}")
    if through is not None and not isinstance(through, bool):
        raise TypeError(f"guide_through: expected a bool, got {type(through).__name__}")
    if along is None:
        raise ValueError("guide: expected None where the sampler's path is not known")
    if torch.is_inference_mode_enabled():
        raise ValueError("guide: expected None under torch.inference_mode, where no gradient is taken")
    for stage in stages:
        factor(along, stage.called_at)
    scale = check.coefficient("guide_scale", 1.0 if scale is None else scale, like)
    return Guide(energy, scale, through is not False, network.conditions("guide_cond", cond, like.shape[0]))


def factor(along: Parameterization, t: float) -> float:
    """sigma^2 / (alpha b) at t; 0 where alpha or sigma is. ValueError: the output says nothing of the data there."""
    alpha, sigma = along.scales(t)
    if alpha == 0.0 or sigma == 0.0:
        return 0.0
    b = float(along.data(t).m)
    if b == 0.0:
        raise ValueError(
            f"guide: expected a sampler all of whose network calls say something of the data, got one at t = {t:g}"
        )
    return sigma * sigma / (alpha * b)


class Steered(guidance.Outputs):
    """What the rows of a loop read of a network that an energy steers. Arguments as of Outputs; guide: of the part."""

    def __init__(self, task: Run, n: int, like: Tensor, guide: Guide) -> None:
        super().__init__(task, n, like)
        assert task.along is not None
        self._task, self._guide = task, guide
        self._factors = [factor(task.along, stage.called_at) for stage in task.stages]
        asked = zip(task.stages, self._factors, strict=True)
        self._data = [task.along.data(stage.called_at) if f != 0.0 else None for stage, f in asked]

    def __call__(
        self, model: Any, i: int, stage: Any, x: Tensor, seen: Tensor, t: Tensor, cond: Conditions, scales: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        guide, read = self._guide, self._data[i]
        if read is None:
            return super().__call__(model, i, stage, x, seen, t, cond, scales)
        state = x.detach().requires_grad_()
        if guide.through:
            with torch.enable_grad():
                own = (state * self._task.stages[i].input_scale).to(self._task.model_dtype)
                own = torch.cat([own] * self._task.halves) if self._task.halves > 1 else own
                m, _, _ = super().__call__(model, i, stage, state, own, t, cond, scales)
                (y,) = apply_row(Row((Out(x=read.x, m=read.m),)), x=state, m=m)
        else:
            m, _, _ = super().__call__(model, i, stage, x, seen, t, cond, scales)
            (y,) = apply_row(Row((Out(x=read.x, m=read.m),)), x=x, m=m)
        with torch.enable_grad():
            energy = guide.energy(state, t[: self._n], y, **guide.cond)
        _check_energy(energy, self._n)
        (g,) = torch.autograd.grad(energy, state, torch.ones_like(energy), allow_unused=True)
        if g is None:
            raise ValueError("guide: expected an energy that depends on x (or on y with guide_through), got another")
        row = Row((Out(x=times(-self._factors[i], guide.scale), m=1.0),))
        return apply_row(row, x=g, m=m.detach())[0], None, None


def _check_energy(energy: Any, n: int) -> None:
    if not isinstance(energy, Tensor) or not check.is_float(energy.dtype):
        got = energy.dtype if isinstance(energy, Tensor) else type(energy).__name__
        raise TypeError(f"guide: expected it to return a tensor of {check.FLOATS}, got {got}")
    if energy.shape not in ((), (n,)):
        raise ValueError(f"guide: expected it to return shape () or ({n},), one a sample, got {tuple(energy.shape)}")
    if not energy.requires_grad:
        raise ValueError("guide: expected an energy that depends on x (or on y with guide_through), got another")
