"""map and reduce with derivatives: what the layers above call on torch tensors.

The Functions of map_function.py and reduce_function.py are skipped only where no derivative can be asked for: no
torch.func transform and no forward-mode level is active, and grad mode is off or no tensor argument requires a gradient
(asked.py).
"""

from __future__ import annotations

from . import eager_functions
from .asked import differentiated, refuse_derivatives, refuse_gradient
from .calls import CODES, direct, run_numbers, run_quantile, run_ready, run_stat
from .coefficients import differentiable_formula, ready
from .loss_function import sample_losses
from .map_function import map_rows, map_rows_out
from .reduce_function import reduce_rows

__all__ = [
    "CODES", "differentiable_formula", "differentiated", "direct", "map_rows", "map_rows_out", "ready",
    "reduce_rows", "refuse_derivatives", "refuse_gradient", "run_numbers", "run_quantile", "run_ready", "run_stat",
    "sample_losses",
]  # fmt: skip

eager_functions.connect()
