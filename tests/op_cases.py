"""One case for each named op: its arguments, and how far rounding may take it from the same formula in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genkern as gk

SHAPE = (3, 2, 5, 7)
NOISE = gk.Noise(seed=11, stream=3, draw=5)


@dataclasses.dataclass(frozen=True)
class Case:
    """An op, the names of its array arguments, and its other arguments; `scale` bounds the sum of |coefficients|."""

    op: str
    arrays: tuple[str, ...]
    options: dict[str, Any]
    scale: float
    name: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.name}" if self.name else self.op

    def run(self, module: Any, **arrays: Any) -> tuple[Any, ...]:
        found = getattr(module, self.op)(**arrays, **self.options)
        return found if isinstance(found, tuple) else (found,)


def by_sample(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def _ddim(name: str, scale: float, **options: Any) -> Case:
    path = {"alpha_t": 0.6, "sigma_t": 0.8, "alpha_s": 0.8, "sigma_s": 0.6, **options}
    arrays = ("x_t", "model_output", "uncond") if "guidance_scale" in options else ("x_t", "model_output")
    return Case("ddim_step", arrays, path, scale, name)


CASES = [
    Case("add_noise", ("x",), {"alpha": 0.6, "sigma": 0.8, "noise": NOISE}, 4.0),
    Case("add_noise", ("x", "noise"), {"alpha": 0.6, "sigma": 0.8}, 2.0, "given"),
    Case(
        "add_noise",
        ("x",),
        {"alpha": by_sample(0.2, 0.5, 0.9), "sigma": by_sample(0.7), "noise": NOISE, "return_noise": True},
        8.0,
        "by-sample",
    ),
    _ddim("epsilon", 8.0),
    _ddim("v", 4.0, prediction="v"),
    _ddim("sample", 4.0, prediction="sample"),
    _ddim("eta", 12.0, eta=1.0, noise=NOISE),
    _ddim("clip", 12.0, clip=0.5, eta=0.5, noise=NOISE, return_pred=True),
    _ddim("guided", 40.0, clip=(-0.7, 0.3), guidance_scale=3.0, return_pred=True),
    _ddim("by-sample", 40.0, alpha_t=by_sample(0.6, 0.55, 0.7), eta=by_sample(0.4), noise=NOISE, guidance_scale=3.0),
    Case("euler_step", ("x", "v"), {"dt": -0.125}, 2.0),
    Case("euler_step", ("x", "v", "uncond"), {"dt": 0.3, "guidance_scale": by_sample(4.0)}, 6.0, "guided"),
    Case("heun_step", ("x", "v", "v_next"), {"dt": by_sample(0.1, -0.2, 0.4)}, 3.0),
    Case("consistency_skip", ("x", "network_output"), {"c_skip": 0.7, "c_out": by_sample(0.4, 0.2, -0.1)}, 2.0),
]

LOSSES = [
    {"x_coef": 1.0, "noise_coef": -1.0, "noise": NOISE},
    {"x_coef": 0.3, "kind": "l1", "weight": by_sample(0.5, 2.0, 1.0)},
    {
        "noise_coef": by_sample(0.4, 0.5, 0.6),
        "m_coef": 0.5,
        "noise": NOISE,
        "kind": "pseudo_huber",
        "reduction": "none",
    },
    {"x_coef": by_sample(1.0), "kind": "pseudo_huber", "c": 2.0, "reduction": "sum"},
]


def arrays(
    case: Case, device: torch.device, dtype: torch.dtype, make: Callable[..., Tensor] = torch.randn
) -> dict[str, Tensor]:
    return {name: make(SHAPE, dtype=torch.float32).to(device, dtype) for name in case.arrays}


def on(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}


def wide(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}


def rounding(dtype: torch.dtype, exact: Tensor, magnitude: Any) -> Tensor:
    """Half an ulp of the result's dtype, twice, and that of the arithmetic for each of a dozen operations on terms of
    this magnitude."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    info = torch.finfo(dtype)
    return info.eps * exact.abs() + 12 * torch.finfo(arithmetic).eps / 2 * magnitude + info.smallest_normal * info.eps
