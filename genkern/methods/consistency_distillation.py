"""Consistency distillation, section 13.4.2:

    x^_{t_n} = x_{t_{n+1}} + (t_n - t_{n+1}) Phi(x_{t_{n+1}}, t_{n+1})                             (13.31)
    L        = E lambda(t_n) d(f(x_{t_{n+1}}, t_{n+1}), f^-(x^_{t_n}, t_n))                        (13.32)

on the times (13.30), with x_{t_{n+1}} ~ N(x, t_{n+1}^2 I), n uniform in 1 .. N-1, Phi of the teacher's denoiser D, f^-
the running average of f, without gradient. (13.31)'s Euler rule is x - (t_n - t_{n+1}) t_{n+1} score(x, t_{n+1}).
_distillation.py has the solvers' rows. A guided teacher is D_u + w (D_c - D_u), formed in the passes that read it; f
may be told w.

Song, Dhariwal, Chen, Sutskever, arXiv:2303.01469, algorithm 2; Luo, Tan, Huang, Li, Zhao, arXiv:2310.04378, section 4.2
(guidance).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import check, ops
from ..fused import apply_row
from ..kept import constant, kept
from ..rows import Out, Row, times
from ..samplers import Preconditioned, network
from ..small import affine
from ._distillation import SOLVERS, columns, names
from ._pair import frozen
from ._training import Batch
from .consistency_training import ConsistencyTraining
from .teachers import PathTeacher, checked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Unpack

    from ._training import LossOptions, Metric


class ConsistencyDistillation(ConsistencyTraining):
    """The loss with a teacher, of Consistency."""

    teacher: Preconditioned

    def loss(
        self, model: Any, x: Tensor, *, teacher: Any, target: Any = None, n_steps: int = 18, solver: str = "heun",
        n: Any = None, metric: Metric | None = None, guidance_scale: Any = None,
        uncond: Mapping[str, Any] | None = None, guidance_name: str | None = None, **options: Unpack[LossOptions],
    ) -> Tensor:  # fmt: skip
        """Consistency distillation, eq. (13.32). Five fused passes, with the backward one, around four network calls
        (two calls of the teacher).

        Args:
            model: the student's F.
            x: data.  [B, ...], floating.
            teacher: the teacher's F, as teacher_loss() trains it, or a methods.PathTeacher: a network of another path.
            target: F of f^-, a running average of the student (training.EMA); default the student itself. Neither
                teacher nor target gets a gradient; a target in training mode has the student's dropout.
            n_steps: N, the number of times (13.30), >= 2.
            solver: of (13.31): "heun", "dpmpp_2s" (DPM-Solver++ of order 2, a step in the middle of ln sigma), of two
                calls of the teacher, or "euler", of one.
            n: int64 [B] or an integer of 0 .. N-2, the lower time's index (the seed's n less 1); default uniform.
            metric: d(f, f^-) -> [B] (or [B, 1, ...]) instead of `kind`, as LPIPS is.
            guidance_scale: w of the teacher: a number, a tensor [B], or (low, high), of which one is drawn uniformly a
                sample. Needs uncond; the teacher is called twice as often.
            uncond: conditions of the teacher's unconditional calls, in place of those of the same name in cond.
            guidance_name: what student and target are told w as, a keyword argument of float32 [B]; default not told.
            options: LossOptions; a callable weight is called with t_n, and is lambda. `kind` is the metric d.

        Returns:
            The loss, float32, of the gradient of `model`.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the teacher's path does not have the noise levels
                from epsilon to T; a network's output has another shape than x, or the metric's than [B].
        """
        n_steps, solver = check.integer("n_steps", n_steps, 2), check.choice("solver", solver, SOLVERS)
        batch = Batch(model, x, options)
        batch.measurable(metric)
        other = teacher if isinstance(checked(teacher), PathTeacher) else None
        low, high = _guidance(guidance_scale, uncond, guidance_name, x)
        without = None if uncond is None else network.conditions("uncond", uncond, batch.size)
        table = self._table(n_steps, batch.device, batch.coef_dtype, other, solver)
        index = batch.index(n_steps - 1) if n is None else batch.given_index("n", n, n_steps - 1)
        c = dict(zip(names(solver), table.index_select(1, index).unbind(0), strict=True))
        wide, seen_dtype = batch.x.dtype, batch.model_dtype
        target = model if target is None else target
        w = low if high is None else affine(batch.uniform(3), high - low, low)
        told = None
        if guidance_name is not None:
            scale = torch.full((1,), w, device=batch.device) if isinstance(w, float) else w.float()
            told = {guidance_name: scale.expand(batch.size).contiguous()}

        def taught(seen: Tensor, t: Tensor) -> dict[str, Any]:
            """The teacher's outputs, as apply_row takes them."""
            at = t.long() if other is not None and other.rounds else t
            of = teacher if other is None else other.network
            found = {"m": frozen(batch, of, seen, at, "teacher")}
            if without is not None:
                found["m_uncond"] = frozen(batch, of, seen, at, "teacher", without)
            return found

        outs = [Out(x=1.0, z=c["upper"]), Out(x=c["in_upper"], z=c["in_upper_z"])]
        if other is not None:
            outs.append(Out(x=c["teach_upper"], z=c["teach_upper_z"]))
        x_upper, seen, *shown = apply_row(
            Row(tuple(outs)), x=batch.x, noise=batch.z, dtypes=(wide, *(seen_dtype,) * (len(outs) - 1))
        )
        both = (wide, seen_dtype)
        with torch.no_grad():
            first = (Out(x=c["first_x"], m=c["first_m"]), Out(x=c["in_first_x"], m=c["in_first_m"]))
            outputs = taught(seen if other is None else shown[0], c["told_first"])
            x_hat, seen_lower = apply_row(Row(first, guidance=w), x=x_upper, **outputs, dtypes=both)
            if solver != "euler":
                second = (
                    Out(h=(c["second_h"],), x=c["second_x"], m=c["second_m"]),
                    Out(h=(c["in_second_h"],), x=c["in_second_x"], m=c["in_second_m"]),
                )
                outputs = taught(seen_lower, c["told_second"])
                x_hat, seen_lower = apply_row(Row(second, guidance=w), x=x_hat, **outputs, h=(x_upper,), dtypes=both)
            goal = frozen(batch, target, seen_lower, c["noise_lower"], "target", told)
        m = batch.call(seen, c["noise_upper"], given=told)
        if metric is not None:
            f = ops.consistency_skip(x_upper, m, times(-1.0, c["minus_skip_upper"]), c["out_upper"])
            with torch.no_grad():
                f_lower = ops.consistency_skip(x_hat, goal, c["skip_lower"], c["out_lower"])
            return batch.measured(metric, f, f_lower, c["lower"])
        return batch.loss(
            m, x_upper, c["lower"], m_coef=c["out_upper"], x_coef=c["minus_skip_upper"], h=(x_hat, goal),
            h_coefs=(c["skip_lower"], c["out_lower"]),
        )  # fmt: skip

    @constant
    def _table(
        self, n: int, device: torch.device, dtype: torch.dtype, other: PathTeacher | None, solver: str
    ) -> Tensor:
        """The rows of a distillation step in the order of names(solver), [., N-1]."""

        def make() -> Tensor:
            found = columns(self.function, self.times(n), self._scalings if other is None else other.scalings, solver)
            return torch.tensor(np.stack([found[name] for name in names(solver)]), dtype=dtype).to(device)

        path = None if other is None else (other.path, other.prediction, other.rounds)
        table: Tensor = kept(self._tables, (n, device, dtype, path, solver), make)
        return table

    def _scalings(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """c_in, c_skip, c_out, c_noise of the teacher's F."""
        d = self.teacher
        return d.c_in(t), d.c_skip(t), d.c_out(t), np.log(t) / 4.0


def _guidance(scale: Any, uncond: Any, name: Any, x: Tensor) -> tuple[Any, float | None]:
    """(w, None), (low, high) of scales to be drawn, or (None, None) without guidance.

    Raises:
        ValueError, TypeError: guidance_scale or uncond without the other, or a scale that is not what it may be.
    """
    if scale is None:
        for what, value in (("uncond", uncond), ("guidance_name", name)):
            if value is not None:
                raise ValueError(f"{what}: expected None without guidance_scale, got {value!r}")
        return None, None
    if uncond is None:
        raise ValueError("uncond: expected conditions beside guidance_scale, got None")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"guidance_name: expected the name of a keyword argument, got {name!r}")
    if isinstance(scale, tuple):
        if len(scale) != 2:
            raise ValueError(f"guidance_scale: expected (low, high), got {scale}")
        low = check.number("guidance_scale[0]", scale[0])
        return low, check.number("guidance_scale[1]", scale[1], low)
    return check.coefficient("guidance_scale", scale, x), None
