"""The same ops on NumPy arrays: the same numbers, of the same kind."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch
from op_cases import CASES, LOSSES, NOISE, SHAPE, Case, arrays
from torch import Tensor

import genkern as gk


def to_numpy(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_arrays_give_what_tensors_give(case: Case, dtype: torch.dtype) -> None:
    given = arrays(case, torch.device("cpu"), dtype)
    expected = case.run(gk.ops, **given)
    options = {name: to_numpy(value) for name, value in case.options.items()}
    found = getattr(gk.ops, case.op)(**{name: to_numpy(t) for name, t in given.items()}, **options)
    for array, tensor in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        assert type(array) is numpy.ndarray and array.dtype == tensor.numpy().dtype
        tolerance = 4 * torch.finfo(dtype).eps
        numpy.testing.assert_allclose(array, tensor.numpy(), rtol=tolerance, atol=10 * case.scale * tolerance)


@pytest.mark.parametrize("options", LOSSES)
def test_losses_of_arrays(options: dict[str, Any]) -> None:
    m, x = torch.randn(2, *SHAPE)
    mask = torch.rand(SHAPE) > 0.3
    expected = gk.ops.path_loss(m, x, mask=mask, **options)
    numbers = {name: to_numpy(value) for name, value in options.items()}
    found = gk.ops.path_loss(m.numpy(), x.numpy(), mask=mask.numpy(), **numbers)
    numpy.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [numpy.float32, numpy.dtype("float16"), numpy.float64])
def test_randn_of_a_numpy_dtype_is_an_array(dtype: Any) -> None:
    z = gk.ops.randn((3, 5), noise=NOISE, dtype=dtype)
    assert type(z) is numpy.ndarray and z.dtype == dtype
    numpy.testing.assert_array_equal(z, gk.ops.randn((3, 5), noise=NOISE, dtype=torch.float64).numpy().astype(dtype))


def test_layouts_and_outputs_of_arrays() -> None:
    x, m = numpy.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(numpy.float32)
    expected = gk.ops.euler_step(x, m, 0.5)
    numpy.testing.assert_allclose(expected, x + numpy.float32(0.5) * m, rtol=1e-6, atol=1e-7)
    for laid in (numpy.asfortranarray(x), x[::-1].copy()[::-1], numpy.repeat(x, 2, axis=2)[..., ::2]):
        numpy.testing.assert_array_equal(gk.ops.euler_step(laid, m, 0.5), expected)
    assert gk.ops.euler_step(numpy.asfortranarray(x), m, 0.5).flags.f_contiguous
    out = x.copy()
    assert gk.ops.euler_step(out, m, 0.5, out=out) is out
    numpy.testing.assert_array_equal(out, expected)
    frozen = x.copy()
    frozen.flags.writeable = False
    numpy.testing.assert_array_equal(gk.ops.euler_step(frozen, m, 0.5), expected)
    with pytest.raises(ValueError, match="out: expected a writable array"):
        gk.ops.euler_step(x, m, 0.5, out=frozen)
    buffer = numpy.arange(20, dtype=numpy.float32)
    with pytest.raises(ValueError, match="partial overlap"):
        gk.ops.euler_step(buffer[:10], buffer[:10].copy(), 0.5, out=buffer[5:15])
    with pytest.raises(ValueError, match="out: expected memory apart from a coefficient, got an overlap"):
        gk.ops.euler_step(numpy.zeros(8, "f4"), numpy.ones(8, "f4"), buffer[:8], out=buffer[1:9])


def test_bfloat16_arrays() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, m = torch.randn(2, *SHAPE).bfloat16()
    as_arrays = [t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) for t in (x, m)]
    found = gk.ops.euler_step(*as_arrays, 0.5)
    assert found.dtype == ml_dtypes.bfloat16
    numpy.testing.assert_array_equal(found.astype(numpy.float32), gk.ops.euler_step(x, m, 0.5).float().numpy())


def test_import_loads_neither_torch_nor_a_compiled_library() -> None:
    program = (
        "import sys, genkern; genkern.Noise(seed=1); assert 'torch' not in sys.modules; "
        "assert not any('_arrays' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_numpy_arrays_need_no_torch() -> None:
    from genkern import _library

    if _library.arrays() is None:
        pytest.skip(f"the compiled module is missing: {_library.why_missing()}")
    program = (
        "import sys, numpy, genkern as gk; x = numpy.ones((2, 3), numpy.float32); "
        "gk.ops.path_loss(gk.ops.add_noise(x, 0.5, numpy.array([0.1, 0.2]), out=x), x, x_coef=1.0); "
        "gk.ops.randn((2, 3), noise=gk.Noise(seed=1), dtype=numpy.float32); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_says_where_it_is() -> None:
    assert gk.ops.__name__ == "genkern.ops" and gk.debug.__name__ == "debug"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = gk.nonsense
