"""How much a time counts in the loss of Diffusion: a weight w on the squared error of the predicted data.

With x_t = alpha y + sigma e held fixed, an error dy of the data is an error -(alpha / sigma) dy of the noise, so that
of a prediction m = c_y y + c_e e it is (c_y - c_e alpha / sigma) dy. The weight on the prediction's own residual is
then w / k, k = (c_y - c_e alpha / sigma)^2, which with S = SNR = alpha^2 / sigma^2 is

    epsilon, score    k = S            sample    k = 1            v    k = (alpha^2 + sigma^2)^2 / sigma^2 = S + 1

(the residual of a score is taken times sigma, as that of the noise). By name:

    uniform         w = k: 1 on the prediction's residual
    snr             w = S: 1 on the residual of the noise, (13.5) with gamma = 1, whatever is predicted
    min_snr         w = min(S, gamma), gamma = 5              Hang et al., arXiv:2303.09556
    soft_min_snr    w = S gamma / (S + gamma), gamma = 4      Crowson et al., arXiv:2401.11605

Nothing here is 0/0 where alpha or sigma is 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import check
from ..kept import kept

WEIGHTINGS = ("uniform", "snr", "min_snr", "soft_min_snr")
COPIES = 8  # of gamma, that a Diffusion keeps


@dataclasses.dataclass(frozen=True)
class SNR:
    """w = SNR."""

    def of(self, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
        """w / k, the weight on a prediction's residual, at path scales [B]."""
        if prediction == "sample":
            return (alpha / sigma).square()
        if prediction == "v":
            return (alpha / (alpha.square() + sigma.square())).square()
        return torch.ones_like(alpha)


@dataclasses.dataclass(frozen=True)
class MinSNR:
    """w = min(SNR, gamma), gamma > 0: the weight of high signal-to-noise ratios, where the loss is easy, is bounded.

    Raises:
        ValueError: gamma is not positive.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _positive(self.gamma)

    def of(self, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
        """w / k at path scales [B]."""
        if prediction == "sample":
            return (alpha / sigma).square().clamp(max=self.gamma)
        if prediction == "v":
            least = torch.minimum(alpha.square(), self.gamma * sigma.square())
            return least / (alpha.square() + sigma.square()).square()
        return (self.gamma * (sigma / alpha).square()).clamp(max=1.0)


@dataclasses.dataclass(frozen=True)
class SoftMinSNR:
    """w = SNR gamma / (SNR + gamma), gamma > 0: the same bound, reached smoothly.

    Raises:
        ValueError: gamma is not positive.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        _positive(self.gamma)

    def of(self, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
        """w / k at path scales [B]."""
        signal, noise = alpha.square(), self.gamma * sigma.square()
        if prediction == "sample":
            return self.gamma * signal / (signal + noise)
        if prediction == "v":
            return noise * signal / ((signal + noise) * (signal + sigma.square()).square())
        return noise / (signal + noise)


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """w of log SNR by the caller's function."""

    function: Callable[[Tensor], Any]

    def of(self, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
        """w / k at path scales [B]."""
        w = self.function(2.0 * (alpha.log() - sigma.log()))
        if not isinstance(w, Tensor) or w.shape != alpha.shape:
            got = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(f"weighting: expected a tensor of shape {tuple(alpha.shape)} from the callable, got {got}")
        return w * over_k(alpha, sigma, prediction)


Weighting = SNR | MinSNR | SoftMinSNR | Given


def over_k(alpha: Any, sigma: Any, prediction: str) -> Any:
    """1 / k, the squared error of the data over that of a prediction; floats, arrays or tensors."""
    if prediction == "sample":
        return alpha * 0.0 + 1.0
    if prediction == "v":
        return (sigma / (alpha * alpha + sigma * sigma)) ** 2
    return (sigma / alpha) ** 2


def named(weighting: Any, timesteps: int | None) -> Weighting | Tensor | None:
    """A weighting by its name, or as given; None for "uniform".

    Args:
        weighting: of WEIGHTINGS; a Weighting; a function of log SNR [B] that gives w [B]; or gamma of (13.5): numbers
            >= 0 by timestep, [T], on the residual of the noise.
        timesteps: T; None in continuous time.

    Raises:
        ValueError, TypeError: another.
    """
    if weighting is None or isinstance(weighting, (SNR, MinSNR, SoftMinSNR, Given)):
        return weighting
    if isinstance(weighting, str):
        check.choice("weighting", weighting, WEIGHTINGS)
        by_name = {"snr": SNR, "min_snr": MinSNR, "soft_min_snr": SoftMinSNR}
        return by_name[weighting]() if weighting in by_name else None
    if callable(weighting):
        return Given(weighting)
    if timesteps is None:
        raise TypeError(
            "weighting: expected a name, a Weighting or a function of log SNR in continuous time, "
            f"got {type(weighting).__name__}"
        )
    return gamma_of("weighting", weighting, timesteps)


def gamma_of(name: str, gamma: Any, timesteps: int) -> Tensor:
    """gamma of (13.5): finite numbers >= 0, [T], on the device where they are.

    Raises:
        ValueError, TypeError: they are not (values are looked at on the host).
    """
    try:
        found = torch.as_tensor(gamma)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected numbers, one a timestep, got {type(gamma).__name__}") from None
    if found.shape != (timesteps,):
        raise ValueError(f"{name}: expected shape ({timesteps},), one a timestep, got {tuple(found.shape)}")
    check.inside(name, found, 0.0, math.inf)
    return found.detach()


def on_residual(
    weighting: Weighting | Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, prediction: str, tables: dict[Any, Any]
) -> Tensor:
    """The weights on a prediction's residual at times t, where the path's scales are alpha and sigma.  [B] each. tables
    keeps gamma by device."""
    if not isinstance(weighting, Tensor):
        return weighting.of(alpha, sigma, prediction)
    gamma = _on(weighting, alpha.device, alpha.dtype, tables).index_select(0, t)
    return gamma * SNR().of(alpha, sigma, prediction)


def _on(gamma: Tensor, device: torch.device, dtype: torch.dtype, tables: dict[Any, Any]) -> Tensor:
    """gamma on a device. One of the host, which every loss is given anew, is known again by its numbers: a copy of it
    from pageable memory waits for the device."""
    if gamma.device.type != "cpu" or not check.visible(gamma):
        return gamma.to(device, dtype)
    if len(tables) > COPIES:
        tables.clear()
    key = gamma.double().numpy().tobytes(), device, dtype
    # A tensor of the caller's own memory may be written by the caller.
    found: Tensor = kept(tables, key, lambda: torch.empty_like(gamma, dtype=dtype, device=device).copy_(gamma))
    return found


def _positive(gamma: float) -> None:
    if not check.number("gamma", gamma) > 0.0:
        raise ValueError(f"gamma: expected a number > 0, got {gamma}")
