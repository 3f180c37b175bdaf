"""DDPM and DDIM, section 13.1.

    x_t = alpha_t x + sigma_t e,     alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t)            (13.4)
    L   = E_{t, x, e} gamma_t |e_theta(x_t, t) - e|^2                                             (13.5)
    f   = (x_t - sigma_t e_theta) / alpha_t                                                       (13.9)

and the generative steps (13.10), (13.13). abar is the seed's alpha (the cumulative product); code's t = 0 .. T-1 is the
seed's t - 1, and below t = 0 stands the seed's alpha_0 = 1. gamma is 1 unless a weight is given. Instead of e the
network may predict v = alpha e - sigma x or x itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import check, grids, paths
from ..fused import apply_row
from ..rows import Out, Row
from ..samplers import DDIM, DDPM, OnPath, loop
from ..samplers.table import Sampler
from ._training import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from ._training import LossOptions

PREDICTIONS = ("epsilon", "v", "sample")


class Diffusion:
    """A discrete diffusion. The network is called as model(x_t, t, **cond), t int64 [B].

    Args:
        schedule: "linear", "scaled_linear" or "squared_cosine" (paths.betas); not read where betas or alphas_cumprod
            are given.
        timesteps: T.
        prediction: what the network predicts: "epsilon", "v" or "sample".
        beta_start, beta_end: of the linear schedules.
        betas: given, [T].
        alphas_cumprod: given, [T], decreasing: the seed's alpha_1 .. alpha_T.
        final_alphas_cumprod: of the step below t = 0, the seed's alpha_0.

    Raises:
        ValueError: a schedule that is not decreasing or leaves [0, 1), an unknown prediction, timesteps < 1.

    Source: section 13.1; Ho, Jain, Abbeel, arXiv:2006.11239; Song, Meng, Ermon, arXiv:2010.02502.
    """

    def __init__(
        self,
        schedule: str = "linear",
        timesteps: int = 1000,
        prediction: str = "epsilon",
        *,
        beta_start: float | None = None,
        beta_end: float | None = None,
        betas: Any = None,
        alphas_cumprod: Any = None,
        final_alphas_cumprod: float = 1.0,
    ) -> None:
        if betas is not None and alphas_cumprod is not None:
            raise ValueError("betas: expected None beside alphas_cumprod")
        if alphas_cumprod is None:
            betas = paths.betas(schedule, timesteps, beta_start, beta_end) if betas is None else betas
            alphas_cumprod = paths.alphas_cumprod_of(betas)
        self.path = paths.DiscreteVP(alphas_cumprod, final_alphas_cumprod)
        self.prediction = check.choice("prediction", prediction, PREDICTIONS)

    @property
    def timesteps(self) -> int:
        """T."""
        return self.path.timesteps

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """The seed's alpha_1 .. alpha_T, [T] float64."""
        return self.path.alphas_cumprod

    def posterior_variance(self, t: Any) -> Any:
        """The seed's sigma_t^2 of the DDPM at t = 0 .. T-1, after (13.13); 0 at t = 0."""
        return self.path.posterior_variance(t)

    def loss(self, model: Any, x: Tensor, *, t: Any = None, **options: Unpack[LossOptions]) -> Tensor:
        """Eq. (13.5), one fused pass before the network and one after it.

        Args:
            model: called as model(x_t, t, **cond).
            x: data.  [B, ...], floating.
            t: int64 [B] or an integer, of 0 .. T-1; default uniform.
            options: LossOptions.

        Returns:
            The loss, float32: mean over a sample's elements, then over the batch of weight times that.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        batch = Batch(model, x, options)
        t = batch.index(self.timesteps) if t is None else batch.given_index("t", t, self.timesteps)
        alpha, sigma = self.path.on(batch.device, batch.coef_dtype).index_select(1, t)
        noising = Row((Out(x=alpha, z=sigma),))
        (x_t,) = apply_row(noising, x=batch.x, noise=batch.z, dtypes=(batch.model_dtype,))
        m = batch.call(x_t, t)
        if self.prediction == "epsilon":
            return batch.loss(m, batch.x, t, noise_coef=1.0, noise=batch.z)
        if self.prediction == "sample":
            return batch.loss(m, batch.x, t, x_coef=1.0)
        return batch.loss(m, batch.x, t, x_coef=-sigma, noise_coef=alpha, noise=batch.z)

    def sample(
        self,
        model: Any,
        shape: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        sampler: str | Sampler = "ddim",
        eta: float | None = None,
        spacing: str = "trailing",
        timesteps: Any = None,
        clip: Any = None,
        final_sigma: float = 0.0,
        **options: Unpack[loop.Options],
    ) -> Any:
        """Generate by (13.10) and (13.13), from x_T ~ N(0, I).

        Args:
            model: called as model(x, t, **cond).
            shape: [B, ...] of the result.
            steps: network calls, 1 .. T; default 50 (or T where that is less).
            sampler: "ddim", "ddpm" (eta = 1), or a Sampler.
            eta: of "ddim", >= 0, default 0.
            spacing: "leading", "trailing" or "linspace" (grids.timesteps).
            timesteps: instead of steps: strictly decreasing integers of 0 .. T-1.
            clip: None, (lo, hi), or c for (-c, c): the clamp of the predicted data.
            final_sigma: sigma_1 of the case t = 1 of (13.10): noise added to the result.
            options: samplers.Options.

        Returns:
            Samples [B, ...], float32; with return_trajectory (samples, trajectory).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        if timesteps is None:
            steps = min(50, self.timesteps) if steps is None else steps
            visited = grids.timesteps(steps, self.timesteps, spacing)
        elif steps is not None:
            raise ValueError(f"steps: expected None beside timesteps, got {steps}")
        else:
            visited = grids.given_timesteps(timesteps, self.timesteps)
        grid = np.append(visited, -1).astype(np.float64)
        if not isinstance(sampler, str):
            chosen: Any = sampler
        elif check.choice("sampler", sampler, ("ddim", "ddpm")) == "ddim":
            chosen = DDIM(0.0 if eta is None else eta, final_sigma)
        else:
            if eta not in (None, 1.0):
                raise ValueError(f"eta: expected None or 1 with sampler='ddpm', got {eta}")
            chosen = DDPM(final_sigma)
        stages = chosen.stages(OnPath(self.path, self.prediction), grid)
        return loop.run(model, stages, shape, time_dtype=torch.int64, clip=clip, **options)
