"""Strides, sizes and outputs change no result. The three ways in which a row arrives give the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases import NOISE
from torch import Tensor

import genkern as gk
from genkern import fused, rows

SHAPE = (3, 4, 5, 6)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda t: torch.cat([t, t], dim=3)[..., :6],
    "every other": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
    "unaligned": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
    "expanded": lambda t: t,
}


def every_op(x: Tensor, m: Tensor) -> list[Tensor]:
    scale = torch.linspace(0.1, 0.5, x.shape[0], device=x.device)
    return [
        gk.ops.euler_step(x, m, 0.25),
        gk.ops.heun_step(x, m, x, scale),
        *gk.ops.add_noise(x, scale, 0.5, noise=NOISE, return_noise=True),
        *gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6, eta=0.5, noise=NOISE, clip=1.0, return_pred=True),
        gk.ops.path_loss(m, x, x_coef=1.0, noise_coef=-1.0, noise=NOISE, reduction="none"),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_neither_noise_nor_result(
    layout: str, dtype: torch.dtype, device: torch.device, path: str
) -> None:
    x, m = torch.randn(2, *SHAPE, device=device).to(dtype)
    if layout == "expanded":
        x, m = x[:, :1].expand(SHAPE), m[..., :1].expand(SHAPE)
    expected = every_op(x.contiguous(), m.contiguous())
    for laid_x, laid_m in ((LAYOUTS[layout](x), m), (x, LAYOUTS[layout](m)), (LAYOUTS[layout](x), LAYOUTS[layout](m))):
        *maps, loss = every_op(laid_x, laid_m)
        for found, wanted in zip(maps, expected[:-1], strict=True):
            assert torch.equal(found, wanted)
            assert found.stride() == torch.empty_like(laid_x).stride()
        torch.testing.assert_close(loss, expected[-1], rtol=1e-5, atol=0)  # sums may run in the order of memory


@pytest.mark.parametrize(
    "shape", [(0,), (0, 3), (2, 0), (1,), (1, 1), (5,), (3, 7), (2, 33), (1, 1027), (2, 3, 1, 1, 1, 2)]
)
def test_any_size(shape: tuple[int, ...], device: torch.device, path: str) -> None:
    x, m = torch.randn(2, *shape, device=device)
    torch.testing.assert_close(gk.ops.euler_step(x, m, 0.5), x + 0.5 * m)
    z = gk.ops.randn(shape, noise=NOISE, device=device)
    torch.testing.assert_close(gk.ops.add_noise(x, 0.5, 0.5, noise=NOISE), 0.5 * x + 0.5 * z)
    loss = gk.ops.path_loss(m, x, x_coef=1.0)
    by_sample = (m - x).reshape(shape[0], -1).square() if x.numel() else torch.zeros(shape[0], 1, device=device)
    torch.testing.assert_close(loss, by_sample.mean(1).sum() / max(shape[0], 1))


def test_out_in_place(device: torch.device, dtype: torch.dtype, path: str) -> None:
    x, m, u = torch.randn(3, *SHAPE, device=device).to(dtype)
    expected = gk.ops.heun_step(x, m, u, 0.5)
    for target in ("x", "m", "u"):
        given = {"x": x.clone(), "m": m.clone(), "u": u.clone()}
        found = gk.ops.heun_step(given["x"], given["m"], given["u"], 0.5, out=given[target])
        assert found is given[target] and torch.equal(found, expected)


def test_out_into_a_view_and_into_two_outputs(device: torch.device, path: str) -> None:
    x = torch.randn(SHAPE, device=device)
    buffer = torch.full((3, 12, 5, 6), 7.0, device=device)
    pair = (buffer[:, 1:5], buffer[:, 6:10])  # interleaved in memory, yet apart
    assert gk.ops.add_noise(x, 0.5, 0.5, noise=NOISE, return_noise=True, out=pair) == pair
    expected = gk.ops.add_noise(x, 0.5, 0.5, noise=NOISE, return_noise=True)
    assert torch.equal(pair[0], expected[0]) and torch.equal(pair[1], expected[1])
    assert (buffer[:, [0, 5, 10, 11]] == 7.0).all()


def test_out_of_randn(device: torch.device, dtype: torch.dtype, path: str) -> None:
    out = torch.empty(2, 5, 3, device=device, dtype=dtype).transpose(1, 2)
    assert gk.ops.randn((2, 3, 5), noise=NOISE, out=out) is out
    assert torch.equal(out, gk.ops.randn((2, 3, 5), noise=NOISE, device=device, dtype=dtype))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("clip, return_pred", [(None, False), (None, True), ((-0.5, 0.7), True)])
def test_the_three_ways_of_a_row_give_the_same_bits(
    prediction: str,
    clip: tuple[float, float] | None,
    return_pred: bool,
    device: torch.device,
    dtype: torch.dtype,
    path: str,
) -> None:
    x, m, u = torch.randn(3, *SHAPE, device=device).to(dtype)
    numbers = (0.6, 0.8, 0.8, 0.6, 0.5)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32

    def apply(row: fused.AnyRow) -> tuple[Tensor, ...]:
        return fused.apply_row(row, x=x, m=m, m_uncond=u, noise=NOISE)

    def row(guidance: object, *path: object) -> rows.DDIMRow:
        return rows.DDIMRow(prediction, *path, clip=clip, guidance=guidance, return_pred=return_pred)

    host = row(2.5, *numbers)
    expected = apply(host)
    for length in (1, SHAPE[0]):  # by tensors, one number or one a sample
        w, *values = (torch.full((length,), value, dtype=torch.float64, device=device) for value in (2.5, *numbers))
        for found, wanted in zip(apply(row(w, *values)), expected, strict=True):
            assert torch.equal(found, wanted)
    table, use_pred = rows.host_table([row(0.0, *numbers), host])
    cells = torch.tensor(table, dtype=arithmetic, device=device)
    for index in (torch.tensor([1], device=device), torch.ones(SHAPE[0], dtype=torch.int64, device=device)):
        for found, wanted in zip(apply(rows.RowTable(cells, len(expected), index, use_pred)), expected, strict=True):
            assert torch.equal(found, wanted)
    for found, wanted in zip(apply(rows.RowTable(cells[1:], len(expected), None, use_pred)), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_table_gives_each_sample_its_row(device: torch.device, path: str) -> None:
    x, m = torch.randn(2, *SHAPE, device=device)
    dts = (0.1, -0.2, 0.3)
    lines, use_pred = rows.host_table([rows.Row((rows.Out(x=1.0, m=dt),)) for dt in dts])
    table = torch.tensor(lines, dtype=torch.float32, device=device)
    index = torch.tensor([2, 0, 2], device=device)
    (found,) = fused.apply_row(rows.RowTable(table, 1, index, use_pred), x=x, m=m)
    assert torch.equal(found, gk.ops.euler_step(x, m, torch.tensor(dts, device=device)[index]))
