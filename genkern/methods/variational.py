"""The variational objective of a diffusion, eqs. (13.2), (13.5), (13.11)-(13.12), for any sigma of the family (13.6).

J_sigma is the expectation of -(log p(x_{0:T}) - log q_sigma(x_{1:T} | x_0)), so that -J_sigma bounds log p(x_0) from
below (the inequality of (13.2) is to be read so). In code's times t = 0 .. T-1, n elements a sample, f the predicted
data (13.9) and d_t = posterior_std[t], the seed's sigma_{t+1},

    prior           KL(q(x_T | x_0), N(0, I)) = (alpha_T^2 |x_0|^2 + n (sigma_T^2 - 1 - log sigma_T^2)) / 2
    t = T-1 .. 1    E KL(q(x_s | x_t, x_0), p(x_s | x_t)) = c_t E |f - x_0|^2,
                    c_t = (alpha_s - sqrt(sigma_s^2 - d_t^2) alpha_t / sigma_t)^2 / (2 d_t^2),    s = t - 1
    t = 0           -E log N(x_0; f, d_0^2 I) = c_0 E |f - x_0|^2 + (n / 2) log(2 pi d_0^2),    c_0 = 1 / (2 d_0^2)

The squared error of the noise is alpha^2 / sigma^2 times that of the data, so that J_sigma is L_gamma of (13.5) with
gamma_t = c_t sigma_t^2 / alpha_t^2, and a constant: theorem 1 of Song, Meng, Ermon, arXiv:2010.02502. The DDPM has
d_0 = 0, where J_sigma is infinite: d_0 is given, or d_1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import check, paths
from ..fused import apply_row, reduce_row
from ..noise import Noise, Purpose
from ..paths.schedules import numbers
from ..rows import ROUNDING, Out, Row
from ..samplers import network
from ..samplers.nonmarkovian import backward, ddpm_std, forward
from ._diffusion_loss import residual_loss
from ._learned_variance import Halved, Range
from ._training import Batch
from .weightings import gamma_of, over_k


@dataclasses.dataclass(frozen=True)
class VariationalBound:
    """J_sigma of every sample, in nats, and its terms.

    Attributes:
        prior: KL(q(x_T | x_0), N(0, I)).  [B].
        steps: of the steps from t = 0 .. T-1, that of t = 0 being -log p(x_0 | x_1).  [B, T].
        elements: n, of a sample.
    """

    prior: Tensor
    steps: Tensor
    elements: int

    @property
    def total(self) -> Tensor:
        """In nats: an upper bound of -log p(x_0), in expectation over the noise.  [B]."""
        return self.prior + self.steps.sum(dim=1)

    @property
    def bits_per_dim(self) -> Tensor:
        """total / (n log 2), of the density of x as it is given: of pixels 0 .. 255 scaled to [-1, 1] it is log2(127.5)
        less than of the pixels.  [B]."""
        return self.total / (self.elements * math.log(2.0))


class Variational:
    """What Diffusion has of the family q_sigma and its objectives; discrete time alone.

    Its methods take sigma by the same three arguments:
        posterior_std: the seed's sigma_1 .. sigma_T, [T], >= 0; sigma_t^2 <= 1 - alphas_cumprod_{t-1} for t > 1.
        eta: without posterior_std: sigma_t is eta times the DDPM's, t > 1.
        sigma_1: without posterior_std: sigma_1 of (13.10), default sigma_2.
    """

    path: paths.DiscreteVP | paths.ContinuousVP
    prediction: str
    _range: Range | None  # of a learned variance

    @property
    def _table(self) -> paths.DiscreteVP:
        if not isinstance(self.path, paths.DiscreteVP):
            raise AttributeError("a diffusion of continuous time has no timesteps")
        return self.path

    def posterior_std(self, eta: float = 1.0, sigma_1: float | None = None) -> np.ndarray:
        """The seed's sigma_1 .. sigma_T: eta times the DDPM's, with sigma_1 given or sigma_2.  [T] float64.

        Raises:
            ValueError: eta < 0 or so large that sigma_t^2 > 1 - alphas_cumprod_{t-1}; sigma_1 < 0, or None where T = 1.
        """
        eta = check.number("eta", eta, 0.0)
        alpha_t, sigma_t, alpha_s, sigma_s = self._scales()
        std = eta * ddpm_std(alpha_t, sigma_t, alpha_s, sigma_s)
        if (std[1:] > sigma_s[1:] * (1.0 + ROUNDING)).any():
            largest = float((eta * sigma_s[1:] / std[1:]).min())
            raise ValueError(f"eta: expected at most {largest:.6g} with this schedule, got {eta:g}")
        if sigma_1 is None and std.size < 2:
            raise ValueError("sigma_1: expected a number where T = 1, got None")
        std[0] = std[1] if sigma_1 is None else check.number("sigma_1", sigma_1, 0.0)
        return std

    def gamma(self, posterior_std: Any = None, *, eta: float = 1.0, sigma_1: float | None = None) -> np.ndarray:
        """gamma_1 .. gamma_T with which L_gamma is J_sigma up to a constant (theorem 1).  [T] float64.

        Raises:
            ValueError: sigma outside its range, or 0 (Variational); a schedule that ends without signal.
        """
        alpha, sigma, _, _ = self._scales()
        if alpha[-1] == 0.0:
            raise ValueError("gamma: infinite at the last timestep of a schedule that ends without signal")
        return self._data_weights(posterior_std, eta, sigma_1)[0] * over_k(alpha, sigma, "epsilon")

    def posterior_step(
        self, x_t: Tensor, x: Tensor, t: Any, *, posterior_std: Any = None, eta: float = 1.0,
        sigma_1: float | None = None, noise: Noise | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A sample of q(x_{t-1} | x_t, x), eq. (13.7); at t = 0 of N(x, sigma_1^2), the case t = 1 of (13.10).

        Args:
            x_t: state at t.  [B, ...], floating.
            x: data.  [B, ...], of x_t's dtype or a lower precision.
            t: of 0 .. T-1: an integer, or int64 [B].
            posterior_std, eta, sigma_1: sigma (Variational).
            noise: a Noise, a tensor [B, ...], or None: a fresh Noise.

        Returns:
            x_{t-1}.  [B, ...], x_t's dtype.

        Raises:
            ValueError, TypeError: an argument is not what it may be.
        """
        scales, std = self._scales(), self._std(posterior_std, eta, sigma_1)
        row = backward(*scales, std)
        first = np.arange(std.size) == 0
        of_first = Out(y=np.where(first, 1.0, row.y), x=np.where(first, 0.0, row.x), z=std)
        return self._step(of_first, "x_t", x_t, x, t, noise)

    def forward_step(
        self, x_s: Tensor, x: Tensor, t: Any, *, posterior_std: Any = None, eta: float = 1.0,
        sigma_1: float | None = None, noise: Noise | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A sample of q(x_t | x_{t-1}, x), eq. (13.8); at t = 0 of (13.4), as x_{t-1} is the data.

        Args:
            x_s: state at t - 1.  [B, ...], floating.
            others: as in posterior_step.

        Returns:
            x_t.  [B, ...], x_s's dtype.

        Raises:
            ValueError, TypeError: an argument is not what it may be.
        """
        alpha_t, sigma_t, alpha_s, sigma_s = self._scales()
        std = self._std(posterior_std, eta, sigma_1)
        alpha_s[0], sigma_s[0] = 1.0, 0.0
        return self._step(forward(alpha_t, sigma_t, alpha_s, sigma_s, std), "x_s", x_s, x, t, noise)

    def vlb(
        self, model: Any, x: Tensor, *, posterior_std: Any = None, eta: float = 1.0, sigma_1: float | None = None,
        noise: Noise | Tensor | None = None, generator: torch.Generator | None = None,
        cond: Mapping[str, Any] | None = None, model_dtype: torch.dtype | None = None, batch_size: int | None = None,
        differentiable: bool = False,
    ) -> VariationalBound:  # fmt: skip
        """J_sigma of (13.11)-(13.12), the module's formula, with one draw of noise for each sample and timestep.

        Args:
            model: called as model(x_t, t, **cond), T times in all for every sample.
            x: data.  [B, ...], floating.
            posterior_std, eta, sigma_1: sigma (Variational), > 0; not with a learned variance, which is that of p
                beside the DDPM's q.
            noise: a Noise; or the noise itself, [T, B, ...], or [B, ...] for every timestep.
            generator: a torch.Generator that a seed is drawn from.
            cond: keyword arguments of the model; tensors have the batch as dimension 0.
            model_dtype: of the network's input; default that of the model's first parameter, else x's.
            batch_size: most samples that the network is given at once, of one timestep or several; default 256, or B.
                The drawn noise does not depend on it.
            differentiable: keep the gradient.

        Returns:
            A VariationalBound, float32 (float64 for float64 data).

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.

        Source: (13.2), (13.11), (13.12); Ho, Jain, Abbeel, arXiv:2006.11239, eq. (5).
        """
        if self._range is not None and (posterior_std is not None or eta != 1.0 or sigma_1 is not None):
            raise ValueError("posterior_std, eta, sigma_1: expected None, 1 and None with a learned variance")
        data_weights, std = self._data_weights(posterior_std, eta, sigma_1)
        options = {"noise": noise, "generator": generator, "cond": cond, "model_dtype": model_dtype}
        alpha, sigma, _, _ = self._scales()
        with contextlib.nullcontext() if differentiable else torch.no_grad():
            weights = data_weights * over_k(alpha, sigma, self.prediction)
            steps = self._squares(model, x, weights, options, batch_size, self._range)
            _, sums = reduce_row(Row((Out(x=1.0),)), x=x)
            n, kept = math.prod(x.shape[1:]), float(alpha[-1]) ** 2
            prior = 0.5 * (kept * sums[:, 0] - n * (kept + math.log1p(-kept)))
            constant = torch.zeros_like(steps[:1])
            if self._range is None:
                constant[:, 0] = 0.5 * n * math.log(2.0 * math.pi * float(std[0]) ** 2)
        return VariationalBound(prior, steps + constant, n)

    def l_gamma(
        self, model: Any, x: Tensor, gamma: Any = None, *, noise: Noise | Tensor | None = None,
        generator: torch.Generator | None = None, cond: Mapping[str, Any] | None = None,
        model_dtype: torch.dtype | None = None, batch_size: int | None = None, differentiable: bool = False,
    ) -> Tensor:  # fmt: skip
        """The terms of L_gamma, eq. (13.5): gamma_t |e_theta(x_t, t) - e|^2, summed over a sample's elements.

        Args:
            gamma: finite numbers >= 0 by timestep, [T]; default 1. A prediction other than epsilon is read as it.
            others: as in vlb.

        Returns:
            [B, T]; L_gamma is the sum over t of the mean over the batch.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        alpha, sigma, _, _ = self._scales()
        given = np.ones(alpha.size) if gamma is None else gamma_of("gamma", gamma, alpha.size).cpu().double().numpy()
        weights = given * (over_k(alpha, sigma, self.prediction) * (alpha / sigma) ** 2)
        options = {"noise": noise, "generator": generator, "cond": cond, "model_dtype": model_dtype}
        with contextlib.nullcontext() if differentiable else torch.no_grad():
            return self._squares(model, x, weights, options, batch_size)

    def _scales(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """alpha_t, sigma_t, alpha_s, sigma_s at t = 0 .. T-1, s = t - 1, float64."""
        t, path = np.arange(self._table.timesteps), self._table
        return path.alpha(t), path.sigma(t), path.alpha(t - 1), path.sigma(t - 1)

    def _std(self, posterior_std: Any, eta: float, sigma_1: float | None) -> np.ndarray:
        if posterior_std is None:
            return self.posterior_std(eta, sigma_1)
        if eta != 1.0 or sigma_1 is not None:
            raise ValueError("eta, sigma_1: expected 1 and None beside posterior_std")
        std, (_, _, _, sigma_s) = numbers("posterior_std", posterior_std), self._scales()
        if std.shape != sigma_s.shape:
            raise ValueError(f"posterior_std: expected shape {sigma_s.shape}, one a timestep, got {std.shape}")
        check.inside("posterior_std", std, 0.0, math.inf)
        above = np.nonzero(std[1:] > sigma_s[1:] * (1.0 + ROUNDING))[0]
        if above.size:
            t = int(above[0]) + 1
            raise ValueError(
                f"posterior_std: expected at most {sigma_s[t]:g} at t = {t}, so that its square is at most "
                f"1 - alphas_cumprod of t - 1, got {std[t]:g}"
            )
        return std

    def _data_weights(self, posterior_std: Any, eta: float, sigma_1: float | None) -> tuple[np.ndarray, np.ndarray]:
        """c_t and sigma, [T] each."""
        std = self._std(posterior_std, eta, sigma_1)
        if not (std > 0.0).all():
            t = int(np.nonzero(std == 0.0)[0][0])
            raise ValueError(f"posterior_std: expected > 0, as the objective is infinite at 0, got 0 at t = {t}")
        change = backward(*self._scales(), std).y
        change[0] = 1.0
        return 0.5 * (change / std) ** 2, std

    def _step(self, row: Out, name: str, state: Tensor, x: Tensor, t: Any, noise: Noise | Tensor | None) -> Tensor:
        check.terms([(name, state), ("x", x)])
        table = np.stack([row.x, row.y, row.z])
        if isinstance(t, Tensor):
            check.indices("t", t, self._table.timesteps, state.shape[0])
            dtype = torch.float64 if state.dtype == torch.float64 else torch.float32
            c = torch.as_tensor(table, dtype=dtype).to(state.device).index_select(1, t.to(state.device)).unbind()
        else:
            c = table[:, check.integer("t", t, 0, self._table.timesteps - 1)].tolist()
        return apply_row(Row((Out(x=c[0], h=(c[1],), z=c[2]),)), x=state, h=(x,), noise=noise)[0]

    def _squares(
        self, model: Any, x: Tensor, weights: np.ndarray, options: dict[str, Any], batch_size: int | None,
        learned: Range | None = None,
    ) -> Tensor:  # fmt: skip
        """weights_t times the sum of the squared residual of the prediction at t, or a learned variance's terms.
        [B, T]."""
        given, timesteps = options["noise"], self._table.timesteps
        each = isinstance(given, Tensor) and given.ndim == x.ndim + 1
        if each and given.shape != (timesteps, *x.shape):
            raise ValueError(f"noise: expected shape {(timesteps, *x.shape)} or x's, got {tuple(given.shape)}")
        halved = None if self._range is None else Halved(model)
        if halved is not None:
            if options["model_dtype"] is None:
                options = options | {"model_dtype": network.dtype_of(model, x.dtype)}
            model = halved
        # A first batch checks what was given, and settles the seed.
        batch = Batch(model, x, options | {"noise": given[0] if each else given})
        size, n = batch.size, math.prod(x.shape[1:])
        most = max(256, size) if batch_size is None else check.integer("batch_size", batch_size, 1)
        chunk, scales = max(1, min(timesteps, most // max(size, 1))), self._table.on(batch.device, batch.coef_dtype)
        of = torch.as_tensor(weights * n).to(batch.device, batch.coef_dtype)
        ids = None if isinstance(given, Tensor) else _ids(batch)
        found = []
        for low in range(0, timesteps, chunk):
            count = min(chunk, timesteps - low)
            t = torch.arange(low, low + count, device=batch.device).repeat_interleave(size)
            if ids is not None:  # every sample and timestep has an identity of its own
                noise: Any = batch.source.of_samples(ids.repeat(count) * timesteps + t)
            else:
                noise = given[low : low + count].flatten(0, 1) if each else _repeated(given, count)
            of_part = {"noise": noise, "cond": _spread(batch.cond, count), "reduction": "none"}
            part = Batch(model, _repeated(x, count), of_part | {"model_dtype": batch.model_dtype})
            part.purpose = Purpose.PROBES

            def squares(m: Tensor, data: Tensor, at: Tensor, **target: Any) -> Tensor:
                if learned is not None and halved is not None:
                    return learned.terms(halved, data, at, hold=False).flatten(1).sum(dim=1)
                return part.loss(m, data, at, factor=of.index_select(0, at), **target)  # noqa: B023

            alpha, sigma = scales.index_select(1, t)
            each_loss = residual_loss(part, self.prediction, t, alpha, sigma, None, None, squares)
            found.append(each_loss.view(count, size))
        return torch.cat(found).T


def _ids(batch: Batch) -> Tensor:
    if batch.source.sample_ids is None:
        return torch.arange(batch.size, device=batch.device)
    found: Tensor = check.sample_ids(batch.source.sample_ids, batch.size, False, batch.device)
    return found


def _repeated(x: Tensor, count: int) -> Tensor:
    return x.repeat(count, *[1] * (x.ndim - 1)) if count > 1 else x


def _spread(cond: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Conditions of a batch, for as many repetitions of it."""
    return {
        key: _spread(value, count)
        if isinstance(value, Mapping)
        else _repeated(value, count)
        if isinstance(value, Tensor) and value.ndim
        else value
        for key, value in cond.items()
    }
