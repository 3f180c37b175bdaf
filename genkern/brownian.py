"""A Brownian path W(tau), tau >= 0, that is the same whichever times it is asked for: a pure function of a Noise.

The times are the binary fractions u of [0, 1) with tau = u / (1 - u). W(0) = 0; halving an interval (l, r) of u at m
draws, with z the normals of the node that m is and p = (tau_m - tau_l) / (tau_r - tau_l),

    W(m) = (1 - p) W(l) + p W(r) + sqrt(p (tau_r - tau_m)) z

(Levy's construction; at r = 1, where tau is infinite, W(l) + sqrt(tau_m - tau_l) z). It descends to an interval 2^-24
of u and of 1 - u, inside which W is linear. So W(tau), tau up to 2^50, is a sum of some 25 to 55 normals with weights
that the host knows, one pass of the kernel each, and the variance of W(b) - W(a) is b - a less at most 2^-24 (a + b);
where tau is above 2^29, within the rounding of u, 2^-53 (a + b)^2.

Node m of depth d is number 2^d + (its place), the stream of the key; the seed is the Noise's with its stream folded in.

Levy 1939; Li, Wong, Chen, Duvenaud, arXiv:2001.01328, section 4 (virtual Brownian tree).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import check
from .noise import Noise, Purpose

if TYPE_CHECKING:
    import torch

FINEST = 2.0**-24  # of u and of 1 - u
LONGEST = 2.0**50  # of tau: beyond it u is soon rounded to 1
_MASK64 = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class BrownianNoise:
    """W, as a value; for `step_noise=` of a stochastic sampler, so that runs with other steps follow the same path.

    Diffusion.sample takes it as it is: the noise of the step from t to s is then (W(SNR_s) - W(SNR_t)) /
    sqrt(SNR_s - SNR_t), SNR = alpha^2 / sigma^2. In that clock the noise that the reverse-time SDE of the DDPM gathers
    between two times is alpha_s / SNR_s times the increment of W, exactly, whatever the times (with y constant).

    Args:
        noise: its seed, stream and sample_ids, numbers of the host; or a seed.

    Raises:
        ValueError, TypeError: a seed outside 0 .. 2^64 - 1, or in device memory.
    """

    noise: Noise

    def __init__(self, noise: Noise | int) -> None:
        found = noise if isinstance(noise, Noise) else Noise(noise)
        if found.on_device:
            raise TypeError("noise: expected a seed and a stream on the host, got a tensor")
        object.__setattr__(self, "noise", found)

    def increment(
        self, a: float, b: float, shape: Sequence[int], *, device: Any = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """W(b) - W(a).

        Args:
            a, b: times from 0 to 2^50.
            shape: of the result, dimension 0 the batch.
            device, dtype: of the result; default torch's.

        Returns:
            [B, ...].

        Raises:
            ValueError: a time outside that range.
        """
        return self._sum(difference(a, b), shape, device, dtype)

    def normal(
        self, a: float, b: float, shape: Sequence[int], *, device: Any = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """(W(b) - W(a)) / sqrt(|b - a|), standard normal; arguments as of increment, a and b different.

        It is W(b) - W(a) over its own standard deviation, as W is linear inside the finest intervals. Increments inside
        one of these, of relative lengths below 2^-24, are the same normals.
        """
        found = difference(a, b)
        std = math.hypot(*found.values())
        if std == 0.0:
            raise ValueError(f"b: expected another time than a, got {b} and {a}")
        return self._sum({node: c / std for node, c in found.items()}, shape, device, dtype)

    def steps(
        self, clock: Sequence[float], shape: Sequence[int], *, device: Any = None, dtype: torch.dtype | None = None
    ) -> Callable[[int], torch.Tensor]:
        """The noise of step k from clock[k] to clock[k + 1], as `step_noise=` takes it; fresh noise to an infinite one.

        Args:
            clock: times as of increment, one more than there are steps, each another than the one before.
            others: as of increment.
        """

        def noise_of(k: int) -> torch.Tensor:
            if math.isinf(clock[k + 1]):
                return self._sum({1: 1.0}, shape, device, dtype, self.noise.at(Purpose.STEP, k))
            return self.normal(clock[k], clock[k + 1], shape, device=device, dtype=dtype)

        return noise_of

    def _sum(
        self, weights: dict[int, float], shape: Sequence[int], device: Any, dtype: Any, of: Noise | None = None
    ) -> torch.Tensor:
        import torch

        from .fused import apply_row
        from .rows import Out, Row

        seed = int(self.noise.seed) ^ mix64(int(self.noise.stream))
        base = Noise(seed, sample_ids=self.noise.sample_ids).at(Purpose.BROWNIAN)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        total: Any = None
        for node, c in weights.items():
            noise = dataclasses.replace(base, stream=node) if of is None else of
            if total is None:
                row, given = Row((Out(z=c),)), torch.empty(tuple(shape), device=device, dtype=dtype)
                (total,) = apply_row(row, noise=noise, out=given, size=shape, device=given.device)
            else:
                apply_row(Row((Out(x=1.0, z=c),)), x=total, noise=noise, out=total)
        found: torch.Tensor = torch.zeros(tuple(shape), device=device, dtype=dtype) if total is None else total
        return found


def weights_of(tau: float) -> dict[int, float]:
    """W(tau) as a sum: node -> weight of its normals. ValueError: tau < 0, or > 2^50."""
    u = check.number("tau", tau, 0.0, LONGEST)
    u = u / (1.0 + u)
    left, right = 0.0, 1.0
    at_left: dict[int, float] = {}  # W(l), W(r) as sums
    at_right: dict[int, float] = {}
    node = 1
    while u > left and right - left > FINEST * min(u, 1.0 - u):
        middle = 0.5 * (left + right)
        part, std = _bridge(left, middle, right)
        at_middle = _mixed(at_left, at_right, part)
        at_middle[node] = std
        if u < middle:
            right, at_right, node = middle, at_middle, 2 * node
        else:
            left, at_left, node = middle, at_middle, 2 * node + 1
    if u == left:
        return at_left
    return _mixed(at_left, at_right, (tau - _tau(left)) / (_tau(right) - _tau(left)))


def difference(a: float, b: float) -> dict[int, float]:
    """W(b) - W(a) as a sum: node -> weight, without those that cancel."""
    first, second = weights_of(a), weights_of(b)
    found = {node: second.get(node, 0.0) - first.get(node, 0.0) for node in sorted(first.keys() | second.keys())}
    return {node: c for node, c in found.items() if c != 0.0}


def mix64(x: int) -> int:
    """The finaliser of splitmix64, as the noise's key has it of a stream."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _tau(u: float) -> float:
    return u / (1.0 - u) if u < 1.0 else math.inf


def _bridge(left: float, middle: float, right: float) -> tuple[float, float]:
    """Of W at the middle given both ends: the weight of the right end, and the standard deviation."""
    low, here, high = _tau(left), _tau(middle), _tau(right)
    if math.isinf(high):
        return 0.0, math.sqrt(here - low)
    part = (here - low) / (high - low)
    return part, math.sqrt(part * (high - here))


def _mixed(left: dict[int, float], right: dict[int, float], part: float) -> dict[int, float]:
    """(1 - part) left + part right."""
    if part == 0.0:
        return dict(left)
    found = {node: (1.0 - part) * c for node, c in left.items()}
    for node, c in right.items():
        found[node] = found.get(node, 0.0) + part * c
    return found
