"""The fused ops in plain PyTorch: the oracle of the tests, the baseline of the benchmarks, and the path where no kernel
exists.

`ops` has the named ops as their formulas are written, one torch operation after another, in the dtype that torch's
promotion gives: float64 for float64. `formula` has the row of coefficients that the kernels apply, and runs in their
place on devices without a kernel.
"""

from .noise import randn, uniform
from .ops import add_noise, consistency_skip, ddim_step, euler_step, heun_step, path_loss

__all__ = [
    "add_noise",
    "consistency_skip",
    "ddim_step",
    "euler_step",
    "heun_step",
    "path_loss",
    "randn",
    "uniform",
]
