"""Flow matching, section 13.2, on a Gaussian path from noise at t = 0 to data at t = 1.

    x_t = alpha(t) x1 + sigma(t) x0,    x0 ~ N(0, I)                                             (13.21)
    u   = d x_t / dt = alpha'(t) x1 + sigma'(t) x0                                               (13.22)
    L   = E_{t, x1, x0} |v(x_t, t) - u|^2                                                        (13.23)

On the conditional optimal-transport path alpha = t, sigma = 1 - (1 - sigma_min) t. The gradient of L is that of
regressing the marginal field (13.19): theorem 2. Lipman et al., arXiv:2210.02747.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import check, paths
from ..fused import apply_row
from ..rows import Out, Row
from ._training import Batch
from .flow import Flow, flow_path

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..flows.couplings import Coupling, Sourced
    from ._training import LossOptions, Times


PATHS = ("cond_ot", "cosine", "vp")


class FlowMatching(Flow):
    """Conditional flow matching. The network is called as model(x, t, **cond), t float32 [B] in [0, 1].

    Args:
        path: "cond_ot", "cosine" (paths.Cosine), "vp" (paths.Reversed(paths.LinearVP())), or a path on [0, 1] with the
            noise at 0.
        sigma_min: of "cond_ot": standard deviation around the data at t = 1, in [0, 1).

    Raises:
        ValueError: another path, or sigma_min outside its range. TypeError: no path.

    Source: section 13.2.
    """

    def __init__(self, path: str | paths.Path = "cond_ot", sigma_min: float = 0.0) -> None:
        if isinstance(path, str) and check.choice("path", path, PATHS) == "cond_ot":
            self.path = paths.CondOT(sigma_min)
            return
        if sigma_min != 0.0:
            raise ValueError(f"sigma_min: expected 0 with another path than 'cond_ot', got {sigma_min}")
        named = {"cosine": paths.Cosine, "vp": lambda: paths.Reversed(paths.LinearVP())}
        self.path = named[path]() if isinstance(path, str) else flow_path("path", path)

    def loss(
        self,
        model: Any,
        x: Tensor,
        *,
        t: Any = None,
        times: Times = None,
        coupling: Coupling | Sourced | None = None,
        **options: Unpack[LossOptions],
    ) -> Tensor:
        """Eq. (13.23), one fused pass before the network and one after it.

        Args:
            model: called as model(x_t, t, **cond).
            x: data, the seed's x_1.  [B, ...], floating.
            t: [B] or a number, in [0, 1]; default drawn.
            times: how they are drawn: "uniform" (the default), "stratified", "antithetic", or a TimeSampler
                (methods.times; LossSecondMoment is Diffusion's alone); or their distribution, a callable of uniforms
                [B] giving t [B], or (t, weight), such as those of genkern.flows; or t itself.
            coupling: which source is paired with which data: flows.Optimal(), flows.Sinkhorn(), flows.Gathered(...)
                over several processes, or another callable as flows.couplings has it; default independent.
            options: LossOptions; noise as a tensor is x0, from any source.

        Returns:
            The loss, float32: mean over a sample's elements, then over the batch of weight times that.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        batch = Batch(model, x, options)
        path, drawn = self.path, t is None and not isinstance(times, Tensor)
        t = batch.times(t, times)
        z = batch.coupled(None, coupling)
        if isinstance(path, paths.CondOT):
            alpha, d_alpha, d_sigma = t, 1.0, path.d_sigma(0.0)  # its slopes are the same at all times
        else:
            if drawn:  # below 1, to which float32 may round: a path's slope may be infinite there
                t = t.clamp(max=1.0 - torch.finfo(t.dtype).eps / 2)
            alpha, d_alpha, d_sigma = path.alpha(t), path.d_alpha(t), path.d_sigma(t)
        noising = Row((Out(x=alpha, z=path.sigma(t)),))
        (x_t,) = apply_row(noising, x=batch.x, noise=z, dtypes=(batch.model_dtype,))
        m = batch.call(x_t, t)
        return batch.loss(m, batch.x, t, x_coef=d_alpha, noise_coef=d_sigma, noise=z)
