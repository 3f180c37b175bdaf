"""How the times of a training batch are drawn, in every loss: numbers u in (0, 1), one a sample, then times
t = F^{-1}(u) of a distribution F on [0, 1] (t = u without one); where time is discrete, timesteps floor(T t).

With U the uniform number of a sample's id, and U_0 one that the batch shares,

    uniform       u_b = U(b)
    stratified    u_b = frac(U_0 + (k_b + U(b)) / n),  k_b = id_b mod n
    antithetic    u_{2j} = U(2j),  u_{2j+1} = 1 - U(2j)

each uniform on (0, 1) by itself. Stratified, the n intervals [U_0 + k/n, U_0 + (k+1)/n) have a sample each; as U_0
turns them, no sample of a batch has a lasting place. All come from the Noise of the training times, so that the same
noise gives the same times on every device. A distribution is a callable of the numbers [B] giving t [B], or
(t, weight), such as genkern.flows.LogitNormal: given by itself, or to one of these as `of`. It gets its numbers in
float64; without one they are of the data's precision.

Importance sampling draws t with probability p_t instead and weighs by 1 / (T p_t), which leaves the expected loss as it
is: sum_t p_t (1 / (T p_t)) L_t = (1/T) sum_t L_t. With p_t proportional to sqrt(E[L_t^2]) its variance is least.

Kingma, Salimans, Poole, Ho, arXiv:2107.00630, appendix I (low discrepancy); Nichol, Dhariwal, arXiv:2102.09672,
section 3.3 (importance).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import check, ops
from ..noise import Noise, Purpose

NAMES = ("uniform", "stratified", "antithetic")
LEAST = 2.0**-33  # the smallest uniform number


Distribution = Callable[[Tensor], Any]  # numbers in (0, 1), [B], to times [B], or to (times, weights)


class TimeSampler(Protocol):
    """Draws numbers in (0, 1), each uniform by itself. An attribute `of`, where it is there and not None, is the
    distribution whose times are taken at them."""

    def uniforms(self, noise: Noise, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[B], of a Noise whose draw is still to be set."""


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every sample by itself.

    Args:
        of: the times' distribution; default uniform.

    Raises:
        TypeError: of is no callable of numbers.
    """

    of: Distribution | None = None

    def __post_init__(self) -> None:
        _distribution(self.of)

    def uniforms(self, noise: Noise, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return ops.uniform((size,), noise=noise.at(Purpose.TIMES), device=device, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class Stratified:
    """One sample in each of n intervals of equal length.

    Args:
        strata: n; default the batch's size. Where a batch is spread over processes with sample_ids of the whole, its
            whole size.
        of: the times' distribution; default uniform. The intervals are then of equal probability.

    Raises:
        ValueError: strata < 1. TypeError: of is no callable of numbers.
    """

    strata: int | None = None
    of: Distribution | None = None

    def __post_init__(self) -> None:
        _distribution(self.of)
        if self.strata is not None:
            check.integer("strata", self.strata, 1)

    def uniforms(self, noise: Noise, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        n = self.strata or max(size, 1)
        shared = ops.uniform(
            (1,), noise=noise.at(Purpose.TIMES, 1).of_samples(None), device=device, dtype=dtype
        )  # of sample 0
        own = ops.uniform((size,), noise=noise.at(Purpose.TIMES), device=device, dtype=dtype)
        # A product with 1/n, as division by a number is not rounded alike on every device.
        own = (own + (_ids(noise, size, device) % n)) * (1.0 / n)
        return (own + shared).frac().clamp(min=LEAST)


@dataclasses.dataclass(frozen=True)
class Antithetic:
    """Pairs u, 1 - u: of samples whose ids are 2j and 2j + 1.

    Args:
        of: the times' distribution; default uniform.

    Raises:
        TypeError: of is no callable of numbers.
    """

    of: Distribution | None = None

    def __post_init__(self) -> None:
        _distribution(self.of)

    def uniforms(self, noise: Noise, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        ids = _ids(noise, size, device)
        odd = ids % 2
        of_pair = noise.at(Purpose.TIMES).of_samples(ids - odd)
        u = ops.uniform((size,), noise=of_pair, device=device, dtype=dtype)
        return torch.where(odd == 1, 1.0 - u, u)


class LossSecondMoment(nn.Module):
    """Timesteps in proportion to the root mean square of their last losses: its state is here, the user's own.

    p_t = (1 - uniform) sqrt(mean of L_t^2) / sum + uniform / T, once every timestep has `history` losses; until then
    all are alike. Diffusion.loss draws from it, weighs, and hands it the losses (weighted, but for 1 / (T p_t)); under
    torch.no_grad() it records nothing, so that a validation loss leaves the training as it is.
    Where a batch is spread over processes, set recording = False, gather times and losses, and call update() with all
    of them, so that every process draws alike.

    Args:
        timesteps: T, >= 1.
        history: losses kept a timestep, >= 1.
        uniform: share of the draws that stays uniform, in (0, 1].

    Raises:
        ValueError: an argument outside its range.

    Its buffers are part of state_dict(), and go to the device of the losses. It records in place, which torch.func's
    transforms refuse.
    """

    losses: Tensor  # [T, history + 1], the last column for what is dropped
    counts: Tensor  # [T] int64, of all losses seen

    def __init__(self, timesteps: int, history: int = 10, uniform: float = 1e-3) -> None:
        super().__init__()
        self.timesteps = check.integer("timesteps", timesteps, 1)
        self.history = check.integer("history", history, 1)
        if not 0.0 < check.number("uniform", uniform) <= 1.0:
            raise ValueError(f"uniform: expected a number in (0, 1], got {uniform}")
        self.uniform, self.recording = float(uniform), True
        self.register_buffer("losses", torch.zeros(self.timesteps, self.history + 1, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(self.timesteps, dtype=torch.int64))

    def uniforms(self, noise: Noise, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        # 40 bits of two draws. A draw is a float32, and an interval of 1e-6 near 1 has 16 or 17 of these where it ought
        # to have 16.8: its timestep would be drawn 5% too rarely.
        u = ops.uniform((size, 2), noise=noise.at(Purpose.TIMES), device=device, dtype=torch.float64)
        return ((u[:, 0] * 65536.0).floor() + u[:, 1]) * (1.0 / 65536.0)

    def probabilities(self) -> Tensor:
        """p_t, [T] float64."""
        root = self.losses[:, :-1].square().mean(dim=1).sqrt()
        p = (1.0 - self.uniform) * root / root.sum() + self.uniform / self.timesteps
        ready = (self.counts >= self.history).all() & (root.sum() > 0.0)
        return torch.where(ready, p, torch.full_like(p, 1.0 / self.timesteps))

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps and their weights 1 / (T p_t) at numbers u in (0, 1).  [B] each."""
        if self.counts.device != u.device:
            self.to(u.device)
        p = self.probabilities()
        ends = p.cumsum(0)
        t = torch.searchsorted(ends, u.double() * ends[-1], right=True).clamp_(max=self.timesteps - 1)
        return t, (1.0 / (self.timesteps * p[t])).to(u.dtype)

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        """Takes losses at timesteps in.  int64 [B], [B]. Nothing waits for the device.

        Raises:
            ValueError: shapes that differ, or another dtype of t.
        """
        check.indices("t", t, self.timesteps, losses.shape[0])
        if self.counts.device != t.device:
            self.to(t.device)
        # The k-th loss of a timestep in the batch goes to the slot after k others; of more than fit, the last stay.
        order = t.argsort(stable=True)
        t = t[order]
        first, past = torch.searchsorted(t, t), torch.searchsorted(t, t, right=True)
        k = torch.arange(t.shape[0], device=t.device)
        slot = torch.where(past - k <= self.history, (self.counts[t] + k - first) % self.history, self.history)
        self.losses.index_put_((t, slot), losses[order].to(torch.float64))
        self.counts.index_add_(0, t, torch.ones_like(t))


def named(times: Any) -> Any:
    """A sampler of times by its name, as given, or of a distribution. ValueError: another name. TypeError: neither."""
    if times is None or isinstance(times, str):
        of = {"uniform": Uniform, "stratified": Stratified, "antithetic": Antithetic}
        return of[check.choice("times", "uniform" if times is None else times, NAMES)]()
    if not isinstance(times, type) and callable(getattr(times, "uniforms", None)):
        return times
    if isinstance(times, type) or not callable(times):
        raise TypeError(f"times: expected a name, a TimeSampler or a callable of numbers in (0, 1), got {times!r}")
    return Uniform(times)


def _distribution(of: Any) -> None:
    if of is not None and (isinstance(of, type) or not callable(of) or hasattr(of, "uniforms")):
        raise TypeError(f"of: expected a callable of numbers in (0, 1), got {of!r}")


def _ids(noise: Noise, size: int, device: torch.device) -> Tensor:
    """Sample ids, int64 [B]."""
    if noise.sample_ids is None:
        return torch.arange(size, device=device)
    found: Tensor = check.sample_ids(noise.sample_ids, size, False, device)
    return found
