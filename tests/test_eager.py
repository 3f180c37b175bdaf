"""Calls past torch's dispatcher: every plain call is one, and has the bits, layout and gradients of the other way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_ways import connected, pair, slow, taken
from op_cases import CASES, LOSSES, NOISE, SHAPE, Case, arrays, on
from test_ops_layouts import LAYOUTS
from torch import Tensor

import genkern as gk
from genkern import map_function, rows

pytestmark = connected


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
    case: Case, layout: str, device: torch.device, dtype: torch.dtype
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
def test_both_ways_take_any_size(shape: tuple[int, ...], device: torch.device) -> None:
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
    found, wanted = run(), slow(run)
    for a, b in zip(found[:3], wanted[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(found[3:], wanted[3:], strict=True):
        same_total(a, b)


def same_total(a: Tensor, b: Tensor) -> None:
    """Two sums over a batch, of which one is rounded once and the other as torch adds."""
    torch.testing.assert_close(a, b, rtol=8 * torch.finfo(a.dtype).eps, atol=0)


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
    options: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> None:
    m, x = torch.randn(2, *SHAPE, device=device).to(dtype)
    options = on(options, device)

    def run() -> tuple[Tensor, ...]:
        f, data = m.clone().requires_grad_(), x.clone().requires_grad_()
        loss = gk.ops.path_loss(f, data, **options)
        return (loss.detach(), *torch.autograd.grad(loss.sum(), (f, data)))

    assert taken(run) > 0
    (loss, *gradients), (slow_loss, *slow_gradients) = run(), slow(run)
    same_total(loss, slow_loss)
    for a, b in zip(gradients, slow_gradients, strict=True):
        if dtype == torch.bfloat16:  # rounded once, and twice: by the residual and by its scaling
            torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
        else:
            assert torch.equal(a, b)


def test_a_gradient_in_bfloat16_is_rounded_once(device: torch.device) -> None:
    x, m = (t.bfloat16() for t in pair((5, 3, 64), device))
    f = m.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gk.ops.path_loss(f, x, x_coef=1.0), f)
    exact = 2.0 / m.numel() * (m.double() - x.double())
    assert torch.all((gradient.double() - exact).abs() <= exact.abs() * 2**-8)


def test_a_gradient_is_right_whether_its_own_is_1_and_the_stored_one_is_left_alone_or_not(device: torch.device) -> None:
    x, m = pair((4, 1 << 14), device)
    f = m.clone().requires_grad_()
    for factor in (1.0, 3.0):
        loss = factor * gk.ops.path_loss(f, x, x_coef=1.0)
        (gradient,) = torch.autograd.grad(loss, f)
        torch.testing.assert_close(gradient, factor * 2.0 / m.numel() * (m - x))


@pytest.mark.parametrize("weight", [0.5, [2.0, -1.0, 0.0, 0.25], [3.0]])
def test_a_weighted_loss_is_one_call_and_its_stored_residual_is_the_gradient(
    weight: Any, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, m = (t.to(dtype) for t in pair((4, 3, 64), device))
    given = weight if isinstance(weight, float) else torch.tensor(weight, device=device)
    w = torch.as_tensor(weight, device=device).double().reshape(-1, 1, 1)
    f = m.clone().requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        loss = gk.ops.path_loss(f, x, x_coef=1.0, weight=given)
        return loss.detach(), torch.autograd.grad(loss, f)[0]

    assert taken(lambda: gk.ops.path_loss(f, x, x_coef=1.0, weight=given)) == 1
    r = m.double() - x.double()
    loss, gradient = run()
    # float16 has no numbers between 0 and 2^-24.
    close = (
        {"rtol": 2.0**-7, "atol": 2.0**-24} if dtype.itemsize == 2 else {"rtol": 8 * torch.finfo(dtype).eps, "atol": 0}
    )
    torch.testing.assert_close(gradient.double(), w * 2.0 / r.numel() * r, **close)
    torch.testing.assert_close(loss.double(), (w * r * r).mean(), rtol=2e-6, atol=1e-7)
    slow_loss, slow_gradient = slow(run)
    torch.testing.assert_close(loss, slow_loss, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient, slow_gradient, **close)


def test_a_weight_whose_gradient_is_asked_for_gets_it(device: torch.device) -> None:
    x, m = pair((4, 6), device)
    weight = torch.rand(4, device=device, requires_grad=True)
    loss = gk.ops.path_loss(m, x, x_coef=1.0, weight=weight)
    (found,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(found, (m - x).square().mean(dim=1) / 4.0)


def test_a_loss_alone_writes_no_residual(device: torch.device) -> None:
    x, m = pair((2, 1 << 18), device)
    if device.type != "cuda":
        pytest.skip("memory is counted on a GPU")
    with torch.no_grad():
        gk.ops.path_loss(m, x, x_coef=1.0)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        gk.ops.path_loss(m, x, x_coef=1.0)
    assert torch.cuda.max_memory_allocated(device) - before < x.numel()  # of 4 bytes each


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ways_give_the_same_gradients(case: Case, device: torch.device, dtype: torch.dtype) -> None:
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


def test_both_ways_give_the_gradient_of_the_state_beside_path_values_a_sample(device: torch.device) -> None:
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
    real = map_function._map

    def noted(row: Any, terms: Any, dtypes: Any, out: Any = None) -> Any:
        written.extend(t.data_ptr() for t in out or ())
        return real(row, terms, dtypes, out)

    monkeypatch.setattr(map_function, "_map", noted)
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
