"""What is not plain goes its own way past or through torch's dispatcher: results, errors, versions, references."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from eager_ways import FUNCTIONS, connected, pair, slow, taken
from op_cases import NOISE
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import genkern as gk
from genkern import calls, eager, fused, rows, spec

pytestmark = connected


class Logged(TorchDispatchMode):
    """Notes which ops a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


class Watched(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


class Tagged(torch.Tensor):
    pass


def test_a_dispatch_mode_sees_the_op_and_a_function_mode_is_respected() -> None:
    x, v = pair()
    with Logged() as mode:
        assert taken(lambda: gk.ops.euler_step(x, v, 0.25)) == 0
    assert any("genkern" in name for name in mode.seen)
    with Watched():
        assert taken(lambda: gk.ops.euler_step(x, v, 0.25)) == 0


def test_fake_tensors_stay_fake() -> None:
    with FakeTensorMode():
        x, v = pair()
        found = []
        assert taken(lambda: found.append(gk.ops.euler_step(x, v, 0.25))) == 0
        assert type(found[0]).__name__ == "FakeTensor"
        out, transposed = torch.empty_like(x), torch.randn(4, 3).T
        assert gk.ops.euler_step(x, v, torch.ones(3), out=out) is out
        assert gk.ops.euler_step(transposed, v, 0.25, out=out) is out


def test_transforms_of_torch_func_go_their_own_way() -> None:
    x, v = pair((5, 3, 4))
    wanted = x + 0.25 * v
    step = lambda x, v: gk.ops.euler_step(x, v, 0.25)  # noqa: E731
    found = []
    assert taken(lambda: found.append(torch.vmap(step)(x, v))) == 0
    torch.testing.assert_close(found.pop(), wanted)
    assert taken(lambda: found.append(torch.func.jvp(step, (x, v), (v, x)))) == 0
    torch.testing.assert_close(found.pop()[1], v + 0.25 * x)
    loss = lambda m: gk.ops.path_loss(m, x, x_coef=1.0, reduction="sum")  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(v), 2 * (v - x) / 12)
    with torch.autograd.forward_ad.dual_level():
        assert taken(lambda: step(x, v)) == 0


def test_a_tracer_records_the_op() -> None:
    x, v = pair()
    traced = torch.jit.trace(lambda x, v: gk.ops.euler_step(x, v, 0.25), (x, v), check_trace=False)
    torch.testing.assert_close(traced(2 * x, v), 2 * x + 0.25 * v)


def test_a_view_that_is_to_be_negated_is_read_as_its_value() -> None:
    negated = torch.complex(torch.zeros(3, 4), torch.ones(3, 4)).conj().imag
    assert negated.is_neg()
    assert torch.equal(gk.ops.euler_step(negated, torch.zeros(3, 4), 1.0), -torch.ones(3, 4))


def test_zeros_without_memory_are_zeros() -> None:
    x = torch.randn(3, 4)
    zeros = torch._efficientzerotensor((3, 4))
    assert taken(lambda: torch.testing.assert_close(gk.ops.euler_step(x, zeros + 0.0, 1.0), x)) <= 1


def test_a_subclass_keeps_its_own_way_and_a_parameter_is_plain() -> None:
    x, v = pair()
    tagged = x.as_subclass(Tagged)
    assert taken(lambda: gk.ops.euler_step(tagged, v, 0.25)) == 0
    torch.testing.assert_close(gk.ops.euler_step(tagged, v, 0.25).as_subclass(torch.Tensor), x + 0.25 * v)
    assert taken(lambda: gk.ops.euler_step(torch.nn.Parameter(x), v, 0.25)) == 1


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, which stands for another."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        found: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map_only(cls, lambda t: t.inner, args), **kwargs or {})


STEPS = torch.tensor([0.5, 0.25, -1.0])
BY_SAMPLE: dict[str, Callable[[Tensor, Tensor, Any], Any]] = {
    "linear": lambda x, v, c: gk.ops.euler_step(x, v, c),
    "linear into x": lambda x, v, c: gk.ops.euler_step(x, v, c, out=x),
    "drawn": lambda x, v, c: gk.ops.add_noise(x, 0.5, c * c, noise=NOISE),
    "of a path": lambda x, v, c: gk.ops.ddim_step(x, v, c * c, 0.8, 0.8, 0.6, prediction="v"),
    "summed": lambda x, v, c: gk.ops.path_loss(v, x, x_coef=c),
}


