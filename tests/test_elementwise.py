"""The elementwise terms of a row: a noise whose scale is exp(l0 + l1 v), and what is known where a mask is.

r_j   = c0j y + c1j x + c2j m + c3j h + s_j e z,    e = exp(l0 + l1 v)
out_j = r_j + mask (p_j known + q_j z - r_j)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import NOISE, SHAPE, rounding
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

from genkern import calls, fused, rows
from genkern import ops as gk_ops

HALVES = (torch.float16, torch.bfloat16)
F64 = torch.float64
LOG_SCALE, KNOWN = (-0.7, 0.4), ((0.8, 0.6), None)
OUTS = (rows.Out(y=0.5, x=1.0, m=0.3, h=(0.2,), z=0.9), rows.Out(x=0.5, z=-1.5))
PRED, CLIP = (0.6, -0.8), (-0.5, 0.7)


def row_of(log_scale: Any = LOG_SCALE, known: Any = KNOWN, outs: Any = OUTS, **more: Any) -> rows.Row:
    return rows.Row(outs, PRED, CLIP, elementwise=rows.Elementwise(log_scale, known), **more)


def masks(shape: tuple[int, ...], device: torch.device | None = None) -> dict[str, Tensor]:
    flags = torch.arange(shape[0] * shape[-1], device=device).reshape(shape[0], *[1] * (len(shape) - 2), -1) % 3 != 0
    return {
        "bool": flags,
        "hard": flags.half(),
        "soft": torch.linspace(0.0, 1.0, 105, device=device).reshape(3, 1, 5, 7)[:, :, : shape[-2]].float(),
    }


def given(dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, Any]:
    x, m, h, z, v, known = (torch.randn(SHAPE).to(device, dtype) for _ in range(6))
    return {"x": x, "m": m, "h": (h,), "noise": z, "v": v, "known": known}


def written_out(row: rows.Row, *, x, m, h, noise, v=None, known=None, mask=None) -> list[Tensor]:
    """The formula as it is written, in float64."""
    x, m, z = x.double(), m.double(), noise.double()
    y = (row.pred[0] * x + row.pred[1] * m).clamp(*row.clip)
    l0, l1 = row.elementwise.log_scale or (0.0, 0.0)
    e = 1.0 if v is None else torch.exp(l0 + l1 * v.double())
    found = []
    for j, out in enumerate(row.outs):
        r = out.y * y + out.x * x + out.m * m + sum(c * t.double() for c, t in zip(out.h, h, strict=False))
        r = r + out.z * e * z
        weights = None if known is None else row.elementwise.known[j]
        if weights is not None:
            k, w = weights[0] * known.double() + weights[1] * z, mask.double()
            r = (1.0 - w) * r + w * k
        found.append(r)
    return found


@pytest.mark.parametrize("mask", ["bool", "hard", "soft"])
def test_row_is_the_formula(mask: str, device: torch.device, dtype: torch.dtype, path: str) -> None:
    terms = {**given(dtype, device), "mask": masks(SHAPE, device)[mask]}
    for found, exact in zip(fused.apply_row(row_of(), **terms), written_out(row_of(), **terms), strict=True):
        assert ((found.double() - exact).abs() <= rounding(dtype, exact, 30.0)).all()


@pytest.mark.parametrize("which", ["scaled", "blended"])
def test_either_term_goes_without_the_other(which: str, device: torch.device, path: str) -> None:
    terms = given(torch.float32, device)
    if which == "scaled":
        row = row_of(known=None)
        del terms["known"]
    else:
        row = row_of(log_scale=None)
        del terms["v"]
        terms["mask"] = masks(SHAPE, device)["soft"]
    for found, exact in zip(fused.apply_row(row, **terms), written_out(row, **terms), strict=True):
        assert ((found.double() - exact).abs() <= rounding(torch.float32, exact, 30.0)).all()


def test_noise_drawn_in_the_pass_is_that_of_the_op(device: torch.device, path: str) -> None:
    terms, mask = given(torch.float32, device), masks(SHAPE, device)["soft"]
    z = gk_ops.randn(SHAPE, noise=NOISE, device=device)
    drawn = fused.apply_row(row_of(), **{**terms, "noise": NOISE, "mask": mask})
    for found, expected in zip(drawn, fused.apply_row(row_of(), **{**terms, "noise": z, "mask": mask}), strict=True):
        assert torch.equal(found, expected)


def test_noise_of_what_is_known_is_drawn_where_the_rows_own_has_no_weight(path: str) -> None:
    x, known = torch.randn(2, *SHAPE)
    mask = torch.ones(SHAPE, dtype=torch.bool)
    row = rows.Row((rows.Out(x=1.0),), elementwise=rows.Elementwise(known=((0.8, 0.6),)))
    (found,) = fused.apply_row(row, x=x, known=known, mask=mask, noise=NOISE)
    torch.testing.assert_close(found, 0.8 * known + 0.6 * gk_ops.randn(SHAPE, noise=NOISE))


@pytest.mark.parametrize("mask", ["bool", "hard", "soft"])
def test_nothing_leaks_from_under_a_mask_of_0_or_1(mask: str, device: torch.device, path: str) -> None:
    terms, weights = given(torch.float32, device), masks(SHAPE, device)[mask]
    wide = weights.double().expand(SHAPE)
    clean = fused.apply_row(row_of(), **terms, mask=weights)[0]
    dirty = dict(terms)
    dirty["known"] = torch.where(wide == 0.0, torch.nan, terms["known"])
    for name in ("x", "m", "v"):
        dirty[name] = torch.where(wide == 1.0, torch.nan, terms[name])
    found = fused.apply_row(row_of(), **dirty, mask=weights)
    assert torch.equal(found[0], clean)
    assert torch.equal(found[1].isnan(), wide == 1.0)  # an output without p and q is left as it is


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_exponential_is_within_an_ulp_and_a_half_and_saturates(dtype: torch.dtype, device: torch.device) -> None:
    low, high, digits = (-87.0, 88.5, torch.int32) if dtype == torch.float32 else (-708.0, 709.7, torch.int64)
    numbers = [torch.linspace(low, high, 200_001, dtype=F64), torch.linspace(-1.0, 1.0, 100_001, dtype=F64)]
    v = torch.cat(numbers).to(dtype).to(device)[None]
    row = rows.Row((rows.Out(z=1.0),), elementwise=rows.Elementwise((0.0, 1.0)))
    (found,) = fused.apply_row(row, v=v, noise=torch.ones_like(v))
    wanted = v.double().exp() if dtype == torch.float32 else torch.exp(v)
    if dtype == torch.float32:  # the exact number lies between two floats
        ulp = torch.nextafter(wanted.float(), torch.tensor(torch.inf, device=device)).double() - wanted.float().double()
        assert float(((found.double() - wanted).abs() / ulp).max()) < 1.5
    else:
        assert int((found.view(digits) - wanted.view(digits)).abs().max()) <= 2
    ends = torch.tensor([[-torch.inf, -1e30, 0.0, -0.0, 1e30, torch.inf, torch.nan]], dtype=dtype, device=device)
    (found,) = fused.apply_row(row, v=ends, noise=torch.ones_like(ends))
    torch.testing.assert_close(found, ends.exp(), rtol=0, atol=0, equal_nan=True)


def test_exponential_of_small_numbers_is_gradually_0(device: torch.device) -> None:
    v = torch.linspace(-105.0, -87.0, 5001, dtype=F64).float().to(device)[None]
    row = rows.Row((rows.Out(z=1.0),), elementwise=rows.Elementwise((0.0, 1.0)))
    (found,) = fused.apply_row(row, v=v, noise=torch.ones_like(v))
    exact = v.double().exp()
    assert ((found.double() - exact).abs() <= 2.0**-149 + 1.5 * 2.0**-24 * exact).all()


def test_exponential_has_the_same_bits_on_every_instruction_set(kernels: None) -> None:
    from genkern import _library

    select, before = _library.torch_ops().cpu_isa, _library.torch_ops().cpu_isa("")
    for dtype in (torch.float32, F64):
        terms = given(dtype)
        terms["v"] = torch.linspace(-120.0, 100.0, terms["v"].numel(), dtype=dtype).reshape(SHAPE)
        terms["mask"] = masks(SHAPE)["soft"]
        found = {}
        for isa in ("scalar", "avx2", "avx512"):
            try:
                select(isa)
            except RuntimeError:
                continue
            found[isa] = fused.apply_row(row_of(log_scale=(0.0, 1.0)), **terms)
        select(before)
        for outs in found.values():
            for out, expected in zip(outs, found["scalar"], strict=True):
                torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)  # infinity less infinity


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "half of the channels": lambda t: torch.cat([t, t], 1).chunk(2, 1)[1],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("of_x, of_others", [(a, b) for a in ("plain", "channels_last") for b in LAYOUTS])
def test_strides_change_nothing(of_x: str, of_others: str, device: torch.device) -> None:
    shape, lay = (3, 4, 8, 12), LAYOUTS[of_others]
    x, m, v, known = torch.randn(4, *shape, device=device)
    mask = torch.rand(shape, device=device)
    m, v, known, mask = (lay(t) for t in (m, v, known, mask))
    if of_x == "channels_last":
        x = LAYOUTS[of_x](x)
    row = row_of(outs=(rows.Out(x=1.0, m=0.3, z=0.9), rows.Out(x=0.5, z=-1.5)))
    found = fused.apply_row(row, x=x, m=m, v=v, known=known, mask=mask, noise=NOISE)
    dense = {"x": x, "m": m, "v": v, "known": known, "mask": mask}
    expected = fused.apply_row(row, **{k: t.contiguous() for k, t in dense.items()}, noise=NOISE)
    for out, wanted in zip(found, expected, strict=True):
        assert torch.equal(out, wanted) and out.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("n", [1, 3, 65, 4099])
def test_any_length_and_mixed_types(n: int, dtype: torch.dtype, device: torch.device) -> None:
    x, known = torch.randn(2, 2, n, device=device).to(dtype)
    m, v = torch.randn(2, 2, n, device=device).to(torch.bfloat16 if dtype == torch.float32 else dtype)
    mask = torch.rand(2, n, device=device).to(dtype)
    row = rows.Row((rows.Out(x=1.0, m=0.3, z=0.9),) * 2, elementwise=rows.Elementwise(LOG_SCALE, ((0.8, 0.6), None)))
    z = gk_ops.randn((2, n), noise=NOISE, device=device)
    out = (torch.empty_like(x), torch.empty(2, n, dtype=torch.bfloat16, device=device))
    fused.apply_row(row, x=x, m=m, v=v, known=known, mask=mask, noise=NOISE, out=out, dtypes=[o.dtype for o in out])
    e = torch.exp(LOG_SCALE[0] + LOG_SCALE[1] * v.double())
    r = x.double() + 0.3 * m.double() + 0.9 * e * z.double()
    w = mask.double()
    exact = ((1.0 - w) * r + w * (0.8 * known.double() + 0.6 * z.double()), r)
    for found, wanted in zip(out, exact, strict=True):
        assert ((found.double() - wanted).abs() <= rounding(found.dtype, wanted, 30.0)).all()


def test_output_over_an_input(device: torch.device) -> None:
    terms, mask = given(torch.float32, device), masks(SHAPE, device)["soft"]
    for name in ("x", "v", "known"):
        wanted = fused.apply_row(row_of(), **terms, mask=mask)
        outs = (terms[name].clone(), torch.empty(SHAPE, device=device))
        fused.apply_row(row_of(), **{**terms, name: outs[0]}, mask=mask, out=outs)
        assert all(torch.equal(out, expected) for out, expected in zip(outs, wanted, strict=True))


@pytest.mark.parametrize("index", [None, "one", "each"])
def test_a_table_and_coefficients_by_sample_have_the_same_bits(index: str | None, device: torch.device) -> None:
    terms = {**given(torch.float32, device), "mask": masks(SHAPE, device)["soft"]}
    wanted = fused.apply_row(row_of(), **terms)
    lines, use_pred = rows.host_table([row_of(log_scale=(0.0, 0.0)), row_of()])
    assert len(lines[0]) == rows.CELLS_ELEMENTWISE
    table = torch.tensor(lines, device=device)
    numbers = None if index is None else torch.ones(1 if index == "one" else 3, dtype=torch.int64, device=device)
    of = rows.RowTable(table if index else table[1:], 2, numbers, use_pred, blended=0b01)
    assert all(torch.equal(a, b) for a, b in zip(fused.apply_row(of, **terms), wanted, strict=True))
    by_sample = [torch.full((3,), c, dtype=F64, device=device) for c in (*LOG_SCALE, *KNOWN[0])]
    row = row_of(tuple(by_sample[:2]), (tuple(by_sample[2:]), None))
    assert all(torch.equal(a, b) for a, b in zip(fused.apply_row(row, **terms), wanted, strict=True))


SMALL = (3, 2, 2)


def variable() -> Tensor:
    return torch.randn(SMALL, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("coefficients", ["numbers", "tensors"])
def test_gradients(soft: bool, coefficients: str, path: str) -> None:
    mask = torch.rand(SMALL, dtype=F64) if soft else torch.rand(SMALL) > 0.5
    tensors = [variable() for _ in range(6)]
    scales = [torch.rand(n, dtype=F64, requires_grad=True) for n in (1, 3, 3, 1)] if coefficients == "tensors" else []

    def apply(x: Tensor, m: Tensor, h: Tensor, z: Tensor, v: Tensor, known: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
        row = row_of(c[:2], (None, c[2:])) if c else row_of(known=(None, KNOWN[0]))
        return fused.apply_row(row, x=x, m=m, h=(h,), noise=z, v=v, known=known, mask=mask)

    gradcheck(apply, (*tensors, *scales), check_forward_ad=True)
    gradgradcheck(apply, (*tensors, *scales), fast_mode=True)


def test_gradients_with_drawn_noise_and_a_table(path: str) -> None:
    mask, (x, m, h, v, known) = torch.rand(SMALL, dtype=F64), (variable() for _ in range(5))
    lines, use_pred = rows.host_table([row_of()])
    table = torch.tensor(lines, dtype=F64)
    left, right = table[:, : rows.LO].requires_grad_(), table[:, rows.W :].requires_grad_()

    def apply(left: Tensor, right: Tensor, x: Tensor, m: Tensor, h: Tensor, v: Tensor, known: Tensor) -> Any:
        of = rows.RowTable(torch.cat([left, table[:, rows.LO : rows.W], right], 1), 2, None, use_pred, blended=0b01)
        return fused.apply_row(of, x=x, m=m, h=(h,), noise=NOISE, v=v, known=known, mask=mask)

    gradcheck(apply, (left, right, x, m, h, v, known), check_forward_ad=True)


def test_no_gradient_of_what_is_masked_out_is_nan(path: str) -> None:
    mask = torch.tensor([[0.0, 1.0, 0.5]])
    nan = torch.tensor
    x = nan([[1.0, torch.nan, 2.0]], requires_grad=True)
    known = nan([[torch.nan, 3.0, 4.0]], requires_grad=True)
    c = torch.tensor([0.5], requires_grad=True)
    row = rows.Row((rows.Out(x=c),), elementwise=rows.Elementwise(known=((c, 0.0),)))
    (out,) = fused.apply_row(row, x=x, known=known, mask=mask)
    found = torch.autograd.grad(out.sum(), (x, known, c))
    expected = ([[0.5, 0.0, 0.25]], [[0.0, 0.5, 0.25]], [1.0 + 3.0 + 1.0 + 2.0])
    assert all(torch.equal(a, torch.tensor(b)) for a, b in zip(found, expected, strict=True))


def test_vmap_and_forward_mode(path: str) -> None:
    mask = torch.rand(SHAPE, dtype=F64)
    row = rows.Row((rows.Out(x=1.0, z=0.9),), elementwise=rows.Elementwise(LOG_SCALE, (KNOWN[0],)))

    def apply(x: Tensor, v: Tensor, known: Tensor) -> Tensor:
        return fused.apply_row(row, x=x, v=v, known=known, mask=mask, noise=NOISE)[0]

    def formula(x: Tensor, v: Tensor, known: Tensor) -> Tensor:
        z = gk_ops.randn(SHAPE, noise=NOISE, dtype=F64)
        r = x + 0.9 * torch.exp(LOG_SCALE[0] + LOG_SCALE[1] * v) * z
        return (1 - mask) * r + mask * (0.8 * known + 0.6 * z)

    lanes = torch.randn(3, 2, *SHAPE, dtype=F64)
    torch.testing.assert_close(vmap(apply)(*lanes), vmap(formula)(*lanes))
    at, along = lanes[:, 0].unbind(), lanes[:, 1].unbind()
    torch.testing.assert_close(jvp(apply, at, along), jvp(formula, at, along))
    with pytest.raises(RuntimeError, match="mask: expected a tensor without a tangent"):
        jvp(lambda w: fused.apply_row(row, x=at[0], v=at[1], known=at[2], mask=w, noise=NOISE)[0], (mask,), (mask,))


def test_compiled_and_exported(kernels: None) -> None:
    torch._dynamo.reset()
    mask = masks(SHAPE)["soft"]

    class Step(torch.nn.Module):
        def forward(self, x: Tensor, m: Tensor, h: Tensor, v: Tensor, known: Tensor, mask: Tensor) -> Any:
            return fused.apply_row(row_of(), x=x, m=m, h=(h,), v=v, known=known, mask=mask, noise=NOISE)

    arrays = [torch.randn(SHAPE, requires_grad=True) for _ in range(5)]
    eager, traced = Step()(*arrays, mask), torch.compile(Step(), fullgraph=True, backend="aot_eager")(*arrays, mask)
    assert all(torch.equal(a, b) for a, b in zip(traced, eager, strict=True))
    grads = [torch.autograd.grad([out.sum() for out in outs], arrays) for outs in (traced, eager)]
    torch.testing.assert_close(*grads)
    given = tuple(t.detach() for t in arrays)
    program = torch.export.export(Step(), (*given, mask))
    torch.testing.assert_close(program.module()(*given, mask), Step()(*given, mask))


@pytest.mark.parametrize("mask", ["bool", "soft"])
def test_opcheck(mask: str, device: torch.device, dtype: torch.dtype, kernels: None) -> None:
    gk_ops.randn((1,), noise=NOISE)  # loads the library and its fake implementations
    x, m, h, z, v, known = torch.randn(6, *SHAPE, device=device).to(dtype)
    weights = masks(SHAPE, device)[mask].expand(SHAPE)
    packed = rows.pack(row_of())
    call = (x, m, None, [h], z, packed.row, None, None, [], [], [], 0, 0, [], None, None, True)
    code = calls.CODES[dtype]
    torch.library.opcheck(
        torch.ops.genkern.map, (*call, [code, 0]), {"v": v, "known": known, "mask": weights, "blended": 1}
    )
    outs = [torch.empty(SHAPE, device=device, dtype=dtype) for _ in range(2)]
    torch.library.opcheck(
        torch.ops.genkern.map_out, (*call, outs), {"v": v, "known": known, "mask": weights, "blended": 1}
    )


def test_numpy_arrays(kernels: None) -> None:
    terms, mask = given(torch.float32), masks(SHAPE)
    for weights in mask.values():
        wanted = fused.apply_row(row_of(), **terms, mask=weights)
        arrays = {k: (t[0].numpy(),) if k == "h" else t.numpy() for k, t in terms.items()}
        found = fused.apply_row(row_of(), **arrays, mask=weights.numpy())
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=0, atol=0)


X, Z = torch.ones(2, 3), torch.ones(2, 3)
SCALED = rows.Row((rows.Out(x=1.0, z=1.0),), elementwise=rows.Elementwise(LOG_SCALE))
BLENDED = rows.Row((rows.Out(x=1.0),), elementwise=rows.Elementwise(known=((1.0, 0.0),)))
PLAIN = rows.Row((rows.Out(x=1.0),))


@pytest.mark.parametrize(
    "row, terms, error, words",
    [
        (SCALED, {"x": X, "noise": Z}, ValueError, "v: expected a tensor beside log_scale, got None"),
        (PLAIN, {"x": X, "v": X}, ValueError, "v: expected None without log_scale, got a tensor"),
        (SCALED, {"x": X, "noise": Z, "v": X[:1]}, ValueError, r"v: expected shape \(2, 3\) like x, got \(1, 3\)"),
        (SCALED, {"x": X, "noise": Z, "v": X.double()}, TypeError, "v: expected torch.float32 like x, or a lower"),
        (
            rows.Row((rows.Out(x=1.0),), elementwise=rows.Elementwise(LOG_SCALE)), {"x": X, "v": X}, ValueError,
            "v: expected noise that it scales, got none",
        ),
        (BLENDED, {"x": X, "mask": X}, ValueError, "known: expected a tensor beside p and q, got None"),
        (BLENDED, {"x": X, "known": X}, ValueError, "mask: expected a tensor beside known, got None"),
        (PLAIN, {"x": X, "known": X, "mask": X}, ValueError, "known: expected None without p and q, got a tensor"),
        (BLENDED, {"x": X, "known": X, "mask": 2 * X}, ValueError, "mask: expected a number from 0 to 1, got 2 to 2"),
        (BLENDED, {"x": X, "known": X, "mask": X[:, :2]}, ValueError, "mask: expected a shape that broadcasts to"),
        (
            BLENDED, {"x": X, "known": X, "mask": X.clone().requires_grad_()}, ValueError,
            "mask: expected a tensor that requires no gradient",
        ),
        (
            rows.RowTable(torch.zeros(1, 12), 1, blended=1), {"x": X, "known": X, "mask": X}, ValueError,
            "table: expected rows of 39 cells",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_named(row: Any, terms: Any, error: Any, words: str, path: str) -> None:
    with pytest.raises(error, match=words):
        fused.apply_row(row, **terms)


def test_bad_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"known: expected \(p, q\) or None for each of 1 outputs, got 2"):
        rows.pack(rows.Row((rows.Out(x=1.0),), elementwise=rows.Elementwise(known=(None, (1.0, 0.0)))))
    with pytest.raises(ValueError, match="elementwise: expected a log_scale, or"):
        rows.pack(rows.Row((rows.Out(x=1.0),), elementwise=rows.Elementwise()))
    with pytest.raises(ValueError, match=r"rows\[1\]: expected elementwise coefficients where rows\[0\] has them"):
        rows.host_table([SCALED, PLAIN])
    with pytest.raises(ValueError, match="row: expected no elementwise coefficients in a residual"):
        fused.reduce_row(SCALED, x=X, noise=Z)
