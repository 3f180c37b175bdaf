"""stat and its quantile: against plain formulas in float64, over dtypes, layouts and sizes, and torch's own checks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import NO_CUDA, cuda_works
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import genkern as gk
from genkern import _library, stat
from genkern.rows import Out, Row, RowTable, pack

F64 = torch.float64
SHAPES = [
    (0, 3),
    (2, 0),
    (3,),
    (1, 1),
    (5, 1),
    (3, 7),
    (2, 3, 5, 8),
    (4, 3, 33),
    (2, 20001),
    (3, 2, 64, 72),
    (2, 70001),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = ["contiguous", "strided", "channels_last", "expanded", "offset"]
QS = [0.0, 0.25, 0.5, 0.995, 1.0]


def laid(t: Tensor, layout: str) -> Tensor:
    """The same numbers, lying otherwise."""
    if layout == "strided":
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "channels_last" and t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return t[:1].expand(t.shape)
    if layout == "offset":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return t


def given(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: str = "contiguous") -> list[Tensor]:
    """x, m, m_uncond, h."""
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    numbers = [torch.randn(shape, generator=generator, dtype=F64) + 0.3 for _ in range(4)]
    network = dtype if dtype in (torch.float32, F64) else torch.bfloat16
    return [laid(t.to(device, d), layout) for t, d in zip(numbers, (dtype, network, network, dtype), strict=True)]


def three(b: int, device: torch.device) -> Row:
    """A row with three outputs, a clamped prediction, guidance, and a coefficient a sample."""
    by_sample = torch.linspace(0.2, 1.4, max(b, 1), device=device)[:b]
    outs = (Out(y=1.0, x=0.25), Out(m=by_sample, h=(-0.5,)), Out(x=1.0))
    return Row(outs, pred=(0.75, -0.5), clip=(-0.5, 2.0), guidance=1.5)


def outputs(x: Tensor, m: Tensor, u: Tensor, h: Tensor) -> list[Tensor]:
    """The outputs of three(), as its formula is written, in float64."""
    x, m, u, h = (t.to(F64) for t in (x, m, u, h))
    by_sample = torch.linspace(0.2, 1.4, max(len(x), 1), device=x.device).to(F64)[: len(x)]
    m = u + 1.5 * (m - u)
    y = (0.75 * x - 0.5 * m).clamp(-0.5, 2.0)
    return [y + 0.25 * x, by_sample.reshape(-1, *[1] * (x.ndim - 1)) * m - 0.5 * h, x]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, scale: Tensor) -> None:
    """Within the rounding of the outputs, which are float32 but for float64: of terms that add up to `scale`."""
    assert found.dtype == F64 and found.shape == expected.shape
    bound = (1e-13 if dtype == F64 else 1e-6) * scale + 1e-30
    assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_are_their_formulas(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, path: str
) -> None:
    for layout in LAYOUTS:
        x, m, u, h = given(shape, dtype, device, layout)
        found = stat.stat_row(three(shape[0], device), x=x, m=m, m_uncond=u, h=(h,))
        outs = [t[:, None].flatten(1) for t in outputs(x, m, u, h)]
        expected = [t.sum(1) for t in outs] + [(a * b).sum(1) for i, a in enumerate(outs) for b in outs[i:]]
        size = [t.abs().sum(1) for t in outs] + [(a * b).abs().sum(1) for i, a in enumerate(outs) for b in outs[i:]]
        # out_0 and out_1 may cancel: their terms are larger than they are.
        close(found, torch.stack(expected, 1), dtype, 4.0 * torch.stack(size, 1) + 0.1 * x[:1].numel())
        assert stat.product(3, 1, 0) == 4 and stat.product(3, 2, 2) == 8


def test_a_variance_survives_a_large_mean(device: torch.device, path: str) -> None:
    x = 1e4 + torch.randn(3, 5, 4001, device=device)
    found = stat.stat_row(Row((Out(x=1.0),)), x=x)
    n = 5 * 4001
    variance = found[:, stat.product(1, 0, 0)] / n - (found[:, 0] / n) ** 2
    torch.testing.assert_close(variance, x.to(F64).flatten(1).var(1, correction=0), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("outs", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_error_is_the_norm_of_an_embedded_pair(outs: int, dtype: torch.dtype, device: torch.device, path: str) -> None:
    x, m, _, h = given((3, 5, 67), dtype, device)
    rows = (Out(x=0.1, m=-0.1), Out(x=1.0), Out(h=(1.0,)))[:outs]
    found = stat.stat_row(Row(rows), x=x, m=m, h=(h,), kind="error", atol=1e-2, rtol=0.1)
    wide = [t.to(F64) for t in (x, m, h)]
    larger = (
        torch.zeros_like(wide[0]) if outs == 1 else wide[0].abs() if outs == 2 else wide[0].abs().maximum(wide[2].abs())
    )
    expected = (0.1 * (wide[0] - wide[1]) / (1e-2 + 0.1 * larger)).square().flatten(1).sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-12 if dtype == F64 else 2e-6, atol=0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantile_is_an_order_statistic_interpolated(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, path: str
) -> None:
    arithmetic = F64 if dtype == F64 else torch.float32
    for layout in LAYOUTS:
        x, m, *_ = given(shape, dtype, device, layout)
        row = Row((Out(x=0.5, m=-2.0),))
        values = gk.fused.apply_row(row, x=x, m=m, dtypes=(arithmetic,))[0].abs()[:, None].flatten(1)
        for q in QS:
            found = stat.quantile_row(row, q, x=x, m=m)
            assert found.dtype == arithmetic and found.shape == shape[:1]
            if 0 in values.shape:
                assert found.isnan().all()
                continue
            expected = torch.quantile(values.to(F64), q, dim=1)
            eps = torch.finfo(arithmetic).eps
            torch.testing.assert_close(found.to(F64), expected, rtol=2.0 * eps, atol=0.0)
            if q * (values.shape[1] - 1) % 1.0 == 0.0:  # an element itself, to the bit
                assert torch.equal(found, values.sort(1).values[:, int(q * (values.shape[1] - 1))])


def test_quantile_of_many_equal_zero_infinite_and_missing_numbers(device: torch.device, path: str) -> None:
    row = Row((Out(x=1.0),))
    for n in (5, 9000, 70000):
        x = torch.zeros(6, n, device=device)
        x[1] = -3.0
        x[2, ::2] = 1.0
        x[3, -1] = float("inf")
        x[4, 3] = float("nan")
        x[5] = torch.arange(n).to(x) * -1e-42  # subnormal, negative
        for q in (0.0, 0.5, 0.7, 1.0):
            found = stat.quantile_row(row, q, x=x).cpu()
            v = x.abs().sort(1).values.cpu()
            k = int(q * (n - 1))
            assert found[0] == 0.0 and found[1] == 3.0 and found[4].isnan()
            assert v[2, k] <= found[2] <= v[2, min(k + 1, n - 1)]
            assert found[3] == (float("inf") if q == 1.0 else 0.0)
            assert v[5, k] <= found[5] <= v[5, min(k + 1, n - 1)]
    infinite = torch.full((1, 9), float("inf"), device=device)
    assert stat.quantile_row(row, 0.3, x=infinite) == float("inf")


def test_quantile_has_no_limit_of_elements() -> None:
    """torch.quantile refuses more than 2^24."""
    x = torch.arange(1, (1 << 24) + 100, dtype=torch.int32).to(torch.float32).flip(0)[None]
    found = stat.quantile_row(Row((Out(x=1.0),)), 0.25, x=x)
    assert found.item() == torch.tensor(1.0 + 0.25 * (x.shape[1] - 1), dtype=F64).to(torch.float32).item()


@pytest.mark.parametrize("shape", [(7, 3, 40), (4, 3, 150, 160)])
def test_a_sample_has_the_same_bits_in_every_batch_and_run(shape: tuple[int, ...], device: torch.device) -> None:
    x, m, u, h = given(shape, torch.float32, device)
    row = Row((Out(y=1.0), Out(m=1.0), Out(h=(1.0,))), pred=(0.5, 1.0), guidance=2.0)
    one = Row((Out(x=0.3, m=1.0),))
    whole = stat.stat_row(row, x=x, m=m, m_uncond=u, h=(h,)), stat.quantile_row(one, 0.9, x=x, m=m)
    for low, high in ((0, shape[0]), (0, 2), (2, 3), (3, shape[0])):
        s = slice(low, high)
        assert torch.equal(stat.stat_row(row, x=x[s], m=m[s], m_uncond=u[s], h=(h[s],)), whole[0][s])
        assert torch.equal(stat.quantile_row(one, 0.9, x=x[s], m=m[s]), whole[1][s])


def test_threads_do_not_change_the_bits() -> None:
    x = torch.randn(3, 90000)
    row, before = Row((Out(x=1.0),)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = stat.stat_row(row, x=x), stat.quantile_row(row, 0.7, x=x)
        torch.set_num_threads(2)
        two = stat.stat_row(row, x=x), stat.quantile_row(row, 0.7, x=x)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_numpy_arrays_have_the_bits_of_tensors(dtype: str, kernels: None) -> None:
    x, m = (np.random.default_rng(k).standard_normal((3, 5, 41)).astype(dtype) for k in range(2))
    row = Row((Out(x=0.5, m=1.5), Out(m=1.0)))
    found = stat.stat_row(row, x=x, m=m)
    expected = stat.stat_row(row, x=torch.from_numpy(x), m=torch.from_numpy(m))
    assert isinstance(found, np.ndarray) and np.array_equal(found, expected.numpy())
    one = Row((Out(x=0.5, m=1.5),))
    found = stat.quantile_row(one, 0.8, x=x[..., ::2], m=m[..., ::2])
    expected = stat.quantile_row(one, 0.8, x=torch.from_numpy(x)[..., ::2], m=torch.from_numpy(m)[..., ::2])
    assert isinstance(found, np.ndarray) and np.array_equal(found, expected.numpy())


def test_numpy_arrays_without_the_compiled_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "arrays", lambda: None)
    x = np.random.default_rng(0).standard_normal((3, 41))
    values = np.abs(0.5 * x)
    np.testing.assert_allclose(stat.stat_row(Row((Out(x=0.5),)), x=x)[:, 1], (values**2).sum(1))
    np.testing.assert_allclose(stat.quantile_row(Row((Out(x=0.5),)), 0.3, x=x), np.quantile(values, 0.3, axis=1))


def test_rows_of_a_table_and_given_noise(device: torch.device, path: str) -> None:
    x, m, *_ = given((3, 40), torch.float32, device)
    row = Row((Out(x=0.5, m=2.0),))
    table = torch.tensor([pack(row).row] * 2, device=device)
    index = torch.tensor([1], device=device)
    assert torch.equal(stat.stat_row(RowTable(table, 1, index), x=x, m=m), stat.stat_row(row, x=x, m=m))
    z = torch.randn_like(x)
    assert torch.equal(
        stat.stat_row(Row((Out(x=1.0, z=0.5),)), x=x, noise=z), stat.stat_row(Row((Out(x=1.0, h=(0.5,)),)), x=x, h=(z,))
    )


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"kind": "norm"}, ValueError, "kind: expected one of 'moments', 'error', got 'norm'"),
        ({"atol": -1.0}, ValueError, "atol: expected a finite number >= 0"),
        ({"noise": gk.Noise(1)}, ValueError, "noise: expected a tensor in a statistic"),
        ({"x": None}, ValueError, "x: expected"),
        ({"m": torch.zeros(3, 4)}, ValueError, "m: expected shape"),
        ({"q": 1.5}, ValueError, "q: expected a number from 0 to 1, got 1.5"),
        ({"q": 0.5, "row": Row((Out(x=1.0), Out(x=2.0)))}, ValueError, "row: expected one output, got 2"),
        ({"row": Row((Out(x=1.0, z=1.0),))}, ValueError, "noise: expected a tensor in a statistic, got None"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    options = {"row": Row((Out(x=1.0, m=0.5),)), "x": torch.zeros(3, 5), "m": torch.zeros(3, 5)} | options
    row = options.pop("row")
    with pytest.raises(error, match=words):
        stat.quantile_row(row, **options) if "q" in options else stat.stat_row(row, **options)


def test_a_gradient_is_refused_and_the_reference_has_one() -> None:
    x = torch.randn(2, 5, dtype=F64, requires_grad=True)
    row = Row((Out(x=1.0),))
    for call in (lambda: stat.stat_row(row, x=x), lambda: stat.quantile_row(row, 0.5, x=x)):
        with pytest.raises(RuntimeError, match="row: expected arguments that require no gradient"):
            call()
        with torch.no_grad():
            call()
    with pytest.raises(RuntimeError, match="outside torch.func"):
        torch.func.vmap(lambda x: stat.stat_row(row, x=x[None]))(x.detach())
    assert torch.autograd.gradcheck(lambda x: gk.reference.stat.moments([x, x * x]), (x,))
    assert torch.autograd.gradcheck(lambda x: gk.reference.stat.quantile(x, 0.6), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_opcheck(dtype: torch.dtype, device: torch.device, kernels: None) -> None:
    x, m, u, h = given((2, 3, 9), dtype, device)
    row, rows = (pack(Row((Out(x=1.0, m=0.5, h=(0.25,)),) * n)).row for n in (1, 3))

    def arguments(row: list[float]) -> tuple[Any, ...]:
        return (x, m, u, [h], None, row, None, None, [], [], [], 0, 0, [], None, None, False)

    torch.library.opcheck(torch.ops.genkern.stat, (*arguments(rows), 3, 0, 0.0, 0.0))
    torch.library.opcheck(torch.ops.genkern.stat, (*arguments(rows), 3, 1, 0.1, 0.2))
    torch.library.opcheck(torch.ops.genkern.stat_quantile, (*arguments(row), 0.5))


def test_the_raw_ops_refuse_what_they_must_not_read(kernels: None) -> None:
    x = torch.zeros(2, 3)
    row = pack(Row((Out(x=1.0),))).row

    def arguments(x: Tensor | None, noise: int = 0) -> tuple[Any, ...]:
        return (x, None, None, [], None, row, None, None, [], [], [], 0, noise, [0, 0, 0], None, None, False)

    ops = torch.ops.genkern
    for call, words in (
        (lambda: ops.stat(*arguments(None), 1, 0, 0.0, 0.0), "x: expected"),
        (lambda: ops.stat(*arguments(x, 1), 1, 0, 0.0, 0.0), "noise: expected 0"),
        (lambda: ops.stat(*arguments(x), 2, 0, 0.0, 0.0), "row: expected 19 cells"),
        (lambda: ops.stat(*arguments(x), 4, 0, 0.0, 0.0), "expected 1 to 3 outputs, got 4"),
        (lambda: ops.stat(*arguments(x), 1, 2, 0.0, 0.0), "kind: expected 0"),
        (lambda: ops.stat_quantile(*arguments(x), 1.01), "q: expected a number from 0 to 1"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=words):
            call()


def test_compiled_in_full_graphs_with_the_same_bits(kernels: None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(x: Tensor, m: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        row = Row((Out(x=1.0, m=w), Out(m=1.0)))
        return stat.stat_row(row, x=x, m=m), stat.quantile_row(Row((Out(x=w),)), 0.9, x=x)

    traced = torch.compile(run, fullgraph=True, backend=counter)
    x, m = torch.randn(2, 3, 4, 5)
    for value in (0.3, 0.7):
        w = torch.full((3,), value)
        assert all(torch.equal(a, b) for a, b in zip(traced(x, m, w), run(x, m, w), strict=True))
    assert counter.frame_count == 1


@pytest.mark.cuda
@pytest.mark.skipif(not cuda_works(), reason=NO_CUDA)
def test_captured_and_replayed_with_the_same_bits() -> None:
    x = torch.randn(3, 5, 20000, device="cuda")
    row = Row((Out(x=0.5), Out(x=1.0)))

    def run() -> tuple[Tensor, Tensor]:
        return stat.stat_row(row, x=x), stat.quantile_row(Row((Out(x=1.0),)), 0.95, x=x)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
        on_cpu = stat.quantile_row(Row((Out(x=1.0),)), 0.95, x=x.cpu())
        assert torch.equal(captured[1].cpu(), on_cpu)
