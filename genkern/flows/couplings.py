"""Couplings of a batch: which source x0 is paired with which data x1 in (13.21) and (13.24).

    Independent    a random permutation of the sources
    Optimal        the permutation with the least sum of c_ij = |x0_i - x1_j|^2: optimal transport between the two
                   batches as uniform measures
    Sinkhorn       entropic optimal transport, by iterations on the device; x0 is drawn from its plan, given x1

    f_i = -eps log sum_j e^{(g_j - c_ij)/eps},   g_j = -eps log sum_i e^{(f_i - c_ij)/eps},
    P(i | j) = e^{(f_i - c_ij)/eps} / sum_i e^{(f_i - c_ij)/eps}

Each is a callable coupling(x0, x1, cond, u) for loss(coupling=): x0 and x1 [B, ...], cond the model's conditions, u
uniforms [B] from the Noise, giving an index, int64 [B] of 0 .. B-1: x1[b] is paired with x0[index[b]]. Its values are
looked at on the CPU, and on a GPU under gk.debug(values=True); without that, one out of range is the device's own
assertion there. (Gathered in gathered.py, over several processes, has sources(x0, x1, cond, u) in place of the call,
and gives the sources themselves, [B, ...].) With labels="y" only samples of one class, equal in cond["y"], exchange
their sources: transport between whole batches ties the source to the class, which a conditional model then cannot draw
independently.

Tong et al., arXiv:2302.00482; Pooladian et al., arXiv:2304.14772; Cuturi, arXiv:1306.0895; Cheng, Schwing,
arXiv:2503.10636 (conditions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import check

Coupling = Callable[[Tensor, Tensor, Mapping[str, Any], Tensor], Tensor]


class Sourced(Protocol):
    """A coupling that gives the sources themselves."""

    def sources(self, x0: Tensor, x1: Tensor, cond: Mapping[str, Any], u: Tensor) -> Tensor:
        """The sources of x1, [B, ...], with x0's gradient where it has one."""


class Independent:
    """A random permutation: undoes what pairs given sources with the data."""

    def __call__(self, x0: Tensor, x1: Tensor, cond: Mapping[str, Any], u: Tensor) -> Tensor:
        return u.argsort()


class Optimal:
    """Exact minibatch optimal transport, by SciPy on the host: the costs are copied there, and wait for the device.

    Args:
        labels: the key in cond of the classes, [B], within which sources are exchanged; None: all are one class.

    Raises:
        ImportError: scipy is not installed (when called).
    """

    def __init__(self, labels: str | None = None) -> None:
        self.labels = labels

    def __call__(self, x0: Tensor, x1: Tensor, cond: Mapping[str, Any], u: Tensor) -> Tensor:
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError:
            raise ImportError("exact optimal transport needs scipy: pip install scipy") from None
        classes = _classes(self.labels, cond, x1)
        cost = costs(x0, x1).T.double().cpu().numpy()
        index = np.empty(len(cost), dtype=np.int64)
        # A class by itself: the time of an assignment grows with the cube of its size.
        for members in [np.arange(len(cost))] if classes is None else _members(classes):
            _, order = linear_sum_assignment(cost[np.ix_(members, members)])
            index[members] = members[order]
        return torch.from_numpy(index).to(x0.device)


class Sinkhorn:
    """Entropic minibatch optimal transport: a fixed number of iterations in the log domain, without waiting for the
    device. A source may be drawn for several data, or for none; in the mean over u each is drawn once, as far as the
    iterations have converged.

    Args:
        epsilon: > 0, in units of the mean cost, or of the costs (absolute); towards 0 the exact coupling, towards
            infinity the independent one. A sample far from all others raises the mean, and so brings the others' plan
            near the independent one.
        iterations: >= 1. Over their first half the regularisation falls evenly in the logarithm from the mean cost to
            its end.
        labels: as of Optimal.
        absolute: epsilon is eps of the module's formulas. At eps = 2 sigma^2 the plan is that of the Schrodinger bridge
            with the reference sigma W, W a Brownian motion: of least relative entropy to exp(-c / (2 sigma^2)).

    Raises (when called):
        ValueError: a source or datum that is not finite (looked at on the host; on a device every datum then keeps the
            source in its own place, so that the loss shows it).
    """

    def __init__(
        self, epsilon: float = 0.05, iterations: int = 100, labels: str | None = None, absolute: bool = False
    ) -> None:
        if not check.number("epsilon", epsilon) > 0.0:
            raise ValueError(f"epsilon: expected a number > 0, got {epsilon}")
        self.epsilon, self.iterations = float(epsilon), check.integer("iterations", iterations, 1)
        self.labels, self.absolute = labels, bool(absolute)

    def plan(self, x0: Tensor, x1: Tensor, cond: Mapping[str, Any] | None = None) -> Tensor:
        """P(i | j) as [i, j], each column a distribution over the sources; float32 (float64 for float64)."""
        for name, x in (("x0", x0), ("x1", x1)):
            check.inside(name, x, -math.inf, math.inf)
        cost = costs(x0, x1, _classes(self.labels, {} if cond is None else cond, x1))
        finite = cost.isfinite()
        mean = torch.where(finite, cost, 0.0).sum() / finite.sum()
        mean = mean.clamp(min=torch.finfo(cost.dtype).tiny)
        cost = cost / mean
        end = self.epsilon / mean if self.absolute else torch.full_like(mean, self.epsilon)
        f = cost.new_zeros(cost.shape[0])
        for k in range(self.iterations):
            # From 1 down to epsilon: with little regularisation from the start, far more iterations would be needed.
            epsilon = torch.where(end >= 1.0, end, end ** min(1.0, 2.0 * (k + 1) / self.iterations))
            g = -epsilon * ((f[:, None] - cost) / epsilon).logsumexp(0)
            f = -epsilon * ((g[None] - cost) / epsilon).logsumexp(1)
        return ((f[:, None] - cost) / end).softmax(0)

    def __call__(self, x0: Tensor, x1: Tensor, cond: Mapping[str, Any], u: Tensor) -> Tensor:
        below = self.plan(x0, x1, cond).double().cumsum(0)
        # u of each column's own sum, which rounding may leave beside 1: no source without mass is drawn.
        index = (below < u.double() * below[-1]).sum(0).clamp_(max=max(x0.shape[0] - 1, 0))
        return torch.where(below[-1].isnan(), torch.arange(x1.shape[0], device=x1.device), index)


def costs(x0: Tensor, x1: Tensor, classes: Tensor | None = None) -> Tensor:
    """|x0_i - x1_j|^2 as [i, j], infinite between different classes; float32 (float64 for float64)."""
    dtype = torch.float64 if x1.dtype == torch.float64 else torch.float32
    size = math.prod(x1.shape[1:])
    a, b = (x.detach().to(dtype).reshape(x.shape[0], size) for x in (x0, x1))
    centre = b.mean(0)  # less is lost in the difference of squares
    a, b = a - centre, b - centre
    cost = (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2.0 * a @ b.T).clamp_(min=0.0)
    return cost if classes is None else cost.masked_fill(classes[:, None] != classes[None], math.inf)


def _members(classes: Tensor) -> list[np.ndarray]:
    """The samples of each class."""
    found = classes.cpu().numpy()
    return [np.flatnonzero(found == each) for each in np.unique(found)]


def _classes(labels: str | None, cond: Mapping[str, Any], x: Tensor) -> Tensor | None:
    if labels is None:
        return None
    found = cond.get(labels)
    if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"labels: expected cond[{labels!r}] to be a tensor of shape ({x.shape[0]},), got {got}")
    return found.to(x.device)