@pytest.mark.parametrize("op", BY_SAMPLE)
def test_coefficients_without_memory_are_asked_for_their_values(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, v = pair()
    wanted = BY_SAMPLE[op](x.clone(), v, STEPS)
    monkeypatch.setattr(Wrapped, "__mul__", lambda self, other: Wrapped(self.inner * other.inner))
    torch.testing.assert_close(BY_SAMPLE[op](x, v, Wrapped(STEPS)), wanted)


def test_coefficients_of_a_fake_mode_that_has_ended_are_an_error() -> None:
    x, v = pair()
    with FakeTensorMode():
        steps = torch.ones(3)
    for run in (lambda: gk.ops.euler_step(x, v, steps), lambda: gk.ops.path_loss(v, x, x_coef=steps)):
        with pytest.raises((RuntimeError, AssertionError), match=".+"):
            run()


def test_the_kernels_refuse_coefficients_without_memory() -> None:
    x, v = pair()
    row, tensors = fused.prepared(rows.Row((rows.Out(x=1.0, m=STEPS),)), None, x, 0, (x.dtype,))
    given = [x, v, *tensors[2:-1], Wrapped(STEPS)]
    with pytest.raises((RuntimeError, ValueError), match="values: expected a tensor with memory"):
        calls.run_numbers(spec.numbers(row), (torch.empty_like(x),), given)


def test_an_output_over_coefficients_is_refused() -> None:
    buffer = torch.arange(1.0, 10.0)
    x, v, before = torch.zeros(8), torch.ones(8), buffer.clone()
    for out in (buffer[1:], buffer[:8]):
        for run in (
            lambda out: gk.ops.euler_step(x, v, buffer[:8], out=out),
            lambda out: gk.ops.add_noise(x, 0.5, buffer[:8], noise=v, out=out),
            lambda out: gk.ops.ddim_step(x, v, 1.0, 0.5, buffer[:8], 0.5, out=out),
        ):
            for way in (lambda what: what(), slow):
                with pytest.raises(ValueError, match="out: expected memory apart from a coefficient, got an overlap"):
                    way(lambda run=run, out=out: run(out))
                assert torch.equal(buffer, before)
    assert taken(lambda: gk.ops.euler_step(x[:4], v[:4], buffer[:4], out=buffer[4:8])) == 1
    torch.testing.assert_close(buffer[4:8], before[:4])
    columns = torch.arange(12.0).reshape(3, 4)
    gk.ops.euler_step(torch.zeros(3, 3), torch.ones(3, 3), columns[:, 0], out=columns[:, 1:])  # read as a copy
    torch.testing.assert_close(columns, columns[:, :1].expand(3, 4))
    halves = torch.arange(4.0, dtype=torch.float16)
    gk.ops.euler_step(torch.zeros_like(halves), torch.ones_like(halves), halves, out=halves)  # as well
    assert halves.tolist() == [0.0, 1.0, 2.0, 3.0]


@connected
def test_a_loss_whose_coefficient_lies_in_the_state_is_one_eager_call() -> None:
    x, m = torch.randn(4, 8), torch.randn(4, 8)
    found = []
    assert taken(lambda: found.append(gk.ops.path_loss(m, x, x_coef=x.view(-1)[:4]))) == 1
    assert torch.equal(found[0], gk.ops.path_loss(m, x, x_coef=x.view(-1)[:4].clone()))


def test_an_output_over_a_table_is_refused() -> None:
    table = torch.zeros(1, rows.n_cells(1))
    table[0, rows.W], table[0, rows.out_cell(0, rows.X)] = 1.0, 2.0
    before, x, out = table.clone(), torch.ones(8), table.view(-1)[:8]
    with pytest.raises(ValueError, match="out: expected memory apart from the table, got an overlap"):
        fused.apply_row(rows.RowTable(table, 1), x=x, out=out)
    row, tensors = fused.prepared(rows.RowTable(table, 1), None, x, 0, (x.dtype,))
    with pytest.raises((RuntimeError, ValueError), match="out: expected memory apart from table"):
        calls.run_numbers(spec.numbers(row), (out,), [x, *tensors[1:]])
    assert torch.equal(table, before)


def test_a_laid_out_call_refuses_an_output_over_its_coefficients_or_its_mask() -> None:
    buffer = torch.arange(1.0, 9.0)
    x, v, before = torch.zeros(8), torch.ones(8), buffer.clone()
    row, tensors = fused.prepared(rows.Row((rows.Out(x=1.0, m=buffer),)), None, x, 0, (x.dtype,))
    with pytest.raises((RuntimeError, ValueError), match="out: expected memory apart from values"):
        calls.run_numbers(spec.numbers(row), (buffer,), [x, v, *tensors[2:]])
    assert torch.equal(buffer, before)
    blended = rows.Elementwise(known=((1.0, 0.0),))
    row, tensors = fused.prepared(rows.Row((rows.Out(x=1.0),), elementwise=blended), None, x[:4], 0, (x.dtype,))
    given = [x[:4], *tensors[1:]]
    given[spec.KNOWN], given[spec.MASK] = v[:4], buffer[:7:2]
    assert not calls.run_ready(spec.numbers(row), (buffer[1:8:2],), given)


UNUSUAL: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "another shape": lambda x, v: gk.ops.euler_step(x, v[:, :3], 0.25),
    "another dtype": lambda x, v: gk.ops.euler_step(x, v.double(), 0.25),
    "integers": lambda x, v: gk.ops.euler_step(x, v.long(), 0.25),
    "0-d": lambda x, v: gk.ops.euler_step(x[0, 0], v[0, 0], 0.25),
    "not finite": lambda x, v: gk.ops.euler_step(x, v, float("nan")),
    "coefficients of another batch": lambda x, v: gk.ops.heun_step(x, v, v, torch.ones(2)),
    "no guidance scale": lambda x, v: gk.ops.euler_step(x, v, 0.25, uncond=v),
    "too large an eta": lambda x, v: gk.ops.ddim_step(x, v, 0.6, 0.8, 0.8, 0.6, eta=5.0, noise=NOISE),
    "no data in the state": lambda x, v: gk.ops.ddim_step(x, v, 0.0, 1.0, 0.8, 0.6),
    "out of another shape": lambda x, v: gk.ops.euler_step(x, v, 0.25, out=v[:2]),
    "out of another dtype": lambda x, v: gk.ops.euler_step(x, v, 0.25, out=v.half()),
    "out that overlaps": lambda x, v: gk.ops.euler_step(x[1:], v[1:], 0.25, out=x[:-1]),
    "out that interleaves": lambda x, v: gk.ops.euler_step(x[:, :2], v[:, :2], 0.25, out=x[:, 1:3]),
    "out that is expanded": lambda x, v: gk.ops.euler_step(x, v, 0.25, out=x[:1].expand(3, 4)),
    "one out for two": lambda x, v: gk.ops.add_noise(x, 1.0, 1.0, noise=NOISE, return_noise=True, out=(x, x)),
    "out under grad mode": lambda x, v: gk.ops.euler_step(x.requires_grad_(), v, 0.25, out=torch.empty_like(v)),
    "a leaf as out": lambda x, v: gk.ops.euler_step(x, v, 0.25, out=torch.empty_like(v).requires_grad_()),
    "sample ids of another batch": lambda x, v: gk.ops.add_noise(
        x, 1.0, 1.0, noise=gk.Noise(seed=0, sample_ids=torch.arange(2))
    ),
    "a negative size": lambda x, v: gk.ops.randn((3, -1), noise=NOISE),
    "no dimension": lambda x, v: gk.ops.randn((), noise=NOISE),
    "noise that is none": lambda x, v: gk.ops.randn((3,), noise=3),  # type: ignore[arg-type]
    "an integer dtype": lambda x, v: gk.ops.randn((3,), noise=NOISE, dtype=torch.int64),
    "a mask of another shape": lambda x, v: gk.ops.path_loss(v, x, x_coef=1.0, mask=torch.ones(3, 3).bool()),
    "a loss of another shape": lambda x, v: gk.ops.path_loss(v[:, :3], x, x_coef=1.0),
}


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_an_error_is_worded_the_same_and_nothing_is_written(unusual: str) -> None:
    x, v = pair()
    before, version = (x.clone(), v.clone()), x._version

    def message() -> tuple[type, str]:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
            UNUSUAL[unusual](x, v)
        x.requires_grad_(False)
        return raised.type, str(raised.value)

    assert message() == slow(message)
    assert x._version == version
    assert torch.equal(x, before[0])
    assert torch.equal(v, before[1])


