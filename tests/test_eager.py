"""Calls past torch's dispatcher: taken by plain tensors and by nothing else, and no result tells which way it came."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import CASES, LOSSES, NOISE, SHAPE, Case, arrays, on
from test_ops_layouts import LAYOUTS
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import genkern as gk
from genkern import calls, eager, functions, fused, rows, spec

FUNCTIONS = (functions._EagerMap.apply, functions._EagerReduce.apply, functions._EagerLoss.apply)


@pytest.fixture(autouse=True)
def connected() -> None:
    if eager.face is None:
        pytest.skip("this torch has no exchange API, or the compiled library is missing")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs something the way that goes through Python and the dispatcher."""

    def run(what: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(eager, "face", None)
            return what()

    return run


def taken(what: Callable[[], Any]) -> int:
    """How many calls of it went past the dispatcher."""
    before = eager.face.eager_calls()
    what()
    return int(eager.face.eager_calls() - before)


def pair(shape: tuple[int, ...] = (3, 4), device: Any = "cpu") -> tuple[Tensor, Tensor]:
    return torch.randn(shape, device=device), torch.randn(shape, device=device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op_of_plain_tensors_goes_past_the_dispatcher(
    case: Case, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**arrays(case, device, dtype), **on(case.options, device)}
    op = getattr(gk.ops, case.op)
    plain = {k: v for k, v in given.items() if k not in case.options or not isinstance(v, Tensor) or v.ndim}

    def never(*_: Any) -> None:
        raise AssertionError("packed in Python")

    with monkeypatch.context() as patch:
        patch.setattr(rows, "pack", never)
        assert taken(lambda: op(**plain)) == 1
        leaf = {**plain, case.arrays[0]: plain[case.arrays[0]].clone().requires_grad_()}
        assert taken(lambda: op(**leaf)) == 1


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ways_give_the_same_bits_in_the_same_layout(
    case: Case, layout: str, device: torch.device, dtype: torch.dtype, slow: Any
) -> None:
    shape = (3, 4, 5, 6)
    given = {name: torch.randn(shape, device=device).to(dtype) for name in case.arrays}
    given = {name: LAYOUTS[layout](t) for name, t in given.items()}
    if layout == "expanded":
        given = {name: t[:, :1].expand(shape) for name, t in given.items()}
    given |= on(case.options, device)
    run = lambda: case.run(gk.ops, **{k: given[k] for k in case.arrays})  # noqa: E731
    if device.type == "cuda":
        options = on(case.options, device)
        run = lambda: _tuple(getattr(gk.ops, case.op)(**given | options))  # noqa: E731
    found, wanted = run(), slow(run)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype


def _tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (1,), (5,), (1, 1), (2, 33), (70, 100)])
def test_both_ways_take_any_size(shape: tuple[int, ...], device: torch.device, slow: Any) -> None:
    x, v = pair(shape, device)

    def run() -> list[Tensor]:
        return [
            gk.ops.euler_step(x, v, 0.25),
            gk.ops.add_noise(x, 0.6, 0.8, noise=NOISE),
            gk.ops.randn(shape, noise=NOISE, device=device),
            gk.ops.path_loss(v, x, x_coef=1.0, noise_coef=-1.0, noise=NOISE),
            gk.ops.path_loss(v, x, x_coef=1.0, kind="l1", reduction="sum"),
        ]

    assert taken(run) == 5
    for a, b in zip(run(), slow(run), strict=True):
        assert torch.equal(a, b)


def test_a_loss_without_elements_is_zero(device: torch.device) -> None:
    for shape in ((0, 3), (2, 0)):
        x, v = pair(shape, device)
        assert gk.ops.path_loss(v, x, x_coef=1.0) == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_a_loss_is_the_mean_or_sum_over_the_batch_of_the_samples_means(
    kind: str, reduction: str, device: torch.device
) -> None:
    x, m = pair((5, 3, 7), device)
    r = (m - x).double()
    by_sample = (r * r if kind == "l2" else r.abs()).mean(dim=(1, 2))
    found = gk.ops.path_loss(m, x, x_coef=1.0, kind=kind, reduction=reduction)
    torch.testing.assert_close(found.double(), getattr(by_sample, reduction)(), rtol=1e-6, atol=0)
    assert found.shape == ()
    assert found.dtype == torch.float32


def test_the_most_precise_of_four_further_tensors_takes_the_states_place(device: torch.device) -> None:
    x, m = pair((3, 5), device)
    low = m.half()
    found = gk.ops.path_loss(low, h=(low, low, low, x))  # r = m - 3 m - x
    torch.testing.assert_close(found, (2 * low.float() + x).square().mean())


