"""MeanFlow: the average velocity of a flow between two times, for generation in one step.

    u(x_t, t, r) = 1/(r - t) int_t^r v(x_tau, tau) d tau,      x_r = x_t + (r - t) u(x_t, t, r),      t <= r
    u = v + (r - t) du/dt,      du/dt = (du/dx) v + du/dt at fixed x and r                        (MeanFlow identity)
    L = E S / sg(S + c)^p,      S = |u(x_t, t, r) - sg(x1 - (1 - sigma_min) x0 + (r - t) du/dt)|^2

in the time of section 13.2, from noise at 0 to data at 1, on the path (13.21); the paper's time is 1 - t. du/dt is
taken along x1 - (1 - sigma_min) x0, whose mean at x_t is v. At r = t the loss is that of flow matching, (13.23).

Geng, Deng, Bai, Kolter, He, arXiv:2505.13447, eqs. (3), (6), (9)-(12), (22).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import check, grids
from ..fused import apply_row
from ..rows import Out, Row
from ..small import affine
from ._jvp import along
from ._training import Batch
from .flow_matching import FlowMatching

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from ..samplers import loop
    from ._training import LossOptions


class MeanFlow:
    """A network of the average velocity, called as model(x, t, r=r, **cond), t and r float32 [B], 0 <= t <= r <= 1.

    Args:
        sigma_min: standard deviation around the data at t = 1, in [0, 1).

    Raises:
        ValueError: sigma_min outside its range.

    Source: arXiv:2505.13447, on section 13.2's path.
    """

    def __init__(self, sigma_min: float = 0.0) -> None:
        self._flow = FlowMatching(sigma_min=sigma_min)
        self.path = self._flow.path

    def loss(
        self, model: Any, x: Tensor, *, t: Any = None, r: Any = None, mean: float = -0.4, std: float = 1.0,
        apart: float = 0.25, adaptive: tuple[float, float] = (1.0, 1e-3), **options: Unpack[LossOptions],
    ) -> Tensor:  # fmt: skip
        """The loss of the identity. One map, one forward-mode pass and one call of the network, one reduce.

        Args:
            model: the average velocity; what it computes needs forward derivatives.
            x: data, the seed's x_1.  [B, ...], floating.
            t, r: both, [B] or a number, 0 <= t <= r <= 1; default two numbers 1 - sigmoid(N(mean, std^2)) in order, r
                set to t in all but a share `apart` of the samples.
            mean, std: of that, std >= 0.
            apart: share of the samples with r > t, in [0, 1].
            adaptive: (p, c) of the weight 1 / sg(S + c)^p, p >= 0 and c > 0. p = 0 is the squared error, whose least
                value u has; the default p = 1 is the paper's.
            options: LossOptions but kind and c; a callable weight is called with t.

        Returns:
            The loss, float32, of the gradient of `model`: of sums over a sample's elements, not means.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        mean, std = check.number("mean", mean), check.number("std", std, 0.0)
        apart = check.number("apart", apart, 0.0, 1.0)
        p, c = (check.number(f"adaptive[{k}]", number, 0.0) for k, number in enumerate(adaptive))
        if not c > 0.0:
            raise ValueError(f"adaptive[1]: expected a number > 0, got {c}")
        batch = Batch(model, x, options)
        batch.squared()
        if (t is None) != (r is None):
            raise ValueError("t, r: expected both or neither, got one of them")
        if t is None:
            t, r = self._times(batch, mean, std, apart)
        else:
            t, r = batch.given_time("t", t, 0.0, 1.0), batch.given_time("r", r, 0.0, 1.0)
            check.inside("r - t", r - t, 0.0, 1.0)
        slope, z = self.path.d_sigma(0.0), batch.z
        # sigma = 1 + sigma' t
        start = Row((Out(x=t, z=affine(t, slope, 1.0)), Out(x=1.0, z=slope)))
        x_t, v = apply_row(start, x=batch.x, noise=z, dtypes=(batch.model_dtype,) * 2)
        _, along_v = along(batch, model, x_t, t, v, torch.ones_like(t), {"r": r}, "model")
        m = batch.call(x_t, t, given={"r": r})
        found = batch.mean_squares(m, x=batch.x, x_coef=1.0, noise=z, noise_coef=slope, h=(along_v,), h_coefs=(r - t,))
        # S = n found, so that S / (S + c)^p = n^(1 - p) found / (found + c / n)^p.
        size = max(math.prod(x.shape[1:]), 1)
        if p > 0.0:
            divisor = found.detach() + c / size
            found = found / (divisor if p == 1.0 else divisor**p)
        return batch.weighed(found, t, scale=size ** (1.0 - p))

    def sample(
        self, model: Any, shape: Sequence[int] | None = None, *, steps: int | None = None, times: Any = None,
        x0: Tensor | None = None, **options: Unpack[loop.Options],
    ) -> Any:  # fmt: skip
        """x_r = x_t + (r - t) u(x_t, t, r) from noise at t = 0 to data at 1, one network call a step.

        Args:
            model: the average velocity.
            shape: [B, ...] of the result; not needed where x0 is given.
            steps: >= 1, on an even grid; default 1.
            times: instead of steps: strictly increasing times in [0, 1].
            x0: the initial state; default N(0, I).
            options: samplers.Options. A loop is captured anew by every call with cuda_graph.

        Returns:
            Samples [B, ...], float32; with return_trajectory (samples, trajectory).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        if times is None:
            grid = grids.uniform(check.integer("steps", 1 if steps is None else steps, 1), 0.0, 1.0)
        elif steps is not None:
            raise ValueError(f"steps: expected None beside times, got {steps}")
        else:
            grid = grids.given(times, low=0.0, high=1.0)
        return self._flow.sample(_ToNext(model, grid), shape, times=grid, x0=x0, **options)

    @staticmethod
    def _times(batch: Batch, mean: float, std: float, apart: float) -> tuple[Tensor, Tensor]:
        numbers = torch.stack([batch.normal(0), batch.normal(1)])
        t, later = torch.sigmoid(affine(numbers, -std, -mean)).aminmax(dim=0)
        return t, torch.where(batch.uniform(2) < apart, later, t)


class _ToNext(nn.Module):
    """u(x, t, r) with r the time after t on a grid: what a loop of steps calls."""

    def __init__(self, model: Any, grid: np.ndarray) -> None:
        super().__init__()
        self.model, self.grid = model, torch.tensor(grid, dtype=torch.float32)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        grid = self.grid.to(t.device)
        # Half way to the next time, as t may be rounded.
        middles = (grid[1:] + grid[:-1]) / 2
        return self.model(x, t, r=grid[1:][torch.searchsorted(middles, t.float())], **cond)
