"""Bad input to the ops: the message names the argument, what it was and what it may be, and nothing is changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import genkern as gk
from genkern import check, fused, rows

SHAPE = (4, 3, 8)
ops = gk.ops


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or SHAPE, dtype=dtype)


def ddim(**options: Any) -> Any:
    arguments = {"x_t": x(), "model_output": x(), "alpha_t": 0.6, "sigma_t": 0.8, "alpha_s": 0.8, "sigma_s": 0.6}
    return ops.ddim_step(**{**arguments, **options})


def expanded() -> Tensor:
    return x(1, 3, 8).expand(SHAPE)


def row(**terms: Any) -> rows.Row:
    return rows.Row((rows.Out(**terms),))


NOISE = gk.Noise(seed=1)
NAN = float("nan")
HALF = torch.full((4,), 0.5)

BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    # shapes, kinds, devices, dtypes
    (lambda: ops.heun_step(x(), x(), x(4, 3), 0.1), ValueError, "v_next: expected shape (4, 3, 8) like x, got (4, 3)"),
    (lambda: ops.euler_step(x(), x(4, 8, 3), 0.1), ValueError, "v: expected shape (4, 3, 8) like x, got (4, 8, 3)"),
    (lambda: ddim(uncond=x(4, 3), guidance_scale=2.0), ValueError, "uncond: expected shape (4, 3, 8) like x_t"),
    (lambda: ops.add_noise(x(), 0.5, 0.5, noise=x(2)), ValueError, "noise: expected shape (4, 3, 8) like x, got (2,)"),
    (lambda: ops.euler_step(x(), x().to("meta"), 0.1), ValueError, "v: expected device cpu like x, got meta"),
    (
        lambda: ops.euler_step(torch.eye(4).to_sparse(), torch.eye(4), 0.1),
        TypeError,
        "x: expected a strided tensor, got one of layout torch.sparse_coo",
    ),
    (
        lambda: ops.path_loss(torch.eye(4), torch.eye(4).to_sparse_csr(), x_coef=1.0),
        TypeError,
        "x: expected a strided tensor, got one of layout torch.sparse_csr",
    ),
    (
        lambda: ops.euler_step(x().long(), x(), 0.1),
        TypeError,
        "x: expected float32, float16, bfloat16 or float64, got torch.int64",
    ),
    (
        lambda: ops.euler_step(x(), x().bool(), 0.1),
        TypeError,
        "v: expected float32, float16, bfloat16 or float64, got torch.bool",
    ),
    (lambda: ops.euler_step(x().cfloat(), x(), 0.1), TypeError, "got torch.complex64"),
    (lambda: ops.euler_step(x().to(torch.float8_e5m2), x(), 0.1), TypeError, "got torch.float8_e5m2"),
    (
        lambda: ops.euler_step(x().half(), x(), 0.1),
        TypeError,
        "v: expected torch.float16 like x, or a lower precision, got torch.float32",
    ),
    (lambda: ops.add_noise(x(), 0.5, 0.5, noise=x().double()), TypeError, "noise: expected torch.float32 like x"),
    (
        lambda: ops.euler_step(torch.tensor(1.0), torch.tensor(1.0), 0.1),
        ValueError,
        "x: expected dimension 0 to be the batch, got a 0-d tensor",
    ),
    (
        lambda: ops.path_loss(torch.tensor(1.0)),
        ValueError,
        "model_output: expected dimension 0 to be the batch, got a 0-d tensor",
    ),
    (
        lambda: ops.euler_step(x(), numpy.zeros(SHAPE, numpy.float32), 0.1),
        TypeError,
        "v: expected a torch tensor like x, got ndarray",
    ),
    (lambda: ops.euler_step(numpy.zeros(SHAPE), x(), 0.1), TypeError, "v: expected a NumPy array like x, got Tensor"),
    (
        lambda: ops.euler_step(numpy.zeros(SHAPE, int), numpy.zeros(SHAPE), 0.1),
        TypeError,
        "x: expected float32, float16, bfloat16 or float64, got int64",
    ),
    (lambda: ops.euler_step([1.0], x(), 0.1), TypeError, "x: expected a torch tensor or a NumPy array, got list"),
    (lambda: ops.euler_step(x(), None, 0.1), TypeError, "v: expected a torch tensor or a NumPy array, got None"),
    (lambda: ops.euler_step(x(*[1] * 17), x(*[1] * 17), 0.1), ValueError, "x: expected at most 16 dimensions, got 17"),
    # coefficients
    (lambda: ops.euler_step(x(), x(), NAN), ValueError, "dt: expected a finite number, got nan"),
    (lambda: ops.euler_step(x(), x(), float("inf")), ValueError, "dt: expected a finite number, got inf"),
    (
        lambda: ops.euler_step(x(), x(), 10**400),
        ValueError,
        "dt: expected a finite number, got an integer beyond float64",
    ),
    (lambda: ops.euler_step(x(), x(), 1e300), ValueError, "dt: expected a number that float32 can hold"),
    (lambda: ops.euler_step(x(), x(), 10**300), ValueError, "dt: expected a number that float32 can hold"),
    (lambda: ops.euler_step(x(), x(), "1"), TypeError, "dt: expected a number, got '1' (str)"),
    (lambda: ops.euler_step(x(), x(), [0.1] * 4), TypeError, "dt: expected a number, got list"),
    (
        lambda: ops.euler_step(x(), x(), HALF[:3]),
        ValueError,
        "dt: expected a number, one element, or shape (4,), one a sample, got (3,)",
    ),
    (lambda: ops.euler_step(x(), x(), HALF[:, None, None]), ValueError, "one a sample, got (4, 1, 1)"),
    (
        lambda: ops.euler_step(x(), x(), torch.ones(4, dtype=torch.int64)),
        TypeError,
        "dt: expected a number or a tensor of",
    ),
    (
        lambda: ops.euler_step(x(), x(), numpy.ones(4)),
        TypeError,
        "dt: expected a number or a torch tensor, as the tensors are, got a NumPy array",
    ),
    (
        lambda: ops.euler_step(x(), x(), torch.tensor([0.1, NAN, 0.1, 0.1])),
        ValueError,
        "dt: expected a finite number, got nan at index 1",
    ),
    (lambda: ops.add_noise(x(), -0.1, 0.5, noise=NOISE), ValueError, "alpha: expected a finite number >= 0, got -0.1"),
    (
        lambda: ops.add_noise(x(), 0.1, -HALF, noise=NOISE),
        ValueError,
        "sigma: expected a finite number >= 0, got -0.5 at index 0",
    ),
    (lambda: ops.consistency_skip(x(), x(), 1.0, NAN), ValueError, "c_out: expected a finite number, got nan"),
    (lambda: ddim(sigma_s=-1.0), ValueError, "sigma_s: expected a finite number >= 0, got -1.0"),
    (lambda: ddim(alpha_t=0.0), ValueError, "alpha_t: expected > 0 with prediction='epsilon', got 0"),
    (lambda: ddim(alpha_t=torch.zeros(1)), ValueError, "alpha_t: expected > 0 with prediction='epsilon', got 0"),
    (
        lambda: ddim(sigma_t=0.0, prediction="sample"),
        ValueError,
        "sigma_t: expected > 0 with prediction='sample', got 0",
    ),
    (lambda: ddim(eta=-0.5), ValueError, "eta: expected a finite number >= 0, got -0.5"),
    (lambda: ddim(eta=3.0), ValueError, "eta: expected at most 1.20949 here, so that sigma_s^2 - d^2 >= 0"),
    (lambda: ddim(eta=torch.tensor([3.0])), ValueError, "eta: expected sigma_s^2 - d^2 >= 0 in every sample"),
    (lambda: ddim(alpha_t=0.9, eta=0.5), ValueError, "eta: expected 0 where alpha_t > alpha_s"),
    (lambda: ddim(alpha_t=HALF + 0.4, eta=0.5), ValueError, "eta: expected 0 where alpha_t > alpha_s"),
    (lambda: ddim(sigma_t=0.0, eta=HALF), ValueError, "eta: expected 0 where sigma_t or alpha_s is 0"),
    (lambda: ddim(sigma_t=0.0, eta=0.5), ValueError, "eta: expected 0 where sigma_t or alpha_s is 0, got 0.5"),
    (lambda: ddim(prediction="eps"), ValueError, "prediction: expected one of 'epsilon', 'v', 'sample', got 'eps'"),
    (lambda: ddim(clip=(1.0, 1.0)), ValueError, "clip: expected lo < hi, got (1.0, 1.0)"),
    (lambda: ddim(clip=-1.0), ValueError, "clip: expected lo < hi, got (1.0, -1.0)"),
    (lambda: ddim(clip=(0.0, NAN)), ValueError, "clip[1]: expected a finite number, got nan"),
    (lambda: ddim(clip=(0.0, 1.0, 2.0)), ValueError, "clip: expected (lo, hi), got 3 numbers"),
    (
        lambda: ddim(guidance_scale=2.0),
        ValueError,
        "uncond: expected the unconditional output beside guidance_scale, got None",
    ),
    (lambda: ddim(uncond=x()), ValueError, "guidance_scale: expected a number or a tensor beside uncond, got None"),
    # noise
    (lambda: gk.Noise(seed=-1), ValueError, "seed: expected an integer from 0 to 2^64 - 1, got -1"),
    (lambda: gk.Noise(seed=2**64), ValueError, "seed: expected an integer from 0 to 2^64 - 1"),
    (lambda: gk.Noise(seed=0.5), TypeError, "seed: expected an integer, got 0.5 (float)"),
    (
        lambda: gk.Noise(seed=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        "seed: expected an integer or a one-element int64 tensor",
    ),
    (
        lambda: ops.randn((2, 3), noise=gk.Noise(seed=1, sample_ids=[0])),
        ValueError,
        "sample_ids: expected shape (2,), one a sample, got (1,)",
    ),
    (lambda: ops.randn((2, 3), noise=gk.Noise(seed=1, sample_ids=[0.0, 1.0])), TypeError, "sample_ids: expected int64"),
    (lambda: ops.randn((1,), noise=gk.Noise(1, sample_ids=5)), TypeError, "sample_ids: expected a sequence of"),
    (lambda: ops.randn((1,), noise=gk.Noise(1, sample_ids=[True])), TypeError, "sample_ids: expected int64"),
    (
        lambda: ops.randn((2,), noise=gk.Noise(1, sample_ids=[2**63, 1])),
        ValueError,
        "sample_ids: expected integers that int64 can hold, got 9223372036854775808",
    ),
    (
        lambda: ops.randn((2,), noise=NOISE, dtype=numpy.float32, device="cuda"),
        ValueError,
        "device: expected None or the CPU for a NumPy array, got cuda",
    ),
    (
        lambda: ops.randn((), noise=NOISE),
        ValueError,
        "shape: expected 1 to 16 sizes >= 0, dimension 0 the batch, got ()",
    ),
    (lambda: ops.randn((2, -1), noise=NOISE), ValueError, "shape: expected 1 to 16 sizes >= 0"),
    (lambda: ops.randn(3, noise=NOISE), TypeError, "shape: expected a sequence of integers, got 3"),
    (
        lambda: ops.randn((2,), noise=NOISE, dtype=torch.int64),
        TypeError,
        "dtype: expected float32, float16, bfloat16 or float64, got torch.int64",
    ),
    (lambda: ops.randn((2,), noise=5), TypeError, "noise: expected a Noise, got int"),
    (lambda: ops.add_noise(x(), 0.5, 0.5, noise=5), TypeError, "noise: expected a torch tensor like x, got int"),
    # outputs
    (lambda: ops.euler_step(x(), x(), 0.1, out=x(2)), ValueError, "out: expected shape (4, 3, 8), got (2,)"),
    (
        lambda: ops.euler_step(x(), x(), 0.1, out=x().half()),
        TypeError,
        "out: expected torch.float32, got torch.float16",
    ),
    (lambda: ops.euler_step(x(), x(), 0.1, out=x().to("meta")), ValueError, "out: expected device cpu, got meta"),
    (
        lambda: ops.euler_step(x(), x(), 0.1, out=numpy.zeros(SHAPE, numpy.float32)),
        TypeError,
        "out: expected a torch tensor, got ndarray",
    ),
    (
        lambda: ops.euler_step(x(), x(), 0.1, out=expanded()),
        ValueError,
        "out: expected every element at its own address, got an expanded tensor",
    ),
    (
        lambda: ops.add_noise(x(), 0.1, 0.1, noise=NOISE, return_noise=True, out=x()),
        ValueError,
        "out: expected 2 arrays, one an output, got 1",
    ),
    # path_loss
    (
        lambda: ops.path_loss(x(), noise_coef=1.0),
        ValueError,
        "noise: expected a Noise or a tensor where noise_coef is not 0, got None",
    ),
    (
        lambda: ops.path_loss(x(), h=(x(),), h_coefs=(1.0, 2.0)),
        ValueError,
        "h_coefs: expected 1 coefficients, one for each of h, got 2",
    ),
    (lambda: ops.path_loss(x(), x(), h=(x(),) * 4), ValueError, "h: expected at most 3 coefficients"),
    (lambda: ops.path_loss(x(), x_coef=1.0), ValueError, "x_coef: expected 0 where x is not given, got another number"),
    (lambda: ops.path_loss(x(), x_coef=HALF), ValueError, "x_coef: expected 0 where x is not given"),
    (lambda: ops.path_loss(x(), h=x(2, 4, 3, 8)), TypeError, "h: expected a tuple or a list, got Tensor"),
    (lambda: ops.path_loss(x(), h=(x(),), h_coefs=1.0), TypeError, "h_coefs: expected a tuple or a list, got float"),
    (
        lambda: ops.path_loss(x(), mask=x().double()),
        TypeError,
        "mask: expected bool, or at most the arithmetic's float32, got torch.float64",
    ),
    (lambda: ops.path_loss(x(), mask=-HALF[:, None, None]), ValueError, "mask: expected numbers >= 0"),
    (lambda: ops.path_loss(x(), mask=x() * NAN), ValueError, "mask: expected numbers >= 0, got a negative one or NaN"),
    (lambda: ops.path_loss(x(), x(2), x_coef=1.0), ValueError, "like x, got (4, 3, 8)"),
    (lambda: ops.path_loss(x(), kind="l3"), ValueError, "kind: expected one of 'l2', 'l1', 'pseudo_huber', got 'l3'"),
    (
        lambda: ops.path_loss(x(), reduction="max"),
        ValueError,
        "reduction: expected one of 'mean', 'sum', 'none', got 'max'",
    ),
    (lambda: ops.path_loss(x(), kind="pseudo_huber", c=0.0), ValueError, "c: expected a number > 0, got 0.0"),
    (lambda: ops.path_loss(x(), weight=HALF[:2]), ValueError, "weight: expected a number, one element, or shape (4,)"),
    (lambda: ops.path_loss(x(), weight=NAN), ValueError, "weight: expected a finite number, got nan"),
    (
        lambda: ops.path_loss(x(), mask=x(5, 1)),
        ValueError,
        "mask: expected a shape that broadcasts to (4, 3, 8), got (5, 1)",
    ),
    (
        lambda: ops.path_loss(x(), mask=x().long()),
        TypeError,
        "mask: expected bool, float32, float16, bfloat16 or float64, got torch.int64",
    ),
    (lambda: ops.path_loss(x(), mask=[True]), TypeError, "mask: expected a torch tensor, got list"),
    # rows
    (
        lambda: fused.apply_row(rows.RowTable(x(1, 11), 1), x=x()),
        ValueError,
        "table: expected rows of 12 cells, got shape (1, 11)",
    ),
    (
        lambda: fused.apply_row(rows.RowTable(x(3, 12), 1), x=x()),
        ValueError,
        "table: expected 1 or 4 rows where no index is given, got 3",
    ),
    (lambda: fused.apply_row(rows.RowTable(x(1, 12).double(), 1), x=x()), TypeError, "table: expected float32"),
    (
        lambda: fused.apply_row(rows.RowTable(x(2, 12), 1, torch.zeros(2, dtype=torch.int64)), x=x()),
        ValueError,
        "index: expected int64 of shape (1,) or (4,)",
    ),
    (
        lambda: fused.reduce_row(rows.Row((rows.Out(x=1.0), rows.Out(x=1.0))), x=x()),
        ValueError,
        "row: expected one output, the residual, got 2",
    ),
    (
        lambda: fused.apply_row(row(m=1.0), m_uncond=x(), x=x()),
        ValueError,
        "m: expected the conditional output beside m_uncond, got None",
    ),
    (lambda: fused.apply_row(row(x=1.0)), ValueError, "x: expected x, m or a noise tensor, got None"),
    (lambda: fused.apply_row(row(x=1.0, y=1.0), x=x()), ValueError, "pred: expected (a, b) where an output uses y"),
    (
        lambda: fused.apply_row(rows.Row((rows.Out(x=1.0),), clip=(-1.0, 1.0)), x=x()),
        ValueError,
        "pred: expected (a, b) in a row that clamps, got None",
    ),
    (
        lambda: fused.apply_row(rows.Row((rows.Out(x=1.0, m=1.0),), guidance=2.0), x=x(), m=x()),
        ValueError,
        "m_uncond: expected a tensor beside a guidance scale, got None",
    ),
    (
        lambda: fused.apply_row(rows.Row((rows.Out(x=1.0, m=1.0),), guidance=HALF), x=x(), m=x()),
        ValueError,
        "m_uncond: expected a tensor beside a guidance scale, got None",
    ),
    (
        lambda: fused.apply_row(row(x=1.0, m=0.5), x=x()),
        ValueError,
        "m: expected a tensor where its coefficient is not 0, got None",
    ),
    (
        lambda: fused.apply_row(rows.Row((rows.Out(y=1.0),), (1.0, HALF)), x=x()),
        ValueError,
        "m: expected a tensor where its coefficient is not 0, got None",
    ),
    (
        lambda: fused.apply_row(row(x=HALF, m=0.5), m=x()),
        ValueError,
        "x: expected a tensor where its coefficient is not 0, got None",
    ),
    (
        lambda: fused.apply_row(row(x=1.0, h=(0.5, 0.5)), x=x(), h=(x(),)),
        ValueError,
        "h: expected 2 tensors, one for each of its coefficients, got 1",
    ),
    (
        lambda: fused.apply_row(row(x=1.0, h=(0.5,) * 3 + (HALF,)), x=x(), h=(x(),) * 3),
        ValueError,
        "h: expected at most 3 coefficients in an output, got 4",
    ),
    (
        lambda: fused.apply_row(
            rows.Row((rows.Out(x=HALF, m=HALF, h=(HALF,) * 3),) * 3), x=x(), m=x(), h=(x(), x(), x())
        ),
        ValueError,
        "row: expected at most 12 coefficients as tensors, got 15",
    ),
    (lambda: rows.host_table([row(x=HALF)]), ValueError, "rows[0]: expected host numbers and 1 outputs"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_partly_overlapping_output_is_refused_and_nothing_is_written() -> None:
    buffer = torch.arange(20.0)
    before = buffer.clone()
    for out, state in ((buffer[1:11], buffer[:10]), (buffer[:10], buffer[5:15]), (buffer[:20:2], buffer[:10])):
        with pytest.raises(ValueError, match="out: expected x itself or memory apart from it, got a partial overlap"):
            gk.ops.euler_step(state, torch.zeros(10), 0.5, out=out)
        assert torch.equal(buffer, before)
    with pytest.raises(ValueError, match=re.escape("out[1]: expected memory apart from out[0], got an overlap")):
        gk.ops.add_noise(buffer[:5], 0.5, 0.5, noise=NOISE, return_noise=True, out=(buffer[10:15], buffer[10:15]))
    assert torch.equal(buffer, before)


def test_interleaved_outputs_are_apart() -> None:
    buffer = torch.arange(20.0)
    expected = torch.cat([buffer[1::2] + 0.5])
    gk.ops.euler_step(buffer[1::2], torch.ones(10), 0.5, out=buffer[::2])
    assert torch.equal(buffer[::2], expected) and torch.equal(buffer[1::2], expected - 0.5)


def test_a_failing_call_draws_no_seed_and_writes_nothing() -> None:
    out = torch.full(SHAPE, 3.0)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="sigma"):
        gk.ops.add_noise(x(), 0.5, -1.0, out=out)
    with pytest.raises(TypeError, match="out"):
        gk.ops.add_noise(x().half(), 0.5, 0.5, out=out)
    with pytest.raises(RuntimeError, match="out: expected None"):
        gk.ops.add_noise(x().requires_grad_(), 0.5, 0.5, out=out)
    with pytest.raises(RuntimeError, match="out: expected a tensor that requires no gradient"):
        gk.ops.add_noise(x(), 0.5, 0.5, out=x().requires_grad_())
    many = rows.Row((rows.Out(x=HALF, m=HALF, h=(HALF,) * 3, z=1.0),) * 3)
    with pytest.raises(ValueError, match="row: expected at most 12"):
        fused.apply_row(many, x=x(), m=x(), h=(x(),) * 3)
    assert (out == 3.0).all() and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("numbers, index", [
    ([0.5, math.nan, -1.0], 1), ([0.5, 0.5, math.inf], 2), ([math.inf, -math.inf, 0.5], 0), ([0.5, 2.0, math.nan], 1),
    ([1.0, 0.5, -0.25], 2), ([0.0, 1.0, 0.5], None),
])  # fmt: skip
def test_first_number_outside_is_named(numbers: list[float], index: int | None) -> None:
    value, like = torch.tensor(numbers, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    if index is None:
        assert check.coefficient("t", value, like, 0.0, 1.0) is value
        return
    with pytest.raises(ValueError, match=f"t: expected a number from 0 to 1, got .* at index {index}"):
        check.coefficient("t", value, like, 0.0, 1.0)


def test_numbers_whose_sum_is_beyond_float64_are_finite() -> None:
    value = torch.full((3,), 1e308, dtype=torch.float64)
    assert check.coefficient("t", value, torch.zeros(3, 2, dtype=torch.float64)) is value


@pytest.mark.parametrize("zero", ["sigma_t", "alpha_s"])
@pytest.mark.parametrize("array", [torch.zeros, numpy.zeros])
def test_path_values_of_zero_beside_an_eta_of_zeros(zero: str, array: Callable[..., Any]) -> None:
    state, output = (numpy.ones(SHAPE), numpy.ones(SHAPE)) if array is numpy.zeros else (x() + 1.0, x() + 1.0)
    given = {"alpha_t": 0.6, "sigma_t": 0.8, "alpha_s": 0.8, "sigma_s": 0.6, zero: 0.0}
    for value in (0.0, array(4, dtype=state.dtype)):  # as a number, and by sample
        given[zero] = value
        found = ops.ddim_step(state, output, **given, eta=array(4, dtype=state.dtype), noise=NOISE)
        expected = given["alpha_s"] * (1.0 - given["sigma_t"]) / 0.6 + 0.6
        assert abs(found[0, 0, 0] - (expected if isinstance(value, float) else expected[0])) < 1e-6


@pytest.mark.parametrize("wide", ["model_output", "noise", "h[0]", "h[1]"])
def test_without_x_any_term_of_the_loss_may_have_the_highest_precision(wide: str, path: str) -> None:
    terms = {name: torch.randn(SHAPE).half() for name in ("model_output", "noise", "h[0]", "h[1]")}
    terms[wide] = terms[wide].float() * 1.1
    m, z, h, g = terms.values()
    found = gk.ops.path_loss(m, noise=z, noise_coef=0.5, h=(h, g), h_coefs=(0.25, 2.0))
    r = m.double() - 0.5 * z.double() - 0.25 * h.double() - 2.0 * g.double()
    torch.testing.assert_close(found.double(), r.square().mean(), rtol=1e-6, atol=0.0)


def test_a_tensor_whose_storage_is_freed_is_refused() -> None:
    state, v = x(), x()
    state.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError), match="x: expected a tensor with memory"):
        ops.euler_step(state, v, 0.5)


def test_debug_is_a_switch_and_a_context() -> None:
    from genkern._debug import debug

    assert not debug.values
    with gk.debug(values=True):
        assert debug.values
        with gk.debug(values=False):
            assert not debug.values
        assert debug.values
    assert not debug.values
    gk.debug(values=True)
    assert debug.values
    gk.debug(values=False)
    assert not debug.values


def test_debug_checks_values_on_the_device(device: torch.device) -> None:
    state, dt = x().to(device), torch.tensor([NAN], device=device)
    with gk.debug(values=True), pytest.raises(ValueError, match="dt: expected a finite number, got nan"):
        gk.ops.euler_step(state, state, dt)
    if device.type == "cuda":
        assert gk.ops.euler_step(state, state, dt).isnan().all()


def test_a_sample_of_more_elements_than_its_noise_has() -> None:
    with pytest.raises(ValueError, match=r"shape: expected at most 2\^34 elements a sample .*, got 17179869185"):
        gk.ops.randn((1, (1 << 34) + 1), noise=gk.Noise(seed=0))
