"""The loss of a pair of times with the same data and the same noise: what CT, iCT and ECT share.

    f(x + t z, t) - f^-(x + r z, r) = c_out(t) F_t - [c_out(r) F^-_r + (c_skip(r) - c_skip(t)) x
                                                      + (c_skip(r) r - c_skip(t) t) z],       t > r >= epsilon

One map makes both networks' inputs and one reduce reads F_t, F^-_r, x and z: neither noised state, nor f, nor f^- is
ever written. A metric that needs f and f^- themselves costs a map for each.

Its numbers are powers of (13.29)'s scalings times 1, s or v = s - epsilon, for both s = r and s = t at once:

    c_in = p_0,  c_out = sd v p_0,  c_skip = sd^2 p_1,      p_0 = (s^2 + sd^2)^(-1/2),  p_1 = (v^2 + sd^2)^(-1)
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..fused import apply_row
from ..rows import Out, Row, times
from ..samplers import network
from ._replay import drawn_again

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..samplers import Preconditioned
    from ._training import Batch, Metric

# Of coefficients(): names, and the power of sd that a coefficient is without, which the kernels multiply by. v p_1 has
# no name: no row reads it.
COLUMNS = (
    ("in_lower", 0), ("in_upper", 0), ("in_lower_z", 0), ("in_upper_z", 0), ("out_lower", 1), ("out_upper", 1),
    ("skip_lower", 2), ("skip_upper", 2), ("skip_lower_z", 2), ("skip_upper_z", 2), ("", 2), ("", 2),
    ("x", 2), ("z", 2),
)  # fmt: skip


def constants(f: Preconditioned) -> Tensor:
    """What bases() and coefficients() take from the host, float64 [5, 3, 2, 1]: for 1, s and v at r and t a shift, a
    slope, whether the gap is taken off, a power, sd^2."""
    sd2 = f.sigma_data**2
    shift, slope, lower = [[1.0, 1.0], [f.epsilon] * 2, [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], [1.0, 0.0]
    powers, squares = [[0.0, 0.0], [-0.5, -0.5], [-1.0, -1.0]], [[0.0, 0.0], [sd2, sd2], [sd2, sd2]]
    planes = [shift, slope, [[0.0, 0.0], lower, lower], powers, squares]
    return torch.tensor(planes, dtype=torch.float64)[..., None]


def bases(above: Tensor, gap: Tensor, constants: Tensor) -> Tensor:
    """1, s and v at r = t - gap and at t, [3, 2, B], of above = t - epsilon and the gap, [B]. Two small operations."""
    shift, slope, lower, *_ = constants.unbind()
    return torch.addcmul(torch.addcmul(shift, slope, above), lower, gap, value=-1.0)


def coefficients(w: Tensor, constants: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' coefficients in the order of COLUMNS, [2, 3, 2, .] and, x and z, [2, .]. Four small operations.

    Args:
        w: 1, s and v at r and t, [3, 2, .]: in float64, as coefficients at neighbouring times cancel.
        constants: constants(f), on w's device.
    """
    powers, squares, both = constants[3, 1:], constants[4, 1:], w[1:]
    found = torch.addcmul(squares, both, both).pow(powers).unsqueeze(1) * w
    at_r, at_t = found[1, :2].unbind(1)
    return found, at_r - at_t


def named(f: Preconditioned, columns: Sequence[Tensor]) -> dict[str, Any]:
    """Coefficients in the order of COLUMNS by their names, as a row takes them."""
    sd = (1.0, f.sigma_data, f.sigma_data**2)
    return {
        name: times(sd[power], column) if power else column
        for (name, power), column in zip(COLUMNS, columns, strict=True)
        if name
    }


def frozen(
    batch: Batch, model: Any, seen: Tensor, t: Tensor, name: str, given: Mapping[str, Any] | None = None
) -> Tensor:
    """A network beside the student, in its own dtype, without gradient. What a target draws, dropout, is drawn again by
    the student's call after it. given: as in Batch.call()."""
    again = drawn_again(model, seen.device) if name == "target" else contextlib.nullcontext()
    with torch.no_grad(), again:
        return batch.call(seen.to(network.dtype_of(model, seen.dtype)), t, model, name, given)


def pair_loss(
    batch: Batch, c: Mapping[str, Any], told: tuple[Tensor, Tensor], times: Tensor, target: Any,
    metric: Metric | None, factor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of f at c's upper times against f^- at its lower ones.

    Args:
        batch: the data, the noise, the student.
        c: named(), of [B] each.
        told: c_noise at the lower and the upper times.  [B] each.
        times: what a callable weight is called with.  [B].
        target: F of f^-; None: the student without gradient.
        metric: d(f, f^-), [B]; None: the batch's kind.
        factor: the weight where the caller gives none.  [B].
    """
    target, z = batch.model if target is None else target, batch.z
    inputs = Row((Out(x=c["in_upper"], z=c["in_upper_z"]), Out(x=c["in_lower"], z=c["in_lower_z"])))
    seen, seen_lower = apply_row(inputs, x=batch.x, noise=z, dtypes=(batch.model_dtype,) * 2)
    goal = frozen(batch, target, seen_lower, told[0], "target")
    m = batch.call(seen, told[1])
    if metric is None:
        return batch.loss(
            m, batch.x, times, default=factor, m_coef=c["out_upper"], x_coef=c["x"], noise_coef=c["z"], noise=z,
            h=(goal,), h_coefs=(c["out_lower"],),
        )  # fmt: skip
    upper = Row((Out(x=c["skip_upper"], m=c["out_upper"], z=c["skip_upper_z"]),))
    lower = Row((Out(x=c["skip_lower"], m=c["out_lower"], z=c["skip_lower_z"]),))
    (f,) = apply_row(upper, x=batch.x, m=m, noise=z)
    with torch.no_grad():
        (f_lower,) = apply_row(lower, x=batch.x, m=goal, noise=z)
    return batch.measured(metric, f, f_lower, times, default=factor)
