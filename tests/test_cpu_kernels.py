"""The CPU kernels of every instruction set: types, lengths that fill no vector, and noise in the order of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from op_cases import NOISE
from torch import Tensor

import genkern as gk
from genkern import _library, fused, rows

HALVES = [torch.float16, torch.bfloat16]
ONCE = rows.Row((rows.Out(x=1.0),))


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, kernels: None) -> Iterator[str]:
    select = _library.torch_ops().cpu_isa
    before = select("")
    try:
        select(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    select(before)


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def bits(t: Tensor) -> Tensor:
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """NaN where NaN is expected, whatever its payload."""
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(bits(found)[number], bits(expected)[number])


@pytest.mark.parametrize("dtype", HALVES)
def test_one_times_any_half_is_that_half(isa: str, dtype: torch.dtype) -> None:
    x = every_pattern(dtype)[None]
    for out in (dtype, torch.float32, torch.float64):
        (found,) = fused.apply_row(ONCE, x=x, dtypes=[out])
        assert_same_bits(found, x.to(out))


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_is_rounded_to_nearest_even_halves(isa: str, dtype: torch.dtype) -> None:
    halves = every_pattern(dtype).float()
    finite = halves[halves.isfinite()].sort().values
    between = (finite[1:] + finite[:-1]) / 2  # ties
    up, down = (torch.nextafter(between, torch.tensor(sign * torch.inf)) for sign in (1, -1))
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([halves, between, up, down, nan, torch.tensor([3.4e38, -3.4e38, 65519.0, 65520.0])])[None]
    (found,) = fused.apply_row(ONCE, x=x, dtypes=[dtype])
    assert_same_bits(found, x.to(dtype))


def test_a_coefficient_of_minus_zero_keeps_its_sign(isa: str) -> None:
    x, m = torch.ones(2, 1, 131)
    (found,) = fused.apply_row(rows.Row((rows.Out(x=-0.0),)), x=x)
    assert torch.equal(bits(found), bits(-torch.zeros_like(x)))
    (found,) = fused.apply_row(rows.Row((rows.Out(x=-0.0, m=-0.0),)), x=x, m=m)
    assert torch.equal(bits(found), bits(-torch.zeros_like(x)))


@pytest.mark.parametrize("dtype, lower", [(torch.float32, torch.bfloat16), *((d, d) for d in [torch.float32, *HALVES])])
def test_a_pass_of_any_length_writes_its_elements_and_no_others(
    isa: str, dtype: torch.dtype, lower: torch.dtype
) -> None:
    longest = 330
    x, y = torch.randn(2, longest).to(dtype)
    m, u = torch.randn(2, longest).to(lower)
    row = rows.Row((rows.Out(y=0.5, x=0.25, m=-1.5, h=(2.0,), z=0.5), rows.Out(y=1.0)), (0.7, -0.3), (-1.0, 1.0), 3.0)

    def apply(n: int, outs: tuple[Tensor, Tensor]) -> None:
        fused.apply_row(row, x=x[None, :n], m=m[None, :n], m_uncond=u[None, :n], h=[y[None, :n]], noise=NOISE, out=outs)

    whole = (torch.empty(1, longest, dtype=dtype), torch.empty(1, longest, dtype=dtype))
    apply(longest, whole)
    for n in [*range(1, 70), 127, 128, 129, 255, 257, 319]:
        buffers = [torch.full((longest + 2,), 7.0, dtype=dtype) for _ in range(2)]
        apply(n, (buffers[0][None, 1 : n + 1], buffers[1][None, 1 : n + 1]))  # from an unaligned element on
        for buffer, expected in zip(buffers, whole, strict=True):
            assert torch.equal(buffer[1 : n + 1], expected[0, :n])
            assert (buffer[0] == 7.0) and (buffer[n + 1 :] == 7.0).all()


def test_two_outputs_over_their_inputs_read_before_they_write(isa: str) -> None:
    x, m = torch.randn(2, 3, 1000)
    row = rows.Row((rows.Out(x=0.5, m=1.0), rows.Out(x=-1.0, m=0.25)))
    expected = fused.apply_row(row, x=x, m=m)
    found = fused.apply_row(row, x=x, m=m, out=(x, m))
    assert found[0] is x and torch.equal(x, expected[0]) and torch.equal(m, expected[1])


def last_cache() -> int:
    """Bytes of the cache that the cores share, or what the kernels take it to be where Linux does not say."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(size.read_text().rstrip("K\n")) << 10 if size.exists() else 32 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_larger_than_the_cache_hold_the_bits_of_small_ones(isa: str, dtype: torch.dtype) -> None:
    if last_cache() > 64 << 20:
        pytest.skip(f"arrays larger than a cache of {last_cache() >> 20} MiB")
    n = last_cache() // (2 * dtype.itemsize) + 4097
    x = torch.arange(n, dtype=dtype).sin_()[None]
    row = rows.Row((rows.Out(x=0.5), rows.Out(x=-2.0)))
    buffers = [torch.full((n + 2,), 7.0, dtype=dtype) for _ in range(2)]
    for first in range(3):  # the elements before and after are not the pass's; at 0 whole vectors are aligned
        outs = [buffer[None, first : first + n] for buffer in buffers]
        fused.apply_row(row, x=x, out=outs)
        assert torch.equal(outs[0], 0.5 * x) and torch.equal(outs[1], -2.0 * x)
        for buffer in buffers:
            assert (buffer[:first] == 7.0).all() and (buffer[first + n :] == 7.0).all()
            buffer.fill_(7.0)
    kept = x.clone()
    fused.apply_row(row, x=x, out=(x, buffers[1][None, :n]))  # one output streamed, the other its input
    assert torch.equal(x, 0.5 * kept) and torch.equal(buffers[1][None, :n], -2.0 * kept)


