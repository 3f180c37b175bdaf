"""Conditional flow matching of a Schrodinger bridge between a source and the data (SB-CFM).

    (x0, x1) ~ pi, the plan of entropic transport with c = |x0 - x1|^2 and eps = 2 sigma^2
    x_t = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) z                              a Brownian bridge's marginal
    u_t = x1 - x0 + sigma (1 - 2t) / (2 sqrt(t (1 - t))) z                         (13.22), given x0 and x1
        = x1 - x0 + (1 - 2t) / (2t (1 - t)) (x_t - (1 - t) x0 - t x1)

The field E[u_t | x_t] is that of the bridge's probability-flow ODE: its marginals are those of the process nearest to
sigma W in relative entropy, W a Brownian motion, among those from the source to the data. As sigma falls to 0 it is
optimal-transport flow matching. The plan is a minibatch's. E |u_t|^2 grows as sigma^2 D / (4 t (1 - t)) towards both
ends; weight=lambda t: 4 t (1 - t) weighs them evenly.

Tong et al., arXiv:2302.00482, section 3.2.3, proposition 3.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import check, ops, paths
from ..flows.conditional import Moments
from ..flows.couplings import Sinkhorn
from ..fused import apply_row
from ..noise import Noise, Purpose
from ..rows import Out, Row
from ._training import Batch
from .flow import Flow

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..flows.couplings import Coupling, Sourced
    from ._training import LossOptions, Times

NEAREST = 2.0**-20  # to the ends, where u_t is infinite: sigma' is at most 512 sigma


class SchrodingerBridge(Flow):
    """SB-CFM between any source and the data. The network is a velocity, called as model(x, t, **cond), t in [0, 1].

    sample() and log_prob() solve the ODE of the velocity; options that read data off a state (guide, init, mask,
    apg, along) are refused.

    Args:
        sigma: > 0, of the reference process sigma W, in the data's units.
        iterations, labels: of the coupling, flows.Sinkhorn(2 sigma^2, absolute=True). The smaller sigma is beside the
            data, the more iterations it needs.

    Raises:
        ValueError: sigma <= 0; iterations < 1.

    Source: arXiv:2302.00482.
    """

    def __init__(self, sigma: float = 1.0, iterations: int = 100, labels: str | None = None) -> None:
        if not check.number("sigma", sigma) > 0.0:
            raise ValueError(f"sigma: expected a number > 0, got {sigma}")
        self.sigma, self.path = float(sigma), paths.VelocityOnly()
        self.coupling = Sinkhorn(2.0 * self.sigma**2, iterations, labels, absolute=True)

    def moments(self, t: Tensor, x0: Tensor, x1: Tensor) -> Moments:
        """The bridge at times t [B] in (0, 1), given its ends [B, ...]: of flows.conditional_field."""
        wide = t.reshape(-1, *[1] * (x1.ndim - 1))
        spread = (t * (1.0 - t)).sqrt()
        mu = (1.0 - wide) * x0 + wide * x1
        return Moments(mu, self.sigma * spread, x1 - x0, self.sigma * (0.5 - t) / spread)

    def loss(
        self,
        model: Any,
        x1: Tensor,
        x0: Tensor | None = None,
        *,
        t: Any = None,
        times: Times = None,
        coupling: Coupling | Sourced | str | None = "entropic",
        **options: Unpack[LossOptions],
    ) -> Tensor:
        """E |v(x_t, t) - u_t|^2, one fused pass before the network and one after it.

        Args:
            model: called as model(x_t, t, **cond).
            x1: data.  [B, ...], floating.
            x0: the source.  [B, ...], of x1's dtype or a lower precision; None: N(0, I).
            t, times: as of RectifiedFlow.loss; kept 2^-20 away from 0 and 1.
            coupling: "entropic", the plan above; or another, such as flows.Gathered(bridge.coupling); None: as given.
            options: LossOptions.

        Returns:
            The loss, float32, as of RectifiedFlow.loss.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x1.
        """
        check.terms([("x1", x1), ("x0", x0)])
        if x0 is not None and isinstance(options.get("noise"), Tensor):
            raise ValueError("noise: expected a Noise beside x0, which takes the noise's place, got a tensor")
        if isinstance(coupling, str):
            check.choice("coupling", coupling, ("entropic",))
            coupling = self.coupling
        batch = Batch(model, x1, options)
        t = batch.times(t, times).clamp(NEAREST, 1.0 - NEAREST)
        source = batch.coupled(x0, coupling)
        if isinstance(source, Noise):
            source = ops.randn(tuple(x1.shape), noise=source, device=x1.device, dtype=batch.x.dtype)
        z, spread = batch.source.at(Purpose.TRAINING, 1), (t * (1.0 - t)).sqrt()
        bridge = Row((Out(x=t, h=(1.0 - t,), z=self.sigma * spread),))
        (x_t,) = apply_row(bridge, x=batch.x, h=(source,), noise=z, dtypes=(batch.model_dtype,))
        return batch.loss(
            batch.call(x_t, t), batch.x, t, x_coef=1.0, h=(source,), h_coefs=(-1.0,),
            noise_coef=self.sigma * (0.5 - t) / spread, noise=z,
        )  # fmt: skip
