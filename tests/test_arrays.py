"""genkern._arrays: the kernels without torch, on NumPy arrays and on whatever speaks DLPack."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import genkern as gk
from genkern import _library

arrays = _library.arrays()
pytestmark = pytest.mark.skipif(arrays is None, reason=f"no compiled module: {_library.why_missing()}")

SAXPY = [0.0, 0.0, -np.inf, np.inf, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0]  # out = 2 x + 3 m


def saxpy(x: Any, m: Any, out: Any, row: list[float] = SAXPY) -> None:
    arrays.map(x, m, None, [], None, row, None, None, [], [], [], 0, 0, [], None, None, False, [out])


class OldProducer:
    """An array that speaks DLPack before 1.0: __dlpack__ takes no max_version."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class NewProducer(OldProducer):
    """An array that speaks DLPack 1.0."""

    def __dlpack__(self, stream: Any = None, max_version: Any = None) -> Any:  # type: ignore[override]
        return self.array.__dlpack__(max_version=max_version)


@pytest.mark.parametrize("wrap", [lambda a: a, torch.from_numpy, OldProducer, NewProducer])
def test_every_protocol_reaches_the_same_memory(wrap: Any) -> None:
    rng = np.random.default_rng(0)
    x, m = rng.standard_normal((2, 3, 5, 7), dtype=np.float32)
    out = np.zeros_like(x)
    saxpy(wrap(x), wrap(m), wrap(out))
    np.testing.assert_allclose(out, 2.0 * x + 3.0 * m, rtol=3e-7, atol=3e-7)


def test_strided_and_reversed_numpy_arrays() -> None:
    base = np.random.default_rng(1).standard_normal((6, 8, 10), dtype=np.float32)
    x, m = base[::2, ::-1, 1:8:3], base[1::2, :, ::3][..., :3]
    out = np.empty((3, 3, 8), np.float32).transpose(0, 2, 1)
    saxpy(x, m, out)
    np.testing.assert_allclose(out, 2.0 * x + 3.0 * m, rtol=3e-7, atol=3e-7)


def test_ops_on_numpy_have_the_bits_of_ops_on_torch() -> None:
    rng = np.random.default_rng(2)
    x, m = rng.standard_normal((2, 4, 3, 9), dtype=np.float32)
    alpha, sigma = rng.random((2, 4), dtype=np.float32)
    noise = gk.Noise(seed=11)
    one = gk.ops.add_noise(x, alpha, sigma, noise=noise)
    other = gk.ops.add_noise(*map(torch.from_numpy, (x, alpha, sigma)), noise=noise)
    assert isinstance(one, np.ndarray)
    np.testing.assert_array_equal(one, other.numpy())
    loss = gk.ops.path_loss(m, x, x_coef=1.0, noise_coef=-1.0, noise=noise)
    expected = gk.ops.path_loss(torch.from_numpy(m), torch.from_numpy(x), x_coef=1.0, noise_coef=-1.0, noise=noise)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_read_only_output_is_an_error_and_nothing_is_written() -> None:
    x = np.ones((2, 3), np.float32)
    out = np.zeros_like(x)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected a writeable array"):
        saxpy(x, x, out)
    assert not out.any()


def test_a_row_of_the_wrong_length_says_what_it_expected() -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="row: expected 12 cells, got 3"):
        saxpy(x, x, np.empty_like(x), [1.0, 2.0, 3.0])


def test_something_that_is_no_array_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="x: expected a NumPy array or an object with __dlpack__"):
        saxpy([1.0], np.ones(1, np.float32), np.ones(1, np.float32))


def test_numpy_arrays_need_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, genkern as gk\n"
        "x = np.ones((2, 5), np.float32)\n"
        "y = gk.ops.euler_step(x, 2 * x, 0.5)\n"
        "assert (y == 2).all(), y\n"
        "z = gk.ops.randn((2, 5), noise=gk.Noise(seed=1), dtype=np.float32)\n"
        "assert z.dtype == np.float32 and z.std() > 0\n"
        "gk.ops.add_noise(x, 0.5, 0.5)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
