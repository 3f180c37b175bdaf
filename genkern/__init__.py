"""genkern: fused CUDA and CPU kernels for DDPM/DDIM, flow matching, rectified flow and consistency models.

Importing it imports neither torch nor a compiled library; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

# Where each public name lives: (module, attribute), attribute None for a module.
_NAMES: dict[str, tuple[str, str | None]] = {
    "Noise": ("noise", "Noise"),
    "BrownianNoise": ("brownian", "BrownianNoise"),
    "ops": ("ops", None),
    "steps": ("steps", None),
    "reference": ("reference", None),
    "rows": ("rows", None),
    "fused": ("fused", None),
    "stat": ("stat", None),
    "noise": ("noise", None),
    "paths": ("paths", None),
    "grids": ("grids", None),
    "samplers": ("samplers", None),
    "methods": ("methods", None),
    "flows": ("flows", None),
    "training": ("training", None),
    "debug": ("_debug", "debug"),
    "Diffusion": ("methods", "Diffusion"),
    "FlowMatching": ("methods", "FlowMatching"),
    "RectifiedFlow": ("methods", "RectifiedFlow"),
    "ConditionalFlowMatching": ("methods", "ConditionalFlowMatching"),
    "SchrodingerBridge": ("methods", "SchrodingerBridge"),
    "Consistency": ("methods", "Consistency"),
    "MeanFlow": ("methods", "MeanFlow"),
    "TrigFlow": ("methods", "TrigFlow"),
    "PairStore": ("flows", "PairStore"),
    "Loop": ("graphs", "Loop"),
    "APG": ("samplers", "APG"),
    "DynamicThreshold": ("samplers", "DynamicThreshold"),
    "STOP": ("samplers", "STOP"),
}

__all__ = [*_NAMES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("genkern")
    elif name in _NAMES:
        where, attribute = _NAMES[name]
        module = importlib.import_module(f"{__name__}.{where}")
        value = module if attribute is None else getattr(module, attribute)
    else:
        raise AttributeError(f"module 'genkern' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