@pytest.mark.parametrize("uniform", [False, True])
def test_noise_alone_is_the_noise_of_a_row_with_other_terms(isa: str, uniform: bool) -> None:
    for n in (1, 4, 10, 100, 8192, 8196, 16390, 16396):
        buffer = torch.full((3, n + 5), 7.0)  # samples apart in memory
        options = {"noise": NOISE, "uniform": uniform}
        fused.apply_row(rows.Row((rows.Out(z=1.0),)), out=buffer[:, :n], size=(3, n), device=buffer.device, **options)
        (expected,) = fused.apply_row(rows.Row((rows.Out(x=1.0, z=1.0),)), x=torch.zeros(3, n), **options)
        assert torch.equal(buffer[:, :n], expected)
        assert (buffer[:, n:] == 7.0).all()


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


MEMORY_ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": channels_last,
    "cropped channels_last": lambda t: channels_last(torch.cat([t, t[..., :3, :]], 2))[..., : t.shape[2], :],
    "narrowed channels_last": lambda t: channels_last(torch.cat([t, t[..., :1]], 3))[..., : t.shape[3]],
    "width first": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "height first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("order", MEMORY_ORDERS)
@pytest.mark.parametrize("uniform", [False, True])
def test_noise_in_any_order_of_memory_is_that_of_the_element(isa: str, order: str, uniform: bool) -> None:
    sizes = [(1, 6, 6), (3, 36, 40), (4, 64, 64), (5, 7, 9), (17, 12, 20), (64, 4, 5), (65, 12, 12), (320, 7, 8)]
    for channels, height, width in [*sizes, (2050, 2, 6)]:
        shape = (2, channels, height, width)
        row = rows.Row((rows.Out(z=1.0),))
        options = {"noise": NOISE, "size": shape, "device": torch.device("cpu"), "uniform": uniform}
        (expected,) = fused.apply_row(row, dtypes=[torch.float32], **options)
        out = MEMORY_ORDERS[order](torch.full(shape, torch.nan))
        fused.apply_row(row, out=out, **options)
        assert torch.equal(out, expected)


def test_a_loss_over_channels_last_draws_the_same_noise(isa: str) -> None:
    x, m = torch.randn(2, 2, 3, 36, 80)
    losses = [
        gk.ops.path_loss(layout(m), layout(x), x_coef=1.0, noise_coef=-1.0, noise=NOISE, reduction="none")
        for layout in (torch.Tensor.contiguous, channels_last)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)  # summed in the order of memory