TAKEN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "into x": lambda x, v: gk.ops.euler_step(x, v, 0.25, out=x),
    "into v": lambda x, v: gk.ops.euler_step(x, v, 0.25, out=v),
    "into columns": lambda x, v: gk.ops.euler_step(x[:, :2], v[:, :2], 0.25, out=x[:, :2]),
    "into rows apart": lambda x, v: gk.ops.euler_step(x[:1], v[:1], 0.25, out=x[2:]),
    "two outputs": lambda x, v: gk.ops.add_noise(x, 0.5, 0.5, noise=NOISE, return_noise=True, out=(x, v)),
    "normals": lambda x, v: gk.ops.randn(x.shape, noise=NOISE, out=x),
}


@pytest.mark.parametrize("where", TAKEN)
def test_given_outputs_are_written_and_their_versions_counted(where: str) -> None:
    x, v = pair()
    x_slow, v_slow = x.clone(), v.clone()
    slow(lambda: TAKEN[where](x_slow, v_slow))
    versions = x._version, v._version
    assert taken(lambda: TAKEN[where](x, v)) == 1
    assert torch.equal(x, x_slow)
    assert torch.equal(v, v_slow)
    assert (x._version - versions[0], v._version - versions[1]) == (x_slow._version, v_slow._version)


def test_autograd_notices_a_saved_tensor_that_an_output_wrote_over() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = x * 1.0
    z = y.square()
    with torch.no_grad():
        assert taken(lambda: gk.ops.euler_step(y, y, 1.0, out=y)) == 1
    with pytest.raises(RuntimeError, match="inplace"):
        z.sum().backward()


