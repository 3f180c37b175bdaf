"""DDPM and DDIM, section 13.1.

    x_t = alpha_t x + sigma_t e,     alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)            (13.4)
    L   = E_{t, x, e} gamma_t |e_theta(x_t, t) - e|^2                                             (13.5)
    f   = (x_t - sigma_t e_theta) / alpha_t                                                       (13.9)

and the generative steps (13.10), (13.13). abar is the seed's alpha (the cumulative product); code's t = 0 .. T-1 is the
seed's t - 1, and below t = 0 stands the seed's alpha_0 = 1. gamma is 1 unless a weight is given. Instead of e the
network may predict v = alpha e - sigma x, or x itself, or the score -e / sigma (in (13.5) e_theta is then minus sigma
times it). On a continuous path (paths.LinearVP, paths.CosineVP) t is in [0, 1], with the data at 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import check, grids, paths, steps
from ..fused import apply_row
from ..rows import Out, Row
from ..samplers import DDIMInversion, OnPath, editing, loop
from ..samplers.table import Sampler, stages_of
from ._diffusion_samplers import sampler_named
from ._training import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from ._training import LossOptions

PREDICTIONS = ("epsilon", "v", "sample", "score")
CONTINUOUS = ("continuous_vp", "cosine_log_snr")
FIRST = 1e-3  # the time whose noise level ends a named grid of noise levels on a continuous path (arXiv:2011.13456)


class Diffusion:
    """A variance-preserving diffusion. The network is called as model(x_t, t, **cond), t int64 [B] (float32 [B] on a
    continuous path).

    Args:
        schedule: of discrete time "linear", "scaled_linear", "sigmoid", "squared_cosine" or "laplace" (paths.betas);
            of continuous time "continuous_vp" (paths.LinearVP), "cosine_log_snr" (paths.CosineVP), or such a path; not
            read where betas or alphas_cumprod are given.
        timesteps: T; not read on a continuous path.
        prediction: what the network predicts: "epsilon", "v", "sample" or "score".
        beta_start, beta_end: of the schedules that have them (beta(0) and beta(1) of "continuous_vp").
        betas: given, [T].
        alphas_cumprod: given, [T], decreasing: the seed's alpha_1 .. alpha_T.
        final_alphas_cumprod: of the step below t = 0, the seed's alpha_0.
        shift: > 0, multiplies every noise level sigma / alpha: d / d_0 for images of side d with a schedule made for
            side d_0 (paths.shift_noise_level).
        rescale_zero_snr: rescale a discrete schedule so that it ends without signal (paths.rescale_zero_snr; after the
            shift); with the predictions "v" and "sample" alone, as the others say nothing there.

    Raises:
        ValueError: a schedule that is not decreasing or leaves [0, 1), an unknown prediction, timesteps < 1, options
            that do not go together.

    Source: section 13.1; Ho, Jain, Abbeel, arXiv:2006.11239; Song, Meng, Ermon, arXiv:2010.02502.
    """

    def __init__(
        self,
        schedule: str | paths.ContinuousVP = "linear",
        timesteps: int = 1000,
        prediction: str = "epsilon",
        *,
        beta_start: float | None = None,
        beta_end: float | None = None,
        betas: Any = None,
        alphas_cumprod: Any = None,
        final_alphas_cumprod: float = 1.0,
        shift: float = 1.0,
        rescale_zero_snr: bool = False,
    ) -> None:
        self.path: paths.DiscreteVP | paths.ContinuousVP
        if betas is not None and alphas_cumprod is not None:
            raise ValueError("betas: expected None beside alphas_cumprod")
        self.prediction = check.choice("prediction", prediction, PREDICTIONS)
        given = betas is not None or alphas_cumprod is not None
        if not given and (isinstance(schedule, paths.ContinuousVP) or schedule in CONTINUOUS):
            if rescale_zero_snr or final_alphas_cumprod != 1.0:
                raise ValueError("rescale_zero_snr, final_alphas_cumprod: expected a schedule of discrete time")
            self.path = _continuous(schedule, beta_start, beta_end, shift)
            return
        if alphas_cumprod is None:
            if not given:
                name = check.choice("schedule", schedule, (*paths.SCHEDULES, *CONTINUOUS))
                betas = paths.betas(name, timesteps, beta_start, beta_end)
            alphas_cumprod = paths.alphas_cumprod_of(betas)
        if shift != 1.0:
            alphas_cumprod = paths.shift_noise_level(alphas_cumprod, shift)
        if rescale_zero_snr:
            alphas_cumprod = paths.rescale_zero_snr(alphas_cumprod)
        self.path = paths.DiscreteVP(alphas_cumprod, final_alphas_cumprod)
        if self.path.finite < self.path.timesteps and prediction in ("epsilon", "score"):
            raise ValueError(
                "prediction: expected 'v' or 'sample' with a schedule that ends without signal (zero terminal SNR), "
                f"got {prediction!r}"
            )

    @property
    def discrete(self) -> bool:
        """Whether time is 0 .. T-1; else it is [0, 1]."""
        return isinstance(self.path, paths.DiscreteVP)

    @property
    def timesteps(self) -> int:
        """T. AttributeError on a continuous path."""
        return self._table.timesteps

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """The seed's alpha_1 .. alpha_T, [T] float64. AttributeError on a continuous path."""
        return self._table.alphas_cumprod

    @property
    def _table(self) -> paths.DiscreteVP:
        if not isinstance(self.path, paths.DiscreteVP):
            raise AttributeError("a diffusion of continuous time has no timesteps")
        return self.path

    def posterior_variance(self, t: Any) -> Any:
        """The seed's sigma_t^2 of the DDPM at t = 0 .. T-1, after (13.13); 0 at t = 0."""
        return self._table.posterior_variance(t)

    def loss(self, model: Any, x: Tensor, *, t: Any = None, **options: Unpack[LossOptions]) -> Tensor:
        """Eq. (13.5), one fused pass before the network and one after it.

        Args:
            model: called as model(x_t, t, **cond).
            x: data.  [B, ...], floating.
            t: int64 [B] or an integer, of 0 .. T-1; on a continuous path floating [B] or a number, of [0, 1]. Default
                uniform.
            options: LossOptions.

        Returns:
            The loss, float32: mean over a sample's elements, then over the batch of weight times that.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        batch = Batch(model, x, options)
        if self.discrete:
            t = batch.index(self.timesteps) if t is None else batch.given_index("t", t, self.timesteps)
            alpha, sigma = self._table.on(batch.device, batch.coef_dtype).index_select(1, t)
        else:
            t = batch.uniform() if t is None else batch.given_time("t", t, 0.0, 1.0)
            alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        noising = Row((Out(x=alpha, z=sigma),))
        (x_t,) = apply_row(noising, x=batch.x, noise=batch.z, dtypes=(batch.model_dtype,))
        m = batch.call(x_t, t)
        if self.prediction == "epsilon":
            return batch.loss(m, batch.x, t, noise_coef=1.0, noise=batch.z)
        if self.prediction == "sample":
            return batch.loss(m, batch.x, t, x_coef=1.0)
        if self.prediction == "score":
            return batch.loss(m, batch.x, t, noise_coef=-1.0, noise=batch.z, m_coef=sigma)
        return batch.loss(m, batch.x, t, x_coef=-sigma, noise_coef=alpha, noise=batch.z)

    def sample(
        self,
        model: Any,
        shape: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        sampler: str | Sampler = "ddim",
        eta: float | None = None,
        spacing: str | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        round_times: bool = True,
        clip: Any = None,
        final_sigma: float = 0.0,
        **options: Unpack[loop.Options],
    ) -> Any:
        """Generate by (13.10) and (13.13), from x_T ~ N(0, I).

        Args:
            model: called as model(x, t, **cond).
            shape: [B, ...] of the result.
            steps: network calls, default 50 (or T where that is less); 1 .. T with a spacing of timesteps.
            sampler: "ddim", "ddpm" (eta = 1), "euler", "euler_ancestral", "dpmpp_1", "dpmpp_2m", "dpmpp_3m"
                (DPM-Solver++), "dpmpp_1_sde", "dpmpp_2m_sde", "unipc"; or a Sampler, which has options of its own
                (samplers.DPMSolver and others).
            eta: of "ddim" (default 0) and "euler_ancestral" (default 1), >= 0.
            spacing: of timesteps "trailing" (the default), "leading" or "linspace" (grids.timesteps; on a continuous
                path "uniform", its default); or of the schedule's noise levels sigma / alpha, from the highest to the
                lowest, "karras", "exponential", "polyexponential" or "beta" (grids.noise_levels).
            timesteps: instead of steps: strictly decreasing integers of 0 .. T-1 (numbers of (0, 1] on a continuous
                path).
            sigmas: instead of steps: strictly decreasing noise levels sigma / alpha of the schedule, > 0.
            round_times: where a noise level falls between two timesteps, tell the network the nearest, int64; else the
                time itself, float32.
            clip: None, (lo, hi), or c for (-c, c): the clamp of the predicted data.
            final_sigma: of "ddim" and "ddpm": sigma_1 of the case t = 1 of (13.10), noise added to the result.
            options: samplers.Options.

        Returns:
            Samples [B, ...], float32; with return_trajectory (samples, trajectory).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        grid = self._grid(steps, spacing, timesteps, sigmas)
        chosen = sampler_named(sampler, eta, final_sigma)
        return self._run(model, chosen, grid, shape, round_times, clip=clip, **loop.known(options))

    def encode(
        self,
        model: Any,
        x: Tensor,
        *,
        steps: int | None = None,
        spacing: str | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        round_times: bool = True,
        **options: Unpack[loop.Options],
    ) -> Any:
        """DDIM inversion: the noise that sample(noise=..., sampler="ddim") with the same times leads back to x.

        Args:
            model: called as model(x, t, **cond).
            x: data.  [B, ...], floating.
            steps, spacing, timesteps, sigmas, round_times: as in sample, decreasing; they are walked upward.
            options: samplers.Options; the state is given, so noise is not.

        Returns:
            The state at the first (noisiest) of the times, [B, ...]; decoding returns to x up to an error of order 1 in
            the steps.

        Raises:
            ValueError, TypeError: an argument is not what it may be.
        """
        editing.refuse(options, "in encode(), which starts from x")
        grid = self._grid(steps, spacing, timesteps, sigmas)[::-1]
        return self._run(model, DDIMInversion(), grid, None, round_times, start=x, **loop.known(options))

    def step(
        self, x_t: Tensor, model_output: Tensor, t: Any, s: Any, *, x_s: Tensor | None = None, eta: Any = 1.0,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """A stochastic step from t to s with its log-density, of the network's output at t: steps.ddim on this path.

        Args:
            x_t: state at t.  [B, ...].
            model_output: the network's output at (x_t, t).  [B, ...].
            t, s: times with t > s, each a number, or one a sample, [B] (int64 of 0 .. T-1 where time is discrete).
            x_s: the state at s to score; None: sample it.
            eta: > 0.
            options: of steps.ddim: noise, clip, uncond, guidance_scale, reduction.

        Returns:
            (x_s, log p(x_s | x_t)).  [B, ...] and [B].

        Raises:
            ValueError, TypeError: as steps.ddim; the prediction "score".
        """
        scales = [scale(time) for time in (t, s) for scale in (self.path.alpha, self.path.sigma)]
        return steps.ddim(x_t, model_output, *scales, eta=eta, x_s=x_s, prediction=self.prediction, **options)

    def _run(self, model: Any, sampler: Any, grid: np.ndarray, shape: Any, round_times: bool, **options: Any) -> Any:
        round_times = self.discrete and round_times
        along = OnPath(self.path, self.prediction, round_times)
        time_dtype = torch.int64 if round_times else None
        grid, options = editing.begun(grid, along, options)
        return loop.run(model, stages_of(sampler, along, grid), shape, time_dtype=time_dtype, along=along, **options)

    def _grid(self, steps: int | None, spacing: str | None, timesteps: Any, sigmas: Any) -> np.ndarray:
        """The times of the network's calls, decreasing, and the end of the path."""
        given = [n for n, v in (("steps", steps), ("timesteps", timesteps), ("sigmas", sigmas)) if v is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]}: expected None beside {given[1]}, got {given[0]} and {given[1]}")
        return np.append(self._visited(steps, spacing, timesteps, sigmas), self.path.start).astype(np.float64)

    def _visited(self, steps: int | None, spacing: str | None, timesteps: Any, sigmas: Any) -> np.ndarray:
        if sigmas is not None:
            levels = grids.given(np.append(sigmas, 0.0), "sigmas", 0.0)
            if levels[0] < levels[1]:
                raise ValueError(f"sigmas: expected strictly decreasing noise levels > 0, got {sigmas}")
            return self._times_at(levels[:-1])
        if timesteps is not None:
            if self.discrete:
                return grids.given_timesteps(timesteps, self.timesteps)
            times = grids.given(np.append(timesteps, 0.0), "timesteps", 0.0, 1.0)
            if times[0] < times[1]:
                raise ValueError(f"timesteps: expected strictly decreasing times of (0, 1], got {timesteps}")
            return times[:-1]
        plain = grids.SPACINGS if self.discrete else ("uniform",)
        if spacing is None:
            spacing = "trailing" if self.discrete else "uniform"
        check.choice("spacing", spacing, (*plain, *grids.NOISE_LEVELS))
        if steps is None:
            steps = min(50, self.timesteps) if self.discrete else 50
        if spacing == "uniform":
            return grids.uniform(steps, 1.0, 0.0)[:-1]
        if spacing in plain:
            return grids.timesteps(steps, self.timesteps, spacing)
        low, high = (0, self._table.finite - 1) if self.discrete else (FIRST, 1.0)
        levels = grids.noise_levels(spacing, steps, self.path.noise_level(low), self.path.noise_level(high))
        times = self._times_at(levels)
        if high != self.path.stop:  # sampling starts from the end without signal, whose noise level is infinite
            times[0] = self.path.stop
        return times

    def _times_at(self, levels: np.ndarray) -> np.ndarray:
        times = np.asarray(self.path.time_at(levels), dtype=np.float64)
        if not self.discrete:
            self.path.check_time("sigmas", float(times.max()))
        return times


def _continuous(schedule: Any, beta_start: float | None, beta_end: float | None, shift: float) -> paths.ContinuousVP:
    if schedule == "continuous_vp":
        return paths.LinearVP(
            0.1 if beta_start is None else beta_start, 20.0 if beta_end is None else beta_end, shift=shift
        )
    if beta_start is not None or beta_end is not None:
        raise ValueError("beta_start, beta_end: expected None with a schedule that has none")
    if schedule == "cosine_log_snr":
        return paths.CosineVP(shift=shift)
    if shift != 1.0:
        raise ValueError("shift: expected 1 with a given path, which has its own")
    return schedule
