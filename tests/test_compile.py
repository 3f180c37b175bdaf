"""torch.compile(fullgraph=True), torch.export, fake tensors and torch.library.opcheck."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import CASES, LOSSES, NOISE, SHAPE, Case, arrays
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import genkern as gk
from genkern import rows


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_ops_give_the_same_bits_and_gradients(case: Case, kernels: None) -> None:
    given = {k: t.requires_grad_() for k, t in arrays(case, torch.device("cpu"), torch.float32).items()}
    options = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in case.options.items()}
    leaves = [*given.values(), *(v for v in options.values() if isinstance(v, Tensor))]

    def run(given: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
        found = getattr(gk.ops, case.op)(**given, **options)
        return found if isinstance(found, tuple) else (found,)

    eager, traced = run(given, options), compiled(run)(given, options)
    for found, expected in zip(traced, eager, strict=True):
        assert torch.equal(found, expected)
    upstream = [torch.randn_like(t) for t in eager]
    expected_grads = torch.autograd.grad(eager, leaves, upstream)
    for found, expected in zip(torch.autograd.grad(traced, leaves, upstream), expected_grads, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", LOSSES)
def test_compiled_losses_give_the_same_gradients(options: dict[str, Any], kernels: None) -> None:
    m, x = torch.randn(2, *SHAPE)
    m.requires_grad_()

    def run(m: Tensor, x: Tensor) -> Tensor:
        return gk.ops.path_loss(m, x, **options).sum()

    eager, traced = run(m, x), compiled(run)(m, x)
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(*(torch.autograd.grad(loss, m)[0] for loss in (traced, eager)))


def test_ops_compile_with_inductor(kernels: None) -> None:
    def step(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
        x_t = gk.ops.add_noise(x.transpose(1, 2), t, 0.5, noise=NOISE)
        return gk.ops.euler_step(x_t, v.transpose(1, 2), t)

    x, v = torch.randn(2, *SHAPE)
    t = torch.rand(SHAPE[0])
    found, expected = compiled(step, "inductor")(x, v, t), step(x, v, t)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize("length", [1, SHAPE[0]])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_new_value_of_a_tensor_coefficient_is_no_new_graph(length: int, gradients: bool, kernels: None) -> None:
    def step(x: Tensor, m: Tensor, dt: Tensor, alpha: Tensor) -> Tensor:
        x = gk.ops.euler_step(x, m, dt)
        return gk.ops.ddim_step(x, m, alpha, 0.8, 0.9, 0.4, eta=alpha * 0.1, noise=NOISE, clip=1.0)

    counter = CompileCounterWithBackend("aot_eager")
    traced = compiled(step, counter)
    x, m = torch.randn(2, *SHAPE)
    for value in (0.3, 0.5, 0.7):
        values = [torch.full((length,), v, requires_grad=gradients) for v in (value, value + 0.1)]
        found = traced(x, m, *values)
        torch.testing.assert_close(found, step(x, m, *values))
        if gradients:
            found.sum().backward()
    assert counter.frame_count == 1


def test_a_new_seed_in_a_tensor_is_no_new_graph(kernels: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    traced = compiled(lambda x, seed: gk.ops.add_noise(x, 0.5, 0.5, noise=gk.Noise(seed=seed)), counter)
    x = torch.randn(SHAPE)
    for seed in (1, 2, 3):
        expected = gk.ops.add_noise(x, 0.5, 0.5, noise=gk.Noise(seed=seed))
        assert torch.equal(traced(x, torch.tensor([seed])), expected)
    assert counter.frame_count == 1


def test_fresh_noise_compiles_and_follows_manual_seed(kernels: None) -> None:
    traced = compiled(lambda x: gk.ops.add_noise(x, 0.5, 0.5))
    x = torch.randn(SHAPE)

    def seeded() -> Tensor:
        torch.manual_seed(3)
        return traced(x)

    first, second = seeded(), traced(x)
    assert torch.equal(first, seeded()) and not torch.equal(first, second)


def test_fresh_noise_is_a_value_under_compile(kernels: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor) -> Tensor:
        noise = gk.Noise.fresh()
        times = gk.ops.uniform((x.shape[0],), noise=noise.at(gk.noise.Purpose.TIMES))
        return gk.ops.add_noise(x, times, 0.5, noise=noise)

    traced = compiled(step, counter)
    x = torch.randn(SHAPE)
    torch.manual_seed(3)
    eager = [step(x) for _ in range(2)]
    torch.manual_seed(3)
    assert all(torch.equal(traced(x), expected) for expected in eager)
    assert counter.frame_count == 1


def test_out_compiles(kernels: None) -> None:
    def step(x: Tensor, v: Tensor) -> Tensor:
        return gk.ops.euler_step(x, v, 0.5, out=torch.empty_like(x)) + 1.0

    x, v = torch.randn(2, *SHAPE)
    assert torch.equal(compiled(step)(x, v), step(x, v))


def test_dynamic_shapes_compile_once(kernels: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(lambda x, v, dt: gk.ops.euler_step(x, v, dt), fullgraph=True, dynamic=True, backend=counter)
    for batch in (3, 5, 9):
        x, v, dt = torch.randn(batch, 6), torch.randn(batch, 6), torch.rand(batch)
        assert torch.equal(traced(x, v, dt), gk.ops.euler_step(x, v, dt))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, kernels: None) -> None:
    class Step(torch.nn.Module):
        def forward(self, x: Tensor, m: Tensor, alpha: Tensor, seed: Tensor) -> Tensor:
            noise = gk.Noise(seed=seed)
            x = gk.ops.ddim_step(x, m, alpha, 0.8, 0.9, 0.4, eta=0.5, noise=noise, clip=1.0)
            return gk.ops.path_loss(m, x, x_coef=alpha)

    x, m = torch.randn(2, *SHAPE)
    first, second = ((x, m, torch.full((SHAPE[0],), a), torch.tensor([s])) for a, s in ((0.5, 1), (0.7, 2)))
    program = torch.export.export(Step(), first, strict=strict)
    torch.testing.assert_close(program.module()(*second), Step()(*second))


def test_fake_tensors_have_the_strides_of_the_real_ones(kernels: None) -> None:
    x = torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    m = torch.randn(2, 4, 3, 5).bfloat16()
    real = (
        *gk.ops.add_noise(x, 0.5, 0.5, noise=NOISE, return_noise=True),
        gk.ops.euler_step(x.transpose(1, 2), m.transpose(1, 2), 0.1),
    )
    with torch._subclasses.FakeTensorMode() as mode:
        x, m = mode.from_tensor(x), mode.from_tensor(m)
        fake = (
            *gk.ops.add_noise(x, 0.5, 0.5, noise=NOISE, return_noise=True),
            gk.ops.euler_step(x.transpose(1, 2), m.transpose(1, 2), 0.1),
        )
    for found, expected in zip(fake, real, strict=True):
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


def _calls(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    x, m, u, h, z = torch.randn(5, *SHAPE, device=device).to(dtype)
    number = rows.pack(
        rows.Row((rows.Out(y=0.5, x=1.0, m=0.3, h=(0.2,)), rows.Out(y=1.0)), (0.4, 0.6), (-1.0, 1.0), 2.0)
    )
    value = torch.rand(SHAPE[0], device=device)
    ids = torch.arange(SHAPE[0], device=device)
    key = torch.tensor([5, 6, 0], device=device)
    line = rows.pack(rows.Row((rows.Out(x=0.5, m=0.2, z=0.1),))).row
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.tensor([line, line], dtype=wide, device=device)
    index = torch.tensor([1], device=device)
    ddim = rows.pack(rows.DDIMRow("v", value, 0.8, 0.8, 0.6, 0.5))
    none: tuple[Any, ...] = (None, None, [], [], [], 0)
    return {
        "guided": (x, m, u, [h], None, number.row, *none, 0, [], None, None, True),
        "drawn": (
            x,
            m,
            None,
            [],
            None,
            line,
            None,
            None,
            [value],
            [rows.out_cell(0, rows.M)],
            [0.5],
            0,
            1,
            [1, 2, 3],
            key,
            ids,
            False,
        ),
        "given": (x, m, None, [], z, [], table, index, [], [], [], 0, 0, [], None, None, False),
        "formula": (x, m, None, [], z, ddim.row, None, None, [value], ddim.cells, [1.0], 2, 0, [], None, None, False),
    }


@pytest.mark.parametrize("name", ["guided", "drawn", "given", "formula"])
def test_opcheck(name: str, device: torch.device, dtype: torch.dtype, kernels: None) -> None:
    gk.ops.randn((1,), noise=NOISE)  # loads the library and its fake implementations
    call = _calls(device, dtype)[name]
    outs = [3, 0] if name == "guided" else [2]
    torch.library.opcheck(torch.ops.genkern.map, (*call, outs))
    targets = [torch.empty(SHAPE, device=device, dtype=dtype) for _ in outs]
    torch.library.opcheck(torch.ops.genkern.map_out, (*call, targets))
    if name != "guided":
        mask = torch.rand(SHAPE, device=device) > 0.5
        for kind in (0, 1):
            torch.library.opcheck(torch.ops.genkern.reduce, (*call, mask, kind))


def test_opcheck_of_a_row_of_noise_alone(device: torch.device, kernels: None) -> None:
    row = rows.pack(rows.Row((rows.Out(z=1.0),))).row
    gk.ops.randn((1,), noise=NOISE)
    call = (None, None, None, [], None, row, None, None, [], [], [], 0, 1, [1, 2, 3], None, None, False, [0])
    torch.library.opcheck(torch.ops.genkern.map, (*call, [2, 3], device))