def test_what_the_host_does_not_know_takes_the_other_way() -> None:
    x, _ = pair()
    cases: list[Callable[[], Tensor]] = [
        lambda: gk.ops.add_noise(x, 0.6, 0.8, noise=gk.Noise(seed=torch.tensor(5))),
        lambda: gk.ops.add_noise(x, 0.6, 0.8, noise=gk.Noise(seed=5, sample_ids=[4, 5, 6])),
        lambda: gk.ops.euler_step(x, x, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float16)),
    ]
    for run in cases:
        assert torch.equal(run(), slow(run))
    ids = gk.Noise(seed=5, sample_ids=torch.tensor([4, 5, 6]))
    found = gk.ops.add_noise(x, 0.6, 0.8, noise=ids)
    assert torch.equal(found, cases[1]())
    assert torch.equal(gk.ops.add_noise(x, 0.6, 0.8, noise=gk.Noise(seed=5)), cases[0]())


def test_inference_mode_and_no_grad_record_nothing() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with torch.no_grad():
        assert not gk.ops.euler_step(x, x, 0.25).requires_grad
    with torch.inference_mode():
        found = []
        assert taken(lambda: found.append(gk.ops.euler_step(x, x, 0.25))) == 1
        assert found[0].is_inference()


def test_a_row_laid_out_before_is_applied_as_text_and_as_bytes() -> None:
    x, v = pair()
    row, tensors = fused.prepared(rows.Row((rows.Out(x=1.0, m=0.25),)), None, x, 0, (x.dtype,))
    given = [x, v, *tensors[2:]]
    out, other = torch.empty_like(x), torch.empty_like(x)
    assert taken(lambda: calls.run_numbers(spec.numbers(row), (out,), given)) == 1
    assert eager.face.map_numbers(spec.packed(row), (other,), tuple(given)) is True
    assert torch.equal(out, gk.ops.euler_step(x, v, 0.25))
    assert torch.equal(out, other)
    assert eager.face.map_numbers(b"short", (out,), given) is None
    assert eager.face.map_numbers(spec.numbers(row), (out[:2],), given) is None
    assert eager.face.map_numbers(spec.numbers(row), (out,), given[:3]) is None


def test_what_was_packed_in_cpp_reads_as_what_is_packed_in_python() -> None:
    row = spec.Spec((1.5, -2.0), 1, (7, 9), (0.5, 2.0), 2, 1, (3, -4, 5), True, (0, 2), kind=1)
    assert spec.unpacked(spec.packed(row), 1, (0, 2)) == row


def test_a_torch_without_the_exchange_api_goes_through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "face", None)
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    eager.connect(*FUNCTIONS)
    assert eager.face is None
    x, v = pair()
    torch.testing.assert_close(gk.ops.euler_step(x, v, 0.25), x + 0.25 * v)


@pytest.fixture
def _collected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_collected")
def test_a_hundred_thousand_calls_keep_nothing() -> None:
    x, v = pair()
    leaf, dt, out = x.clone().requires_grad_(), torch.rand(3), torch.empty_like(x)
    noise = gk.Noise(seed=5, sample_ids=torch.arange(3))
    runs: list[Callable[[], Any]] = [
        lambda: gk.ops.euler_step(x, v, 0.25),
        lambda: gk.ops.euler_step(x, v, dt, out=out),
        lambda: gk.ops.ddim_step(leaf, v, 0.6, 0.8, 0.8, 0.6, eta=0.5, noise=noise, return_pred=True),
        lambda: gk.ops.ddim_step(x, v, dt, 0.8, dt.new_tensor(0.8), 0.6, out=out),
        lambda: gk.ops.path_loss(leaf, x, x_coef=1.0),
        lambda: eager.face.linear(x, v, None, (), None, None, 1.0, "0.5", (), 0.0, None, 1.0, 0.0),
        lambda: gk.ops.randn((3, 4), noise=noise),
        lambda: eager.face.map_row(None, x, v, None, (), None, None, None, 1),
    ]
    held = (x, v, leaf, dt, out, noise.sample_ids, None, x.dtype)
    count = 100_000 // len(runs)
    for run in runs:
        for _ in range(20):
            run()
        before, objects = [sys.getrefcount(t) for t in held], len(gc.get_objects())
        for _ in range(count):
            run()
        after = [sys.getrefcount(t) for t in held]
        assert all(abs(a - b) < 20 for a, b in zip(after, before, strict=True))
        assert len(gc.get_objects()) - objects < 100
