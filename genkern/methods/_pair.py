"""The loss of a pair of times with the same data and the same noise: what CT, iCT and ECT share.

    f(x + t z, t) - f^-(x + r z, r) = c_out(t) F_t - [c_out(r) F^-_r + (c_skip(r) - c_skip(t)) x
                                                      + (c_skip(r) r - c_skip(t) t) z],       t > r >= epsilon

One map makes both networks' inputs and one reduce reads F_t, F^-_r, x and z: neither noised state, nor f, nor f^- is
ever written. A metric that needs f and f^- themselves costs a map for each.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..fused import apply_row
from ..rows import Out, Row
from ..samplers import network
from ._replay import drawn_again

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..samplers import Preconditioned
    from ._training import Batch, Metric

# Of columns().
COLUMNS = (
    "lower", "upper", "noise_lower", "noise_upper", "in_upper", "in_upper_z", "in_lower", "in_lower_z",
    "out_upper", "out_lower", "skip_upper", "skip_upper_z", "skip_lower", "skip_lower_z", "x", "z",
    "gap",
)  # fmt: skip


def columns(f: Preconditioned, r: Tensor, t: Tensor) -> dict[str, Tensor]:
    """The rows' coefficients at the lower times r and the upper times t, as they are: [.] each."""
    both = torch.stack([r, t])  # one small operation for the two of them
    c_in, skip = f.c_in(both), f.c_skip(both)
    columns = (f.c_noise(both), c_in, c_in * both, f.c_out(both), skip, skip * both)
    (noise_r, noise_t), (in_r, in_t), (in_r_z, in_t_z), (out_r, out_t), (skip_r, skip_t), (skip_r_z, skip_t_z) = columns
    return {
        "lower": r, "upper": t, "noise_lower": noise_r, "noise_upper": noise_t,
        "in_upper": in_t, "in_upper_z": in_t_z, "in_lower": in_r, "in_lower_z": in_r_z,
        "out_upper": out_t, "out_lower": out_r,
        "skip_upper": skip_t, "skip_upper_z": skip_t_z, "skip_lower": skip_r, "skip_lower_z": skip_r_z,
        "x": skip_r - skip_t, "z": skip_r_z - skip_t_z,
        "gap": t - r,
    }  # fmt: skip


def frozen(
    batch: Batch, model: Any, seen: Tensor, t: Tensor, name: str, given: Mapping[str, Any] | None = None
) -> Tensor:
    """A network beside the student, in its own dtype, without gradient. What a target draws, dropout, is drawn again by
    the student's call after it. given: as in Batch.call()."""
    again = drawn_again(model, seen.device) if name == "target" else contextlib.nullcontext()
    with torch.no_grad(), again:
        return batch.call(seen.to(network.dtype_of(model, seen.dtype)), t, model, name, given)


def pair_loss(
    batch: Batch, c: dict[str, Tensor], times: Tensor, target: Any, metric: Metric | None, factor: Tensor | None = None
) -> Tensor:
    """The loss of f at c's upper times against f^- at its lower ones.

    Args:
        batch: the data, the noise, the student.
        c: columns(), [B] each.
        times: what a callable weight is called with.  [B].
        target: F of f^-; None: the student without gradient.
        metric: d(f, f^-), [B]; None: the batch's kind.
        factor: the weight where the caller gives none.  [B].
    """
    target = batch.model if target is None else target
    inputs = Row((Out(x=c["in_upper"], z=c["in_upper_z"]), Out(x=c["in_lower"], z=c["in_lower_z"])))
    seen, seen_lower = apply_row(inputs, x=batch.x, noise=batch.z, dtypes=(batch.model_dtype,) * 2)
    goal = frozen(batch, target, seen_lower, c["noise_lower"], "target")
    m = batch.call(seen, c["noise_upper"])
    if metric is None:
        return batch.loss(
            m, batch.x, times, default=factor, m_coef=c["out_upper"], x_coef=c["x"], noise_coef=c["z"], noise=batch.z,
            h=(goal,), h_coefs=(c["out_lower"],),
        )  # fmt: skip
    upper = Row((Out(x=c["skip_upper"], m=c["out_upper"], z=c["skip_upper_z"]),))
    lower = Row((Out(x=c["skip_lower"], m=c["out_lower"], z=c["skip_lower_z"]),))
    (f,) = apply_row(upper, x=batch.x, m=m, noise=batch.z)
    with torch.no_grad():
        (f_lower,) = apply_row(lower, x=batch.x, m=goal, noise=batch.z)
    return batch.measured(metric, f, f_lower, times, default=factor)
