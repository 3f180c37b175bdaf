"""Argument checks. A message names the argument, what it was, and what it may be; a failing call changes nothing.

kinds.py: what a value is; numbers.py: arguments on the host; arrays.py: arrays that go together; values.py: the values
of coefficients, times and indices.
"""

from .arrays import elements, key_tensor, mask, outputs, sample_ids, separate, table, terms
from .kinds import FLOATS, compiling, is_array, is_float, is_numpy_dtype, is_tensor, kind_of
from .numbers import choice, clip_range, integer, number, shape, unsigned
from .values import before, coefficient, ddim_path, finite, indices, inside, visible, whole

__all__ = [
    "FLOATS", "before", "choice", "clip_range", "coefficient", "compiling", "ddim_path", "elements", "finite",
    "indices", "inside", "integer", "is_array", "is_float", "is_numpy_dtype", "is_tensor", "key_tensor", "kind_of",
    "mask", "number", "outputs", "sample_ids", "separate", "shape", "table", "terms", "unsigned", "visible", "whole",
]  # fmt: skip
