"""Rectified flow, section 13.3.

    x_t = t x1 + (1 - t) x0,      min_v E |(x1 - x0) - v(x_t, t)|^2                               (13.24)

Algorithm 1 (missing in the seed): draw a coupling (x0, x1), at first independent; regress v on x1 - x0 at x_t; then
repeat on the rectified coupling (z0, z1), z1 the flow's end from z0: reflow. One round of it, with a trained `model`:

    x0, x1 = flow.pairs(model, (4096, 1, 8, 8), steps=20)
    loss = flow.loss(straighter, x1[some], x0=x0[some])

and all of it, with the pairs on disk, any number of rounds and the distillation, in reflow.py.

Liu, Gong, Liu, arXiv:2209.03003.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import check, ops, paths
from ..fused import apply_row
from ..noise import Purpose
from ..rows import Out, Row
from ..samplers import Dopri5, loop, network
from ..samplers.table import Sampler
from ._training import Batch
from .reflow import Reflow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from ..flows.couplings import Coupling, Sourced
    from ._training import LossOptions, Times


class RectifiedFlow(Reflow):
    """Rectified flow from a source to the data. The network is called as model(x, t, **cond), t float32 [B] in [0, 1].

    Source: section 13.3.
    """

    def __init__(self) -> None:
        self.path = paths.CondOT(0.0)

    def loss(
        self,
        model: Any,
        x1: Tensor,
        x0: Tensor | None = None,
        *,
        t: Any = None,
        times: Times = None,
        coupling: Coupling | Sourced | None = None,
        **options: Unpack[LossOptions],
    ) -> Tensor:
        """Eq. (13.24), one fused pass before the network and one after it.

        Args:
            model: called as model(x_t, t, **cond).
            x1: data.  [B, ...], floating.
            x0: its coupled source.  [B, ...], of x1's dtype or a lower precision; None: independent N(0, I).
            t: [B] or a number, in [0, 1]; default drawn.
            times: how they are drawn: "uniform" (the default), "stratified", "antithetic", or a TimeSampler
                (methods.times; LossSecondMoment is Diffusion's alone); or their distribution, a callable of uniforms
                [B] giving t [B], or (t, weight), such as those of genkern.flows; or t itself.
            coupling: which source is paired with which data: flows.Optimal(), flows.Sinkhorn(), flows.Gathered(...)
                over several processes, or another callable as flows.couplings has it; default as they are given.
            options: LossOptions.

        Returns:
            The loss, float32: mean over a sample's elements, then over the batch of weight times that.

        Raises:
            ValueError, TypeError: an argument is not what it may be; the model's output has another shape than x1.
        """
        check.terms([("x1", x1), ("x0", x0)])
        if x0 is not None and isinstance(options.get("noise"), Tensor):
            raise ValueError("noise: expected a Noise beside x0, which takes the noise's place, got a tensor")
        batch = Batch(model, x1, options)
        t = batch.times(t, times)
        source = batch.coupled(x0, coupling)
        if x0 is None:
            noising = Row((Out(x=t, z=1.0 - t),))
            (x_t,) = apply_row(noising, x=batch.x, noise=source, dtypes=(batch.model_dtype,))
            return batch.loss(batch.call(x_t, t), batch.x, t, x_coef=1.0, noise_coef=-1.0, noise=source)
        between = Row((Out(x=t, h=(1.0 - t,)),))
        (x_t,) = apply_row(between, x=batch.x, h=(source,), dtypes=(batch.model_dtype,))
        return batch.loss(batch.call(x_t, t), batch.x, t, x_coef=1.0, h=(source,), h_coefs=(-1.0,))

    def pairs(
        self,
        model: Any,
        shape: Sequence[int] | None = None,
        *,
        x0: Tensor | None = None,
        steps: int | None = None,
        sampler: str | Sampler | Dopri5 = "euler",
        **options: Unpack[loop.Options],
    ) -> tuple[Tensor, Tensor]:
        """The rectified coupling (z0, z1) of a trained flow: z1 is its end from z0.

        Args:
            model: the trained network.
            shape: [B, ...]; not needed with x0.
            x0: z0, draws of the source; default N(0, I).
            steps, sampler, options: of sample().

        Returns:
            (x0, x1), each [B, ...], float32: the arguments of loss(model, x1, x0) of the next round.

        Raises:
            ValueError, TypeError: as sample().
        """
        if options.get("return_trajectory"):
            raise ValueError("return_trajectory: expected False, got True")
        noise = options.get("noise")
        if x0 is None and isinstance(noise, Tensor):
            x0 = noise
            options["noise"] = None
        if x0 is None:
            if shape is None:
                raise ValueError("shape: expected the state's shape, or x0, got None")
            size, device = check.shape(shape), options.get("device")
            device = network.device_of(model) if device is None else network.checked_device(device)
            dtype = options.get("dtype", torch.float32)
            source = loop.resolve_noise(options.pop("seed", None), noise, options.pop("generator", None))  # type: ignore[arg-type]
            options["noise"] = source
            x0 = ops.randn(size, noise=source.at(Purpose.INITIAL), device=device, dtype=dtype)
        return x0, self.sample(model, shape, x0=x0, steps=steps, sampler=sampler, **options)
