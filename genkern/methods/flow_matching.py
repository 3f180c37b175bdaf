"""Flow matching, section 13.2, on the conditional optimal-transport path.

    x_t = t x1 + (1 - (1 - sigma_min) t) x0,    x0 ~ N(0, I)                                     (13.21)
    u   = d x_t / dt = x1 - (1 - sigma_min) x0                                                   (13.22)
    L   = E_{t, x1, x0} |v(x_t, t) - u|^2                                                        (13.23)

Its gradient is that of regressing the marginal field (13.19): theorem 2. Lipman et al., arXiv:2210.02747.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import check, paths
from ..fused import apply_row
from ..rows import Out, Row
from ._training import Batch
from .flow import Flow

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..flows.couplings import Coupling
    from ._training import LossOptions, Times


class FlowMatching(Flow):
    """Conditional flow matching. The network is called as model(x, t, **cond), t float32 [B] in [0, 1].

    Args:
        path: "cond_ot".
        sigma_min: standard deviation around the data at t = 1, in [0, 1).

    Raises:
        ValueError: another path, or sigma_min outside its range.

    Source: section 13.2.
    """

    path: paths.CondOT

    def __init__(self, path: str = "cond_ot", sigma_min: float = 0.0) -> None:
        check.choice("path", path, ("cond_ot",))
        self.path = paths.CondOT(sigma_min)

    def loss(
        self,
        model: Any,
        x: Tensor,
        *,
        t: Any = None,
        times: Times = None,
        coupling: Coupling | None = None,
        **options: Unpack[LossOptions],
    ) -> Tensor:
        """Eq. (13.23), one fused pass before the network and one after it.

        Args:
            model: called as model(x_t, t, **cond).
            x: data, the seed's x_1.  [B, ...], floating.
            t: [B] or a number, in [0, 1]; default drawn.
            times: how they are drawn: a callable of uniforms [B] giving t [B], or (t, weight), such as those of
                genkern.flows; or t itself. Default uniform.
            coupling: which source is paired with which data: flows.Optimal(), flows.Sinkhorn(), or another callable
                as flows.couplings has it; default independent.
            options: LossOptions; noise as a tensor is x0, from any source.

        Returns:
            The loss, float32: mean over a sample's elements, then over the batch of weight times that.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x.
        """
        batch = Batch(model, x, options)
        t = batch.times(t, times, 0.0, 1.0)
        z = batch.coupled(None, coupling)
        noising = Row((Out(x=t, z=self.path.sigma(t)),))
        (x_t,) = apply_row(noising, x=batch.x, noise=z, dtypes=(batch.model_dtype,))
        m = batch.call(x_t, t)
        return batch.loss(m, batch.x, t, x_coef=1.0, noise_coef=self.path.d_sigma(0.0), noise=z)
