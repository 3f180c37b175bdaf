"""sCM: consistency models in continuous time, on TrigFlow (samplers/trig.py has its path and f).

    g   = -cos^2(t) (sd F^- - dx/dt) - w cos(t) sin(t) (x_t + sd dF^-/dt)                cos(t) df^-/dt at w = 1
    L   = E e^u / D |F(x_t / sd, t) - F^-(x_t / sd, t) - g / (|g| + c)|^2 - u,      u = u(t)

with F^- the student without gradient, D the elements of a sample, |g| a sample's norm. dx/dt is the noising's own,
cos(t) z - sin(t) x (consistency training), or sd F_teacher(x_t / sd, t) (distillation). dF^-/dt is the derivative along
the trajectory, (dF/dx) dx/dt / sd + dF/dt, taken forward mode and already times cos(t) sin(t), which keeps it finite
near pi/2. w rises from 0 to 1 at the beginning of a training. ln(tan(t) sd) ~ N(mean, std^2); the defaults, -1 and 1.4,
are those of the paper's CIFAR-10 (appendix G.2).

Lu, Song, arXiv:2410.11081, eqs. (4) to (8), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import check, grids, ops
from ..fused import apply_row, reduce_row
from ..rows import Out, Row, times
from ..samplers import loop, network
from ..samplers.table import Sampler, stages_of
from ..samplers.trig import Trig, TrigMultistep
from ..small import affine
from ._flow_samplers import sampler_named
from ._jvp import along
from ._pair import frozen
from ._training import Batch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Unpack

    from ._training import LossOptions

SECOND = 1.1  # the paper's intermediate time of two steps


class TrigFlow:
    """A continuous-time consistency model and its teacher. Networks: F(x_t / sd, t, **cond), t float32 [B].

    Args:
        sigma_data: sd, standard deviation of the data, > 0.
        sigma_max: tan(t) sd at the largest time of sampling, > 0.

    Attributes:
        stop: that time, arctan(sigma_max / sd).

    Raises:
        ValueError: an argument that is not positive.

    Source: Lu, Song, arXiv:2410.11081.
    """

    def __init__(self, sigma_data: float = 0.5, sigma_max: float = 80.0) -> None:
        self.function = Trig(sigma_data)
        if not check.number("sigma_max", sigma_max) > 0.0:
            raise ValueError(f"sigma_max: expected a number > 0, got {sigma_max}")
        self.sigma_data, self.stop = self.function.sigma_data, math.atan(sigma_max / sigma_data)

    def denoise(self, model: Any, x: Tensor, t: Any, cond: Mapping[str, Any] | None = None) -> Tensor:
        """f(x, t) = cos(t) x - sin(t) sd F(x / sd, t).

        Args:
            model: F.
            x: state.  [B, ...], floating.
            t: a number, or [B], in [0, pi/2].
            cond: keyword arguments of the model.

        Returns:
            f.  [B, ...], x's dtype. At t = 0 it is x exactly.

        Raises:
            ValueError, TypeError: an argument is not what it may be.
        """
        check.terms([("x", x)])
        t = check.coefficient("t", t, x, 0.0, math.pi / 2)
        (seen,) = apply_row(Row((Out(x=1.0 / self.sigma_data),)), x=x, dtypes=(network.dtype_of(model, x.dtype),))
        told = torch.full((1,), t, device=x.device) if isinstance(t, float) else t
        given = network.conditions("cond", cond, x.shape[0])
        found = network.call(model, seen, told.expand(x.shape[0]).contiguous(), given)
        return ops.consistency_skip(x, network.at_most(found, x.dtype), *self.function.data(t))

    def teacher_loss(
        self, teacher: Any, x: Tensor, *, t: Any = None, mean: float = -1.0, std: float = 1.4,
        **options: Unpack[LossOptions],
    ) -> Tensor:  # fmt: skip
        """The diffusion model's loss E |F(x_t / sd, t) - (cos(t) z - sin(t) x) / sd|^2, in terms of F.

        Args:
            teacher: F.
            x: data.  [B, ...], floating.
            t: [B] or a number, in [0, pi/2]; default arctan(e^n / sd), n ~ N(mean, std^2).
            options: LossOptions.

        Returns:
            The loss, float32: mean over a sample's elements, then over the batch of weight times that.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the teacher's output has another shape than x.

        Source: arXiv:2410.11081, eq. (4).
        """
        mean, std = check.number("mean", mean), check.number("std", std, 0.0)
        batch = Batch(teacher, x, options)
        t, cos, sin = self._angles(batch, t, mean, std)
        noising = Row((Out(x=times(1.0 / self.sigma_data, cos), z=sin),))
        (seen,) = apply_row(noising, x=batch.x, noise=batch.z, dtypes=(batch.model_dtype,))
        m = batch.call(seen, t)
        return batch.loss(m, batch.x, t, x_coef=times(-1.0 / self.sigma_data, sin), noise_coef=cos, noise=batch.z)

    def loss(
        self, model: Any, x: Tensor, *, teacher: Any = None, warmup: float = 1.0, tangent_c: float | None = 0.1,
        log_weight: Callable[[Tensor], Tensor] | None = None, t: Any = None, mean: float = -1.0, std: float = 1.4,
        **options: Unpack[LossOptions],
    ) -> Tensor:  # fmt: skip
        """sCM's loss: consistency training, or distillation from a teacher. One map (two with a teacher), a
        forward-mode pass and a call of the student, two reduces.

        Args:
            model: the student's F; what it computes needs forward derivatives.
            x: data.  [B, ...], floating.
            teacher: F of a diffusion model, as teacher_loss() trains it; None: consistency training.
            warmup: w, in [0, 1]; the paper's is min(1, step / 10000).
            tangent_c: c of the tangent's normalisation, > 0; None: none.
            log_weight: u(t), [B] of t [B]: the adaptive weight, a network trained beside the student; default 0.
            t: [B] or a number, in [0, pi/2]; default arctan(e^n / sd), n ~ N(mean, std^2).
            mean, std: of that, std >= 0.
            options: LossOptions but kind, c and mask; a callable weight is called with t.

        Returns:
            The loss, float32, of the gradient of `model` and of log_weight.

        Raises:
            ValueError, TypeError: an argument is not what it may be; an output has another shape than x.
            FloatingPointError: the tangent is not finite; looked at on the CPU, and under gk.debug(values=True).
        """
        w, mean = check.number("warmup", warmup, 0.0, 1.0), check.number("mean", mean)
        std = check.number("std", std, 0.0)
        if tangent_c is not None and not check.number("tangent_c", tangent_c) > 0.0:
            raise ValueError(f"tangent_c: expected a number > 0, got {tangent_c}")
        batch, sd = Batch(model, x, options), self.sigma_data
        batch.squared(mask=False)
        t, cos, sin = self._angles(batch, t, mean, std)
        seen_dtype, z, both = batch.model_dtype, batch.z, cos * sin
        along_cos, along_sin, cos2 = both * cos, both * sin, cos * cos

        state = Out(x=times(1.0 / sd, cos), z=sin)
        slope: tuple[Tensor, ...] = ()
        if teacher is None:
            start = Row((state, Out(x=times(-1.0 / sd, along_sin), z=along_cos)))
            seen, dx = apply_row(start, x=batch.x, noise=z, dtypes=(seen_dtype, seen_dtype))
            # cos^2 dx/dt has z and x, too: sd cos^3 z - cos^2 sin x.
            x_coef, z_coef = times(-1.0 - w, along_cos), times(sd, affine(cos2, 1.0 + w, -w) * cos)
        else:
            (seen,) = apply_row(Row((state,)), x=batch.x, noise=z, dtypes=(seen_dtype,))
            slope = (frozen(batch, teacher, seen, t, "teacher"),)
            (dx,) = apply_row(Row((Out(x=both),)), x=slope[0], dtypes=(seen_dtype,))
            x_coef, z_coef = times(-w, along_cos), times(-w * sd, along_sin)
        still, turn = along(batch, model, seen, t, dx, both, {}, "model")

        h_coefs = (-w * sd, *(times(sd, cos2) for _ in slope))
        tangent = Row((Out(x=x_coef, m=times(-sd, cos2), z=z_coef, h=h_coefs),))
        with torch.no_grad():
            g, sums = reduce_row(tangent, x=batch.x, m=still, h=(turn, *slope), noise=z)
            norms = sums[:, 0].sqrt()
            check.finite(
                "tangent", norms, "of the model's output and its derivative" + ", and the teacher's" * len(slope)
            )
            scale = 1.0 if tangent_c is None else (norms + tangent_c).reciprocal()
        m = batch.call(seen, t)
        target: dict[str, Any] = {"h": (still, g), "h_coefs": (1.0, scale)}
        if log_weight is None:
            return batch.loss(m, None, t, **target)
        u = self._log_weight(log_weight, t)
        return batch.loss(m, None, t, factor=u.exp(), added=-u, **target)

    def sample(
        self, model: Any, shape: Sequence[int] | None = None, *, steps: int | None = None, times: Any = None,
        clip: Any = None, **options: Unpack[loop.Options],
    ) -> Any:  # fmt: skip
        """One-step and multistep generation with the consistency function, from N(0, sd^2 I).

        Args:
            model: F.
            shape: [B, ...] of the result.
            steps: 1 (the default) or 2 network calls, at `stop` and 1.1.
            times: instead of steps: strictly decreasing times in (0, pi/2], at least one.
            clip: None, (lo, hi), or c for (-c, c): the clamp of f; or a DynamicThreshold.
            options: samplers.Options. The initial state is sd times noise; a given tensor is the state itself.

        Returns:
            Samples [B, ...], float32; with return_trajectory (samples, trajectory).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        if times is None:
            given = (self.stop, SECOND)[: check.integer("steps", 1 if steps is None else steps, 1, 2)]
        elif steps is not None:
            raise ValueError(f"steps: expected None beside times, got {steps}")
        else:
            given = times
        grid = self._given(np.append(np.asarray(given, dtype=np.float64), 0.0))
        stages = stages_of(TrigMultistep(self.sigma_data), self.function, grid)
        return loop.run(model, stages, shape, scale=self.sigma_data, clip=clip, **loop.known(options))

    def sample_ode(
        self, teacher: Any, shape: Sequence[int] | None = None, *, steps: int = 18, sampler: str | Sampler = "heun",
        **options: Unpack[loop.Options],
    ) -> Any:  # fmt: skip
        """Solve dx/dt = sd F(x / sd, t) from N(0, sd^2 I) at `stop` down to 0, on an even grid.

        Args:
            teacher: F.
            shape: [B, ...] of the result.
            steps: of the sampler, >= 1.
            sampler: "heun" (two network calls a step), "euler", or a Sampler.
            options: samplers.Options. The initial state is sd times noise; a given tensor is the state itself.

        Returns:
            Samples [B, ...], float32; with return_trajectory (samples, trajectory).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the teacher's output has another shape than x.
        """
        grid = grids.uniform(check.integer("steps", steps, 1), self.stop, 0.0)
        stages = stages_of(sampler_named(sampler), self.function, grid)
        return loop.run(teacher, stages, shape, scale=self.sigma_data, **loop.known(options))

    def _angles(self, batch: Batch, t: Any, mean: float, std: float) -> tuple[Tensor, Tensor, Tensor]:
        """t, cos t, sin t, [B] each."""
        if t is None:
            found = batch.lognormal(mean - math.log(self.sigma_data), std).atan()
        else:
            found = batch.given_time("t", t, 0.0, math.pi / 2)
        return found, found.cos(), found.sin()

    @staticmethod
    def _given(times: np.ndarray) -> np.ndarray:
        grid = grids.given(times, low=0.0, high=math.pi / 2)
        if grid[0] < grid[-1]:
            raise ValueError(f"times: expected decreasing times, got {grid}")
        return grid

    @staticmethod
    def _log_weight(log_weight: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        u = log_weight(t)
        if not isinstance(u, Tensor):
            raise TypeError(f"log_weight: expected a tensor [{t.shape[0]}], got {type(u).__name__}")
        if u.shape != t.shape:
            raise ValueError(f"log_weight: expected shape {tuple(t.shape)}, one a sample, got {tuple(u.shape)}")
        return u.to(t.dtype)
