"""Consistency models without a teacher: three losses of f at two times of the same data and the same noise z,

    L = E w d(f(x + t z, t), f^-(x + r z, r)),        t > r >= epsilon,

where distillation has the teacher's step (13.31) in place of x + r z, an unbiased estimate of Euler's step with the
true score (lemma 1 of CT; by its theorem 2 the two losses differ by o(max (t - r))):

    CT     t_n, t_{n+1} neighbours of (13.30), n uniform;  f^- a running average;  w = 1
    iCT    n with the mass of ln t ~ N(mean, std^2) in [t_n, t_{n+1}];  f^- = f without gradient;  w = 1 / (t - r)
    ECT    ln t ~ N(mean, std^2);  r = max(0, t (1 - n(t) / q^a));  f^- = f without gradient;  w = 1 / (t - r)

(ECT's t and r counted from epsilon, as f is the identity there and not at 0)
and d the pseudo-Huber distance sqrt(|f - f^-|^2 + c^2) - c in the last two. curricula.py has N, mu and a by step.

Song, Dhariwal, Chen, Sutskever, arXiv:2303.01469, algorithm 3 (CT); Song, Dhariwal, arXiv:2310.14189 (iCT); Geng,
Pokle, Luo, Lin, Kolter, arXiv:2406.14548 (ECT).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import check, grids
from ..kept import constant, kept
from ..samplers import Preconditioned
from ..small import affine
from ._pair import bases, coefficients, constants, named, pair_loss
from ._training import Batch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Unpack

    from ._training import LossOptions, Metric


class ConsistencyTraining:
    """The losses without a teacher, of Consistency."""

    sigma_min: float
    sigma_max: float
    rho: float
    function: Preconditioned
    _tables: dict[Any, Any]

    def times(self, n: int) -> np.ndarray:
        """t_1 = epsilon < ... < t_n = T of eq. (13.30), [n] float64."""
        return grids.karras(n, self.sigma_min, self.sigma_max, self.rho)

    def training_loss(
        self, model: Any, x: Tensor, *, target: Any = None, n_steps: int = 18, n: Any = None,
        metric: Metric | None = None, **options: Unpack[LossOptions],
    ) -> Tensor:  # fmt: skip
        """Consistency training (CT): algorithm 3 of arXiv:2303.01469. One map, two network calls, one reduce.

        Args:
            model: the student's F.
            x: data.  [B, ...], floating.
            target: F of f^-, a running average of the student (training.EMA with curricula.ct_decay); default the
                student itself. It gets no gradient, and in training mode has the student's dropout.
            n_steps: N, the number of times (13.30), >= 2 (curricula.ct_steps).
            n: int64 [B] or an integer of 0 .. N-2, the lower time's index; default uniform.
            metric: d(f, f^-) -> [B] (or [B, 1, ...]) instead of `kind`, as LPIPS is.
            options: LossOptions; a callable weight is called with t_n, and is the paper's lambda. `kind` is the
                metric d.

        Returns:
            The loss, float32, of the gradient of `model`.

        Raises:
            ValueError, TypeError: an argument is not what it may be; a network's output has another shape than x, or
                the metric's than [B].
        """
        n_steps, batch = check.integer("n_steps", n_steps, 2), Batch(model, x, options)
        batch.measurable(metric)
        index = batch.index(n_steps - 1) if n is None else batch.given_index("n", n, n_steps - 1)
        c, told, lower, _ = self._pairs(n_steps, batch, index)
        return pair_loss(batch, c, told, lower, target, metric)

    def improved_loss(
        self, model: Any, x: Tensor, *, n_steps: int = 11, n: Any = None, mean: float = -1.1, std: float = 2.0,
        metric: Metric | None = None, **options: Unpack[LossOptions],
    ) -> Tensor:  # fmt: skip
        """Improved consistency training (iCT): neighbours of (13.30) with the mass of a lognormal density,

            P(n) ~ Phi((ln t_{n+1} - mean) / std) - Phi((ln t_n - mean) / std),      w = 1 / (t_{n+1} - t_n)

        and the student itself, without gradient, as f^-. One map, two network calls, one reduce.

        Args:
            model: the student's F.
            x: data.  [B, ...], floating.
            n_steps: N, the number of times (13.30), >= 2 (curricula.ict_steps).
            n: int64 [B] or an integer of 0 .. N-2, the lower time's index; default drawn as above.
            mean, std: of ln t, std > 0.
            metric: d(f, f^-) -> [B] (or [B, 1, ...]) instead of `kind`.
            options: LossOptions; `kind` is "pseudo_huber" by default, and a weight stands in place of w, called with
                t_n where it is callable.

        Returns:
            The loss, float32, of the gradient of `model`.

        Raises:
            ValueError, TypeError: as training_loss(); no mass in [epsilon, T] in float64.

        Source: Song, Dhariwal, arXiv:2310.14189, section 3 and table 1.
        """
        n_steps = check.integer("n_steps", n_steps, 2)
        mean, std = check.number("mean", mean), positive("std", std)
        batch = _huber(model, x, options, metric)
        if n is None:
            ends = self._masses(n_steps, batch.device, mean, std)
            index = torch.searchsorted(ends, batch.uniform(dtype=torch.float64), right=True)
        else:
            index = batch.given_index("n", n, n_steps - 1)
        c, told, lower, factor = self._pairs(n_steps, batch, index)
        return pair_loss(batch, c, told, lower, None, metric, factor)

    @constant
    def _masses(self, n: int, device: torch.device, mean: float, std: float) -> Tensor:
        """The running sum of P(n) of improved_loss without its end, 1.  [N-2] float64."""

        def make() -> Tensor:
            edges = torch.tensor((np.log(self.times(n)) - mean) / std, dtype=torch.float64)
            # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): on the side where neither is near 1.
            upper = torch.special.ndtr(-edges).diff().neg()
            mass = torch.where(edges[:-1] > 0.0, upper, torch.special.ndtr(edges).diff())
            if not float(mass.sum()) > 0.0:
                raise ValueError(f"mean, std: expected mass in [{self.sigma_min}, {self.sigma_max}], got {mean}, {std}")
            return (mass.cumsum(0)[:-1] / mass.sum()).to(device)

        ends: Tensor = kept(self._tables, ("masses", n, device, mean, std), make)
        return ends

    def tuning_loss(
        self, model: Any, x: Tensor, *, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0, t: Any = None,
        mean: float = -1.1, std: float = 2.0, metric: Metric | None = None, **options: Unpack[LossOptions],
    ) -> Tensor:  # fmt: skip
        """Easy consistency tuning (ECT) of a student that begins as a diffusion model's F, the teacher's of this class:

            r = max(0, t (1 - n(t) / q^a)),      n(t) = 1 + k sigmoid(-b t),      w = 1 / (t - r)

        with t and r counted from epsilon, and the student itself, without gradient, as f^-. At stage a = 0 r is 0, the
        target the data noised to epsilon, and this a diffusion model's loss. One map, two network calls, one reduce.

        Args:
            model: the student's F.
            x: data.  [B, ...], floating.
            stage: a, >= 0 (curricula.ect_stage).
            q: by which t - r shrinks a stage, > 1.
            k, b: of n(t), >= 0.
            t: [B] or a number, > epsilon; default epsilon + a lognormal number, ln(t - epsilon) ~ N(mean, std^2).
            mean, std: of that, std > 0.
            metric: d(f, f^-) -> [B] (or [B, 1, ...]) instead of `kind`: metrics.AdaptiveL2 has the paper's adaptive
                weight for any power.
            options: LossOptions; `kind` is "pseudo_huber" by default, and a weight stands in place of w, called with
                t where it is callable.

        Returns:
            The loss, float32, of the gradient of `model`.

        Raises:
            ValueError, TypeError: as training_loss().

        Source: Geng, Pokle, Luo, Lin, Kolter, arXiv:2406.14548, section 3.
        """
        stage, mean, std = check.integer("stage", stage, 0), check.number("mean", mean), positive("std", std)
        k, b = check.number("k", k, 0.0), check.number("b", b, 0.0)
        if not check.number("q", q) > 1.0:
            raise ValueError(f"q: expected a number > 1, got {q}")
        batch, epsilon = _huber(model, x, options, metric), self.sigma_min
        if t is None:
            above = batch.lognormal(mean, std, torch.float64)
        else:
            above = batch.given_time("t", t, math.nextafter(epsilon, math.inf), math.inf).double() - epsilon
        # In float64, as the rows have differences of coefficients at t and r.
        gap = above * affine(torch.sigmoid(above * -b), k * q**-stage, q**-stage).clamp_max(1.0)
        fixed = self._constants(batch.device)
        w = bases(above, gap, fixed)
        found, apart = coefficients(w, fixed)
        c, s = named(self.function, (*found.flatten(0, 2).unbind(), *apart.unbind())), w[1]
        told = self.function.c_noise(s).to(batch.coef_dtype).unbind()
        return pair_loss(batch, c, told, s[1], None, metric, factor=gap.reciprocal())

    @constant
    def _constants(self, device: torch.device) -> Tensor:
        """_pair.constants() on a device."""
        found: Tensor = kept(self._tables, ("constants", device), lambda: constants(self.function).to(device))
        return found

    def _pairs(
        self, n: int, batch: Batch, index: Tensor
    ) -> tuple[dict[str, Any], tuple[Tensor, Tensor], Tensor, Tensor]:
        """named() of neighbouring times (13.30) by the lower one's index, c_noise at both, the lower one, 1 / (t - r),
        [B] each."""
        table = self._pair_table(n, batch.device, batch.coef_dtype)
        *columns, told_r, told_t, lower, factor = table.index_select(1, index).unbind()
        return named(self.function, columns), (told_r, told_t), lower, factor

    @constant
    def _pair_table(self, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The same at every pair, computed in float64, [., N-1]."""

        def make() -> Tensor:
            times = torch.tensor(self.times(n), dtype=torch.float64)
            s = torch.stack([times[:-1], times[1:]])
            w = torch.stack([torch.ones_like(s), s, s - self.function.epsilon])
            found, apart = coefficients(w, constants(self.function))
            more = [self.function.c_noise(s), s[:1], 1.0 / (s[1:] - s[:1])]
            return torch.cat([found.flatten(0, 2), apart, *more]).to(dtype).to(device)

        table: Tensor = kept(self._tables, ("pairs", n, device, dtype), make)
        return table


def positive(name: str, value: Any) -> float:
    found = check.number(name, value)
    if not found > 0.0:
        raise ValueError(f"{name}: expected a number > 0, got {value}")
    return found


def _huber(model: Any, x: Tensor, options: Mapping[str, Any], metric: Metric | None) -> Batch:
    """A batch whose loss is the pseudo-Huber distance unless the caller says otherwise."""
    batch = Batch(model, x, options if metric is not None else {"kind": "pseudo_huber", **options})
    batch.measurable(metric)
    return batch
