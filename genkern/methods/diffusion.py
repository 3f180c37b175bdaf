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

from .. import check, paths, steps
from ..brownian import BrownianNoise
from ..samplers import DDIMInversion, EDMHeun, OnPath, editing, loop, network
from ..samplers.ddpm import VARIANCES
from ..samplers.table import Sampler, stages_of
from ._diffusion_loss import added, residual_loss
from ._diffusion_path import PREDICTIONS, grid_of, path_of
from ._diffusion_samplers import sampler_named
from ._learned_variance import Halved, Range, sampling
from ._training import Batch
from .times import LossSecondMoment
from .times import named as times_named
from .variational import Variational
from .weightings import named as weighting_named
from .weightings import on_residual

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from ._training import LossOptions


class Diffusion(Variational):
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
        variance: of the sampler "ddpm": "fixed_small" (the posterior's), "fixed_large" (the chain's), or
            "learned_range": the network's output has twice the channels, [B, 2C, ...], of which the second half says
            where between the two, in the logarithm (-1 and 1), elementwise. loss() then adds the variational objective
            of that half; discrete time alone.

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
        variance: str = "fixed_small",
    ) -> None:
        self.prediction = check.choice("prediction", prediction, PREDICTIONS)
        self.path = path_of(
            schedule, timesteps, prediction, beta_start, beta_end, betas, alphas_cumprod, final_alphas_cumprod, shift,
            rescale_zero_snr,
        )  # fmt: skip
        self.variance, self._range = check.choice("variance", variance, (*VARIANCES, "learned_range")), None
        self._gammas: dict[Any, Any] = {}  # of weighting=, on their devices
        if variance == "learned_range":
            if not isinstance(self.path, paths.DiscreteVP):
                raise ValueError("variance: expected a fixed one in continuous time, got 'learned_range'")
            self._range = Range(self.path, prediction)

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

    def posterior_variance(self, t: Any) -> Any:
        """The seed's sigma_t^2 of the DDPM at t = 0 .. T-1, after (13.13); 0 at t = 0."""
        return self._table.posterior_variance(t)

    def loss(
        self, model: Any, x: Tensor, *, t: Any = None, times: Any = None, weighting: Any = None,
        offset_noise: Tensor | None = None, input_perturbation: Tensor | None = None, **options: Unpack[LossOptions],
    ) -> Tensor:  # fmt: skip
        """Eq. (13.5), one fused pass before the network and one after it.

        Args:
            model: called as model(x_t, t, **cond).
            x: data.  [B, ...], floating.
            t: int64 [B] or an integer, of 0 .. T-1; on a continuous path floating [B] or a number, of [0, 1].
            times: instead of t, how it is drawn: "uniform" (the default), "stratified", "antithetic", or a TimeSampler
                (methods.times), such as LossSecondMoment(T); or its distribution, a callable of uniforms [B] giving
                numbers of [0, 1], or those and weights, such as those of genkern.flows (floor(T t) in discrete time).
            weighting: of times: "uniform" (the default: 1 on the prediction's residual), "snr", "min_snr",
                "soft_min_snr", or a Weighting with its own gamma (methods.weightings); a function of log SNR [B] that
                gives the weight of the data's squared error; or gamma of (13.5), [T], of the noise's squared error. All
                are converted to the prediction's residual.
            offset_noise: added to the noise, in the input and in the target; broadcastable to x (customarily 0.1 times
                normal [B, C, 1, 1]).
            input_perturbation: added to the noise in the input alone; broadcastable to x (customarily 0.1 times normal
                [B, ...]).
            options: LossOptions; their weight multiplies the weighting, and the objective of a learned variance.

        Returns:
            The loss, float32: mean over a sample's elements, then over the batch of weight times that.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.

        Source: (13.5); arXiv:2303.09556 (min_snr); arXiv:2102.09672 (importance sampling of t, learned variance).
        """
        discrete = self.discrete
        if t is not None and times is not None:
            raise ValueError("times: expected None beside t")
        chosen, weights = times_named(times), weighting_named(weighting, self.timesteps if discrete else None)
        if isinstance(chosen, LossSecondMoment) and chosen.timesteps != (self.timesteps if discrete else None):
            wanted = f"LossSecondMoment({self.timesteps})" if discrete else "another in continuous time"
            raise ValueError(f"times: expected {wanted}, got LossSecondMoment({chosen.timesteps})")
        halved = None if self._range is None else Halved(model)
        if halved is not None and options.get("model_dtype") is None and isinstance(x, Tensor):
            options["model_dtype"] = network.dtype_of(model, x.dtype)
        batch, importance = Batch(model if halved is None else halved, x, options), None
        offset = added(batch, "offset_noise", offset_noise)
        perturbation = added(batch, "input_perturbation", input_perturbation)
        if t is not None and discrete:
            t = batch.given_index("t", t, self.timesteps)
        elif t is not None:
            t = batch.given_time("t", t, 0.0, 1.0)
        else:
            t = batch.drawn(chosen)
            if isinstance(chosen, LossSecondMoment):
                t, importance = chosen.draw(t)
                importance = importance.to(batch.coef_dtype)
            else:
                t = batch.index_at(t, self.timesteps) if discrete else t.to(batch.coef_dtype)
        if discrete:
            alpha, sigma = self._table.on(batch.device, batch.coef_dtype).index_select(1, t)
        else:
            alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        factor = None if weights is None else on_residual(weights, t, alpha, sigma, self.prediction, self._gammas)
        recording = importance is not None and chosen.recording and torch.is_grad_enabled()
        record = chosen.update if recording else None

        def found(m: Tensor, data: Tensor, at: Tensor, **target: Any) -> Tensor:
            added_loss = None
            if self._range is not None and halved is not None:
                added_loss = self._range.hybrid(halved, data, at, options.get("mask"))
            return batch.loss(
                m, data, at, factor=factor, importance=importance, record=record, added=added_loss, **target
            )

        return residual_loss(batch, self.prediction, t, alpha, sigma, offset, perturbation, found)

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
            steps: of one network call each ("heun": two, but the last), default 50 (or T where that is less); 1 .. T
                with a spacing of timesteps.
            sampler: "ddim", "ddpm" (eta = 1, with the variance of this object), "euler", "euler_ancestral", "heun" (for
                grids of noise levels), "dpmpp_1", "dpmpp_2m", "dpmpp_3m" (DPM-Solver++), "dpmpp_1_sde",
                "dpmpp_2m_sde", "unipc"; or a Sampler, which has options of its own (samplers.DPMSolver and others;
                samplers.DDPM: a fixed variance).
            eta: of "ddim" (default 0) and "euler_ancestral" (default 1), >= 0.
            spacing: of timesteps "trailing" (the default), "leading" or "linspace" (grids.timesteps; on a continuous
                path "uniform", its default); or of the schedule's noise levels sigma / alpha, from the highest to the
                lowest, "karras", "exponential", "polyexponential" or "beta" (grids.noise_levels).
            timesteps: instead of steps: strictly decreasing integers of 0 .. T-1 (numbers of (0, 1] on a continuous
                path).
            sigmas: instead of steps: strictly decreasing noise levels sigma / alpha of the schedule, > 0.
            round_times: where a noise level falls between two timesteps, tell the network the nearest, int64; else the
                time itself, float32.
            clip: None, (lo, hi), or c for (-c, c): the clamp of the predicted data; or a DynamicThreshold.
            final_sigma: of "ddim" and "ddpm": sigma_1 of the case t = 1 of (13.10), noise added to the result.
            options: samplers.Options.

        Returns:
            Samples [B, ...], float32; with return_trajectory (samples, trajectory).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        grid = grid_of(self.path, steps, spacing, timesteps, sigmas)
        chosen = sampler_named(sampler, eta, final_sigma, self.variance)
        learned = self._range is not None and isinstance(sampler, str) and sampler == "ddpm"
        return self._run(model, chosen, grid, shape, round_times, learned=learned, clip=clip, **loop.known(options))

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
        grid = grid_of(self.path, steps, spacing, timesteps, sigmas)[::-1]
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
            ValueError, TypeError: as steps.ddim.
        """
        scales = [scale(time) for time in (t, s) for scale in (self.path.alpha, self.path.sigma)]
        return steps.ddim(x_t, model_output, *scales, eta=eta, x_s=x_s, prediction=self.prediction, **options)

    def _run(
        self, model: Any, sampler: Any, grid: np.ndarray, shape: Any, round_times: bool, *, learned: bool = False,
        **options: Any,
    ) -> Any:  # fmt: skip
        round_times = self.discrete and round_times
        along = OnPath(self.path, self.prediction, round_times)
        grid, options = editing.begun(grid, along, options)
        stages = stages_of(sampler, along, grid)
        if isinstance(options.get("step_noise"), BrownianNoise):
            if isinstance(sampler, EDMHeun) and sampler.s_churn > 0.0:
                raise ValueError(
                    "step_noise: expected no BrownianNoise with s_churn > 0, as churn is not along its path"
                )
            options["step_noise"] = self._along(options["step_noise"], model, grid, shape, options)
        if self._range is not None:
            model, stages, options = sampling(model, stages, self._table, grid, shape, options, learned=learned)
        time_dtype = torch.int64 if round_times else None
        return loop.run(model, stages, shape, time_dtype=time_dtype, along=along, **options)

    def _along(self, brownian: BrownianNoise, model: Any, grid: np.ndarray, shape: Any, options: dict[str, Any]) -> Any:
        """The noise of the grid's steps, by the signal-to-noise ratio."""
        start = next((options[k] for k in ("start", "init", "noise") if isinstance(options.get(k), Tensor)), None)
        size = shape if start is None else start.shape
        if size is None:
            return None  # which the loop refuses
        with np.errstate(divide="ignore"):
            clock = self.path.snr(grid).tolist()
        device = options.get("device") or (network.device_of(model) if start is None else start.device)
        return brownian.steps(clock, size, device=device, dtype=options.get("dtype", torch.float32))
