"""Consistency models, section 13.4, with epsilon = sigma_min and T = sigma_max.

    f(x, t)  = c_skip(t) x + c_out(t) F(c_in(t) x, c_noise(t)),   f(x, epsilon) = x               (13.29)
    dx/dt    = -t score(x, t) = (x - D(x, t)) / t                                                (13.27)

with D the teacher's denoiser. The distillation, (13.31) and (13.32), is in consistency_distillation.py, what needs no
teacher in consistency_training.py. The scalings are in samplers/parameterization.py: with the shift by epsilon for f,
without for D.

Song, Dhariwal, Chen, Sutskever, arXiv:2303.01469; Karras et al., arXiv:2206.00364.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import check, grids, ops
from ..fused import apply_row
from ..rows import Out, Row, times
from ..samplers import Multistep, Preconditioned, editing, loop, network
from ..samplers.table import Sampler, stages_of
from ._flow_samplers import sampler_named
from ._training import Batch
from .consistency_distillation import ConsistencyDistillation
from .zero_shot import ZeroShot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Unpack

    from ._training import LossOptions


class Consistency(ConsistencyDistillation, ZeroShot):
    """A consistency model and its teacher. Networks are called as F(c_in x, c_noise, **cond), c_noise float32 [B].

    Args:
        sigma_min: epsilon, the smallest time, > 0.
        sigma_max: T, the largest.
        sigma_data: standard deviation of the data, > 0.
        rho: of the times (13.30), > 0.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or sigma_data or rho not positive.

    Source: section 13.4.
    """

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5, rho: float = 7.0
    ) -> None:
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.times(2)  # checks them
        self.function = Preconditioned(sigma_data, sigma_min)
        self.teacher = Preconditioned(sigma_data)
        self._tables: dict[Any, Any] = {}

    def denoise(self, model: Any, x: Tensor, sigma: Any, cond: Mapping[str, Any] | None = None) -> Tensor:
        """The consistency function, eq. (13.29): f(x, sigma), an estimate of the start of x's trajectory.

        Args:
            model: F.
            x: state.  [B, ...], floating.
            sigma: time, in [epsilon, T]; a number, or [B].
            cond: keyword arguments of the model.

        Returns:
            f.  [B, ...], x's dtype. At sigma = epsilon it is x exactly.

        Raises:
            ValueError, TypeError: an argument is not what it may be.
        """
        return self._apply(self.function, model, x, sigma, cond)

    def teacher_denoise(self, teacher: Any, x: Tensor, sigma: Any, cond: Mapping[str, Any] | None = None) -> Tensor:
        """The teacher's denoiser D(x, sigma) = E[data | x]; arguments as denoise()."""
        return self._apply(self.teacher, teacher, x, sigma, cond)

    def teacher_loss(
        self, teacher: Any, x: Tensor, *, sigma: Any = None, mean: float = -1.2, std: float = 1.2,
        **options: Unpack[LossOptions],
    ) -> Tensor:  # fmt: skip
        """Denoising score matching for the teacher: E |D(x + sigma z, sigma) - x|^2 / c_out^2, in terms of F

            |F - x sigma / (sd r) + z sd / r|^2,       r = sqrt(sigma^2 + sd^2).

        Args:
            teacher: F, called as teacher(c_in x, c_noise, **cond).
            x: data.  [B, ...], floating.
            sigma: [B] or a number, >= epsilon; default lognormal, ln sigma ~ N(mean, std^2).
            options: LossOptions.

        Returns:
            The loss, float32: mean over a sample's elements, then over the batch of weight times that.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the teacher's output has another shape than x.

        Source: Karras et al., arXiv:2206.00364, eq. (8) and table 1.
        """
        mean, std = check.number("mean", mean), check.number("std", std, 0.0)
        batch, sd = Batch(teacher, x, options), self.teacher.sigma_data
        if sigma is None:
            sigma = batch.lognormal(mean, std)
        else:
            sigma = batch.given_time("sigma", sigma, self.sigma_min, np.inf)
        c_in = self.teacher.c_in(sigma)
        in_scale = c_in * sigma
        noising = Row((Out(x=c_in, z=in_scale),))
        (seen,) = apply_row(noising, x=batch.x, noise=batch.z, dtypes=(batch.model_dtype,))
        m = batch.call(seen, self.teacher.c_noise(sigma))
        return batch.loss(
            m, batch.x, sigma, x_coef=times(1.0 / sd, in_scale), noise_coef=times(-sd, c_in), noise=batch.z
        )

    @torch.no_grad()
    def self_consistency(
        self, model: Any, trajectory: Tensor, times: Any, cond: Mapping[str, Any] | None = None
    ) -> Tensor:
        """How far f is from one value along trajectories of the probability-flow ODE (13.27): of each state

            sqrt(mean over batch and elements of (f(x_k, t_k) - f(x_K, t_K))^2),      k = 0 .. K,

        which is 0 for the consistency function. K + 2 network calls.

        Args:
            model: F.
            trajectory: states x_0 .. x_K.  [K + 1, B, ...], as sample_ode(..., return_trajectory=True) gives it.
            times: t_0 .. t_K, K + 1 numbers in [epsilon, T].
            cond: keyword arguments of the model.

        Returns:
            [K + 1], float32 (float64 for float64), the last 0.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        check.terms([("trajectory", trajectory)])
        given = np.asarray(times, dtype=np.float64)
        if given.shape != trajectory.shape[:1]:
            raise ValueError(f"times: expected shape ({trajectory.shape[0]},), one a state, got {given.shape}")
        if not given.size:
            raise ValueError("trajectory: expected at least one state, got none")
        for t in given.tolist():
            check.number("times", t, self.sigma_min, self.sigma_max)
        # A number would be told to the network in float32.
        exact = trajectory.dtype == torch.float64
        at = (
            torch.tensor(given.tolist(), dtype=torch.float64).to(trajectory.device).split(1)
            if exact
            else given.tolist()
        )
        last = self.denoise(model, trajectory[-1], at[-1], cond)
        squares = [
            ops.path_loss(self.denoise(model, x, t, cond), h=(last,)) for x, t in zip(trajectory, at, strict=True)
        ]
        return torch.stack(squares).sqrt()

    def sample(
        self,
        model: Any,
        shape: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        times: Any = None,
        clip: Any = None,
        **options: Unpack[loop.Options],
    ) -> Any:
        """One-step and multistep generation with a consistency model, from N(0, T^2 I).

        Args:
            model: the student's F.
            shape: [B, ...] of the result.
            steps: network calls, >= 1; default 1. The times are (13.30)'s upper ones of steps + 1.
            times: instead of steps: strictly decreasing times in (epsilon, T], at least one.
            clip: None, (lo, hi), or c for (-c, c): the clamp of f; or a DynamicThreshold.
            options: samplers.Options. The initial state is times[0] times noise; a given tensor is the state itself.

        Returns:
            Samples [B, ...], float32; with return_trajectory (samples, trajectory).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        grid = self._decreasing(steps, times)
        grid, more = editing.begun(grid, self.function, {"scale": float(grid[0]), **loop.known(options)})
        stages = stages_of(Multistep(self.sigma_min), self.function, grid)
        return loop.run(model, stages, shape, along=self.function, clip=clip, **more)

    def sample_ode(
        self,
        teacher: Any,
        shape: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        sampler: str | Sampler = "heun",
        times: Any = None,
        to_zero: bool = False,
        **options: Unpack[loop.Options],
    ) -> Any:
        """Solve the teacher's probability-flow ODE (13.27) from N(0, T^2 I) down to epsilon.

        Args:
            teacher: the teacher's F.
            shape: [B, ...] of the result.
            steps: of the sampler, >= 1; default 18. The times are (13.30)'s.
            sampler: "heun" (two network calls a step), "euler", "ab2", "midpoint", "rk4", or a Sampler.
            times: instead of steps: strictly decreasing times in [0, T].
            to_zero: end with a step to 0 instead of at epsilon; it is Euler's, since the slope at 0 is not defined.
            options: samplers.Options. The initial state is times[0] times noise; a given tensor is the state itself.

        Returns:
            Samples [B, ...], float32; with return_trajectory (samples, trajectory).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the teacher's output has another shape than x.
        """
        if times is not None:
            if to_zero:
                raise ValueError("to_zero: expected False beside times, which end where they end")
            grid = self._given(steps, times)
        else:
            steps = check.integer("steps", 18 if steps is None else steps, 1)
            if not to_zero:
                grid = self.times(steps + 1)[::-1]
            else:
                upper = self.times(steps)[::-1] if steps > 1 else np.array([self.sigma_max])
                grid = np.append(upper, 0.0)
        grid, more = editing.begun(grid, self.teacher, {"scale": float(grid[0]), **loop.known(options)})
        stages = stages_of(sampler_named(sampler), self.teacher, grid)
        return loop.run(teacher, stages, shape, along=self.teacher, **more)

    def _decreasing(self, steps: int | None, times: Any) -> np.ndarray:
        if times is None:
            return self.times(check.integer("steps", 1 if steps is None else steps, 1) + 1)[::-1]
        return self._given(steps, np.append(np.asarray(times, dtype=np.float64), self.sigma_min))

    def _given(self, steps: int | None, times: Any) -> np.ndarray:
        if steps is not None:
            raise ValueError(f"steps: expected None beside times, got {steps}")
        grid = grids.given(times, low=0.0, high=self.sigma_max)
        if grid[0] < grid[-1]:
            raise ValueError(f"times: expected decreasing times, got {grid}")
        return grid

    def _apply(self, c: Preconditioned, model: Any, x: Tensor, sigma: Any, cond: Any) -> Tensor:
        check.terms([("x", x)])
        sigma = check.coefficient("sigma", sigma, x, self.sigma_min, self.sigma_max)
        dtype = network.dtype_of(model, x.dtype)
        (seen,) = apply_row(Row((Out(x=c.c_in(sigma)),)), x=x, dtypes=(dtype,))
        told = c.c_noise(sigma)
        if isinstance(told, float):
            told = torch.full((1,), told, device=x.device)
        given = network.conditions("cond", cond, x.shape[0])
        found = network.call(model, seen, told.expand(x.shape[0]).contiguous(), given)
        return ops.consistency_skip(x, network.at_most(found, x.dtype), c.c_skip(sigma), c.c_out(sigma))
