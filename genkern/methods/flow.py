"""Sampling a flow, dx/dt = v(x, t) on t in [0, 1], either way: what sections 13.2 and 13.3 share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import check, ops, paths
from .. import steps as stochastic
from ..noise import Purpose
from ..samplers import Along, Dopri5, OnPath, editing, loop, network
from ..samplers.density import Chosen
from ..samplers.flow_sde import Stochastic
from ..samplers.table import Sampler, Stage, stages_of
from . import _adaptive
from ._density import DensityRun
from ._flow_samplers import NAMED, STOCHASTIC, ends_of, grid_of, sampler_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from ._density import DensityOptions

DIRECTIONS = ("forward", "backward")


def flow_path(name: str, path: Any) -> paths.Path:
    """A path on [0, 1] with the noise at 0. TypeError: no path. ValueError: another path."""
    if not isinstance(path, paths.Path):
        raise TypeError(f"{name}: expected a path, got {type(path).__name__}")
    if (path.start, path.stop) != (0.0, 1.0):
        raise ValueError(f"{name}: expected a path on t from 0 to 1, got one from {path.start} to {path.stop}")
    if not path.alpha(0.0) * path.sigma(1.0) < path.alpha(1.0) * path.sigma(0.0):
        raise ValueError(f"{name}: expected noise at t = 0 and data at t = 1, got the other way round: paths.Reversed")
    return path


class Flow:
    """A velocity network along a path: called as model(x, t, **cond), t float32 [B] in [0, 1]."""

    path: paths.Path

    def velocity(self, model: Any, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        """v(x, t), the network's output, with t a number or [B], checked. [B, ...]."""
        check.terms([("x", x)])
        found = check.coefficient("t", t, x, 0.0, 1.0)
        times = torch.full((1,), found, device=x.device) if isinstance(found, float) else found
        given = network.conditions("cond", cond, x.shape[0])
        return network.call(model, x.to(network.dtype_of(model, x.dtype)), times.expand(x.shape[0]).contiguous(), given)

    def sample(
        self,
        model: Any,
        shape: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        sampler: str | Sampler | Dopri5 = "euler",
        times: Any = None,
        direction: str = "forward",
        x0: Tensor | None = None,
        x1: Tensor | None = None,
        along: paths.Path | None = None,
        return_stats: bool = False,
        **options: Unpack[loop.Options],
    ) -> Any:
        """Solve dx/dt = v(x, t), eq. (13.14): from noise or a source at t = 0 to data at t = 1, or back.

        Args:
            model: called as model(x, t, **cond).
            shape: [B, ...] of the state; not needed where it is given.
            steps: of the sampler, >= 1, on an even grid; default 50. One network call each with "euler" and
                "ab2", two with "midpoint" and "heun", four with "rk4".
            sampler: "euler", "ab2", "midpoint", "heun", "rk4" or a Sampler; "dopri5", samplers.Dopri5() with its
                tolerances, which chooses its steps (steps is None); or with noise, from a Gaussian source, "sde",
                "flow_grpo" (samplers.EulerMaruyama), "cps", "overshoot" (docs/solvers.md), one call a step.
            times: instead of steps: strictly increasing times in [0, 1] (decreasing for backward). Of "dopri5" the
                times of the trajectory; default the ends.
            direction: "forward" (t from 0 to 1), or "backward" (from 1 to 0; needs x1).
            x0: the initial state of "forward"; default N(0, sigma(0)^2 I).
            x1: the initial state of "backward".
            along: another path on [0, 1] to solve along (samplers.Along): times, states and sources are that path's.
            return_stats: of "dopri5": return samplers.adaptive.Stats too, as the last.
            options: samplers.Options; with "dopri5" those that methods/_adaptive.py does not refuse: no callback,
                editing or guide, no guidance but the plain one, and no gradient.

        Returns:
            The state at the last time [B, ...], float32; with return_trajectory (state, trajectory).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
            RuntimeError: "dopri5" has not reached the end (samplers.Dopri5.solve).
        """
        forward = check.choice("direction", direction, DIRECTIONS) == "forward"
        if forward and x1 is not None:
            raise ValueError("x1: expected None with direction='forward', which starts from x0")
        if not forward and x0 is not None:
            raise ValueError("x0: expected None with direction='backward', which starts from x1")
        start = x0 if forward else x1
        if not forward and start is None and not isinstance(options.get("noise"), Tensor):
            raise ValueError("x1: expected the initial state of direction='backward', got None")
        chosen: Any = sampler if isinstance(sampler, Dopri5) else sampler_named(sampler, NAMED)
        if isinstance(chosen, Dopri5):
            return self._adaptive(
                model, chosen, shape, steps, times, forward, start, along, loop.known(options), return_stats
            )
        if return_stats:
            raise ValueError("return_stats: expected False with a sampler whose steps are given, got True")
        grid = grid_of(steps, times, forward)
        if not forward:
            editing.refuse(options, "with direction='backward', which leads away from the data")
        trained = OnPath(self.path, "velocity")
        path = self.path if along is None else flow_path("along", along)
        asked = trained if along is None else Along(trained, path)
        grid, more = editing.begun(grid, asked, loop.known(options))
        stages = stages_of(chosen, asked, grid)
        return loop.run(model, stages, shape, start=start, along=asked, **{"scale": path.sigma(0.0), **more})

    def _solver(self, sampler: Any, steps: Any, times: Any, forward: bool) -> Sequence[Stage] | Chosen:
        """What the log-density is solved along."""
        chosen = Dopri5() if isinstance(sampler, str) and sampler == "dopri5" else sampler
        if isinstance(chosen, Dopri5):
            return Chosen(chosen, ends_of(steps, times, forward))
        return stages_of(sampler_named(chosen), OnPath(self.path, "velocity"), grid_of(steps, times, forward))

    def _adaptive(
        self, model: Any, pair: Dopri5, shape: Any, steps: Any, times: Any, forward: bool, start: Any, along: Any,
        options: Any, return_stats: bool,
    ) -> Any:  # fmt: skip
        if along is not None:
            raise ValueError("along: expected None with a sampler that chooses its steps, got a path")
        grid = ends_of(steps, times, forward)
        return _adaptive.sample(model, pair, grid, shape, start, self.path.sigma(0.0), options, return_stats)

    def step(
        self, x_t: Tensor, model_output: Tensor, t: Any, s: Any, *, sampler: str | Stochastic = "flow_grpo",
        x_s: Tensor | None = None, **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """A stochastic step from t to s with its log-density, of the network's output at t: steps.linear on this path.

        Args:
            x_t: state at t.  [B, ...].
            model_output: the network's output, the velocity at (x_t, t).  [B, ...].
            t, s: times in [0, 1] with t < s, each a number, or one a sample, [B].
            sampler: "sde", "flow_grpo", "cps", "overshoot", or such a sampler with its options.
            x_s: the state at s to score; None: sample it.
            options: of steps.linear: noise, uncond, guidance_scale, reduction.

        Returns:
            (x_s, log p(x_s | x_t)).  [B, ...] and [B].

        Raises:
            ValueError, TypeError: as steps.linear; not t < s (of device tensors where gk.debug(values=True) looks at
                them); a step that leaves no noise, such as "cps" has to s = 1.

        Source: arXiv:2505.05470; arXiv:2509.05952.
        """
        chosen: Any = sampler_named(sampler, STOCHASTIC) if isinstance(sampler, str) else sampler
        if not isinstance(chosen, Stochastic):
            raise TypeError(
                f"sampler: expected {', '.join(map(repr, STOCHASTIC))}, or one of their kind, got {chosen!r}"
            )
        if not isinstance(x_t, Tensor):
            raise TypeError(f"x_t: expected a torch tensor, got {type(x_t).__name__}")
        given = t, s
        t, s = check.coefficient("t", t, x_t, 0.0, 1.0), check.coefficient("s", s, x_t, 0.0, 1.0)
        check.before("t, s", *given, "toward the data")  # as given: times on the CPU may go with a state that is not
        t, s = (time.double() if isinstance(time, Tensor) else time for time in (t, s))
        c_x, c_m, std = chosen.coefficients(OnPath(self.path, "velocity"), t, s)
        return stochastic.linear(x_t, model_output, c_x, c_m, std, x_s=x_s, **options)

    def log_prob(
        self,
        model: Any,
        x: Tensor,
        *,
        steps: int | None = None,
        sampler: str | Sampler | Dopri5 = "rk4",
        times: Any = None,
        **options: Unpack[DensityOptions],
    ) -> Tensor:
        """log p_1(x) of the flow by the change of variables: x is taken back to t = 0, and

            log p_1(x) = log p_0(x_0) - (the integral of div v(x_t, t) over t from 0 to 1)      (13.14)-(13.16)

        with the integral by the solver's own rule, and so of its order.

        Args:
            model: called as model(x, t, **cond); its samples must not depend on each other, and it must have a
                gradient by x.
            x: data.  [B, ...], floating.
            steps: of the solver, on an even grid; default 50.
            sampler: "euler", "ab2", "midpoint", "heun", "rk4", or a solver of dx/dt = v(x, t); or "dopri5",
                samplers.Dopri5(), which chooses its steps by the error of x (steps is None).
            times: instead of steps: strictly decreasing times in [0, 1]; p_0 is at the last, x at the first.
            options: DensityOptions.

        Returns:
            log p_1(x) in nats, [B], float32 (options: dtype).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.

        Source: (13.14)-(13.16); Chen et al., arXiv:1806.07366; Grathwohl et al., arXiv:1810.01367.
        """
        check.terms([("x", x)])
        stages = self._solver(sampler, steps, times, False)
        run = DensityRun("log_prob", model, x.shape, x.device, options)
        x0, integral = run.solve(stages, x.to(run.dtype))  # from t = 1 to 0: minus the integral from 0 to 1
        return run.source(x0, self.path.sigma(0.0)) + integral

    def sample_with_log_prob(
        self,
        model: Any,
        shape: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        sampler: str | Sampler | Dopri5 = "rk4",
        times: Any = None,
        x0: Tensor | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[DensityOptions],
    ) -> tuple[Tensor, Tensor]:
        """Samples, those of sample() with the same arguments, and their log p_1, from one solve forward.

        Args:
            model, sampler, options: as log_prob().
            shape: [B, ...]; not needed with x0.
            steps, times: as sample().
            x0: draws of the source; default N(0, sigma(0)^2 I).
            device: default x0's, else the model's.

        Returns:
            (x, log p_1(x)): [B, ...] and [B], float32 (options: dtype).

        Raises:
            ValueError, TypeError: as log_prob().
        """
        stages = self._solver(sampler, steps, times, True)
        if x0 is not None:
            check.terms([("x0", x0)])
            if shape is not None and tuple(x0.shape) != check.shape(shape):
                raise ValueError(f"x0: expected shape {tuple(shape)}, got {tuple(x0.shape)}")
        elif shape is None:
            raise ValueError("shape: expected the state's shape, or x0, got None")
        if device is not None:
            where = network.checked_device(device)
        else:
            where = network.device_of(model) if x0 is None else x0.device
        run = DensityRun("sample_with_log_prob", model, shape if x0 is None else x0.shape, where, options)  # type: ignore[arg-type]
        sigma = self.path.sigma(0.0)
        if x0 is None:
            start = ops.randn(run.shape, noise=run.noise.at(Purpose.INITIAL), device=where, dtype=run.dtype)
            start = start if sigma == 1.0 else sigma * start
        else:
            start = x0.to(where, run.dtype)
        x, integral = run.solve(stages, start)
        return x, run.source(start, sigma) - integral