@pytest.mark.parametrize("options", [*LOSSES, {"x_coef": 1.0, "kind": "l1"}, {"x_coef": 0.5, "reduction": "sum"}])
def test_both_ways_give_the_same_loss_and_gradients(
    options: dict[str, Any], device: torch.device, dtype: torch.dtype, slow: Any
) -> None:
    m, x = torch.randn(2, *SHAPE, device=device).to(dtype)
    options = on(options, device)

    def run() -> tuple[Tensor, ...]:
        f, data = m.clone().requires_grad_(), x.clone().requires_grad_()
        loss = gk.ops.path_loss(f, data, **options)
        return (loss.detach(), *torch.autograd.grad(loss.sum(), (f, data)))

    assert taken(run) > 0
    for a, b in zip(run(), slow(run), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ways_give_the_same_gradients(case: Case, device: torch.device, dtype: torch.dtype, slow: Any) -> None:
    given = arrays(case, device, dtype)
    options = on(case.options, device)

    def run() -> list[Tensor]:
        leaves = {k: t.clone().requires_grad_() for k, t in given.items()}
        coefs = {k: t.clone().requires_grad_() for k, t in options.items() if isinstance(t, Tensor)}
        outs = _tuple(getattr(gk.ops, case.op)(**leaves, **options | coefs))
        seed = sum((j + 1.0) * out.double().sum() for j, out in enumerate(outs))
        return list(torch.autograd.grad(seed, [*leaves.values(), *coefs.values()]))

    for a, b in zip(run(), slow(run), strict=True):
        assert torch.equal(a, b)


def test_both_ways_give_the_gradient_of_the_state_beside_path_values_a_sample(device: torch.device, slow: Any) -> None:
    x, m = pair((3, 5), device)
    alpha_t = torch.tensor([0.6, 0.5, 0.7], device=device)

    def run() -> Tensor:
        leaf = x.clone().requires_grad_()
        out = gk.ops.ddim_step(leaf, m, alpha_t, 0.8, 0.8, 0.6, clip=0.5)
        return torch.autograd.grad(out.sum(), leaf)[0]

    assert taken(run) == 1
    assert torch.equal(run(), slow(run))


def test_gradients_of_one_of_two_outputs_and_a_second_derivative(device: torch.device) -> None:
    x = torch.randn(3, 4, device=device, requires_grad=True)
    x_t, z = gk.ops.add_noise(x, 0.5, 0.25, noise=NOISE, return_noise=True)
    (g,) = torch.autograd.grad(x_t.square().sum(), x, create_graph=True)
    torch.testing.assert_close(g, x_t.detach())  # 2 x_t alpha
    (second,) = torch.autograd.grad(g.sum(), x, retain_graph=True)
    torch.testing.assert_close(second, torch.full_like(x, 2 * 0.5 * 0.5))
    assert torch.autograd.grad(z.sum(), x, allow_unused=True)[0].abs().max() == 0.0


def test_a_second_derivative_of_a_loss_raises(device: torch.device) -> None:
    m = torch.randn(3, 4, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(gk.ops.path_loss(m, torch.zeros_like(m)), m, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one derivative"):
        g.sum().backward()


def test_a_loss_whose_graph_is_kept_gives_its_gradient_again(device: torch.device) -> None:
    m = torch.randn(3, 4, device=device, requires_grad=True)
    loss = gk.ops.path_loss(m, torch.zeros_like(m), x_coef=1.0)
    first = torch.autograd.grad(loss, m, retain_graph=True)[0].clone()
    torch.testing.assert_close(first, 2 * m.detach() / 12)
    assert torch.equal(torch.autograd.grad(loss, m)[0], first)


def test_the_residual_becomes_the_gradient_where_it_lies_unless_the_graph_is_kept(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    real = functions.run_map_out

    def noted(spec: Any, out: Any, *terms: Any) -> None:
        written.extend(t.data_ptr() for t in out)
        real(spec, out, *terms)

    monkeypatch.setattr(functions, "run_map_out", noted)
    m = torch.randn(3, 4, device=device, requires_grad=True)
    loss = gk.ops.path_loss(m, torch.zeros_like(m), x_coef=1.0)
    torch.autograd.grad(loss, m, retain_graph=True)
    assert not written
    loss.backward()
    assert m.grad is not None
    assert written == [m.grad.data_ptr()]


def test_a_loss_of_which_no_gradient_is_asked_gives_none() -> None:
    m, other = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    loss = gk.ops.path_loss(m, torch.zeros(3, 4))
    assert torch.autograd.grad(loss + other.sum(), other)[0].eq(1.0).all()


def test_a_loss_may_be_changed_in_place(device: torch.device) -> None:
    m = torch.randn(3, 4, device=device, requires_grad=True)
    loss = gk.ops.path_loss(m, torch.zeros_like(m), reduction="sum")
    loss /= 2.0
    loss.backward()
    torch.testing.assert_close(m.grad, m.detach() / 4.0)


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
def test_an_error_is_worded_the_same_and_nothing_is_written(unusual: str, slow: Any) -> None:
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
def test_given_outputs_are_written_and_their_versions_counted(where: str, slow: Any) -> None:
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


def test_what_the_host_does_not_know_takes_the_other_way(slow: Any) -> None:
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


def test_a_row_laid_out_before_is_applied_as_text_and_as_bytes(slow: Any) -> None:
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
        lambda: gk.ops.path_loss(leaf, x, x_coef=1.0),
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
