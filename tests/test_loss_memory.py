"""The loss's backward pass turns the residual into the gradient where it lies, and only where no one else reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import genkern as gk

SHAPE = (4, 3, 8)
NOISE = gk.Noise(11)


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype).requires_grad_()


def loss(m: Tensor, x: Tensor, **options: Any) -> Tensor:
    return gk.ops.path_loss(m, x, x_coef=0.5, noise_coef=-1.0, noise=NOISE, **options)


def gradient(m: Tensor, x: Tensor, weight: float = 1.0) -> Tensor:
    """Of the mean over the batch of the mean square over each sample, by its formula."""
    r = m.detach().double() - 0.5 * x.double() + gk.ops.randn(SHAPE, noise=NOISE).double()
    return weight * 2.0 * r / r.numel()


def close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-8)


class Allocations(TorchDispatchMode):
    """Storages of at least `elements` elements that calls return and did not take."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.found, self._kept = elements, set[int](), list[Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for t in _tensors(result):
            start = t.untyped_storage().data_ptr()
            if t.untyped_storage().nbytes() >= self.elements * t.element_size() and start not in taken:
                self.found.add(start)
                self._kept.append(t)  # so that no address is given out twice
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def test_a_training_step_allocates_the_networks_input_and_the_gradient_alone(kernels: None) -> None:
    x, seen = torch.randn(4, 64, 8), list[Tensor]()

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t.requires_grad_())
        return x_t

    with Allocations(x.numel()) as allocations:
        gk.FlowMatching().loss(network, x, noise=NOISE).backward()
    (x_t,) = seen
    assert x_t.grad is not None
    assert allocations.found == {x_t.untyped_storage().data_ptr(), x_t.grad.untyped_storage().data_ptr()}


def test_a_retained_graph_gives_the_same_gradient_again(kernels: None) -> None:
    x, m = tensors()
    value = loss(m, x)
    first, second = (torch.autograd.grad(value, m, retain_graph=True)[0] for _ in range(2))
    value.backward()
    assert torch.equal(first, second) and torch.equal(first, m.grad)
    close(first, gradient(m, x))
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_gradients_accumulate(kernels: None) -> None:
    x, m = tensors()
    for _ in range(3):
        loss(m, x).backward()
    close(m.grad, gradient(m, x, 3.0))


def test_two_losses_of_one_output(kernels: None) -> None:
    x, m = tensors()
    (loss(m, x) + 2.0 * loss(m, x)).backward()
    close(m.grad, gradient(m, x, 3.0))


def test_unreduced_losses_weigh_their_samples(kernels: None) -> None:
    x, m = tensors()
    weight = torch.tensor([1.0, -2.0, 0.0, 4.0])
    loss(m, x, reduction="none").backward(weight)
    close(m.grad, SHAPE[0] * weight.double()[:, None, None] * gradient(m, x))


def test_hooks_see_the_gradient_and_may_keep_it(kernels: None) -> None:
    x, m = tensors()
    kept: list[Tensor] = []
    m.register_hook(kept.append)
    loss(m * 1.0, x).backward()
    loss(m, x).backward()
    for found in kept:
        close(found, gradient(m, x))
    close(m.grad, gradient(m, x, 2.0))


def test_what_saving_hooks_hold_stays_as_it_was(kernels: None) -> None:
    x, m = tensors()
    packed: list[tuple[Tensor, Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        packed.append((t, t.clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(m, x)
    value.backward()
    close(m.grad, gradient(m, x))
    assert packed and all(torch.equal(t, copy) for t, copy in packed)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, kernels: None) -> None:
    x, m = tensors()
    checkpoint(loss, m, x, use_reentrant=reentrant).backward()
    close(m.grad, gradient(m, x))


def test_several_inputs_with_gradients(kernels: None) -> None:
    x, m = tensors()
    x.requires_grad_()
    h = [torch.randn(SHAPE).requires_grad_() for _ in range(3)]
    gk.ops.path_loss(m, x, x_coef=0.5, h=h, h_coefs=(1.0, 2.0, -1.0)).backward()
    r = (m - 0.5 * x - h[0] - 2.0 * h[1] + h[2]).detach().double()
    for t, c in ((m, 1.0), (x, -0.5), (h[0], -1.0), (h[1], -2.0), (h[2], 1.0)):
        close(t.grad, c * 2.0 * r / r.numel())
    starts = {t.grad.untyped_storage().data_ptr() for t in (m, x, *h) if t.grad is not None}
    assert len(starts) == 5


def test_a_residual_that_was_handed_out_is_left_alone(kernels: None) -> None:
    x, m = tensors()
    row = gk.rows.Row((gk.rows.Out(x=-0.5, m=1.0),))
    residual, sums = gk.fused.reduce_row(row, x=x, m=m)
    before = residual.clone()
    sums[:, 0].sum().backward()
    assert torch.equal(residual, before)
    close(m.grad, 2.0 * before.double())


def test_torch_compile(kernels: None) -> None:
    x, m = tensors()
    compiled: Callable[..., Tensor] = torch.compile(loss, backend="aot_eager", fullgraph=True)
    compiled(m, x).backward()
    close(m.grad, gradient(m, x))


def test_float16_gradients_do_not_underflow_under_a_scaled_loss(kernels: None) -> None:
    m = torch.full((2, 1 << 17), 1e-3, dtype=torch.float16, requires_grad=True)
    factor, scale = 2.0 / m.numel(), 2.0**16
    assert (m.detach() * factor).eq(0.0).all()  # what scaling the residual before the loss is scaled would give
    (scale * gk.ops.path_loss(m)).backward()
    close(m.grad, (m.detach().double() * factor * scale).half().double())


@pytest.mark.parametrize("by_sample", [False, True], ids=["number", "by sample"])
@pytest.mark.parametrize("others", [False, True], ids=["m alone", "x too"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_coefficient_of_the_output_is_in_its_gradient_once(
    dtype: torch.dtype, others: bool, by_sample: bool, device: torch.device
) -> None:
    x, m = (t.detach().to(device) for t in tensors(dtype))
    m.requires_grad_()
    x.requires_grad_(others)
    coef: Any = torch.tensor([0.3, -1.7, 0.0, 2.1], device=device) if by_sample else 0.3
    weight = torch.tensor([1.0, 0.5, 3.0, 0.7], device=device)
    found = torch.autograd.grad(
        gk.ops.path_loss(m, x, x_coef=0.5, m_coef=coef, weight=weight), (m, x) if others else (m,), 0.75 * weight[1]
    )
    column = lambda c: torch.as_tensor(c, dtype=torch.float64, device=device).reshape(-1, 1, 1)  # noqa: E731
    c, m64, x64 = column(coef), m.detach().double(), x.detach().double()
    slope = 0.375 * 2.0 * column(weight) * (c * m64 - 0.5 * x64) / m.numel()
    expected = (c * slope, -0.5 * slope)
    # Where m alone has a gradient it is stored, and scaled by 0.375 afterwards: rounded twice, as x's is.
    bound = 2.2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 8.0 * torch.finfo(dtype).eps
    for g, exact in zip(found, expected, strict=False):
        torch.testing.assert_close(g.double(), exact, rtol=bound, atol=1e-30 if dtype == torch.float64 else 1e-9)


def test_a_half_precision_gradient_of_m_is_rounded_once(device: torch.device) -> None:
    x, m = (t.detach().to(device) for t in tensors(torch.bfloat16))
    m.requires_grad_()
    coef = torch.tensor([0.3, -1.7, 0.9, 2.1], device=device)
    gk.ops.path_loss(m, x, x_coef=0.5, m_coef=coef).backward()
    c = coef.double().reshape(-1, 1, 1)
    exact = c * 2.0 * (c * m.detach().double() - 0.5 * x.double()) / m.numel()
    assert m.grad is not None
    error = ((m.grad.double() - exact) / exact).abs().max()
    assert error <= 1.01 * torch.finfo(torch.bfloat16).eps / 2.0


def test_a_loss_of_more_samples_than_one_block_adds_up(device: torch.device) -> None:
    torch.manual_seed(0)
    x, m = (torch.randn(9001, 8, device=device) for _ in range(2))
    weight = torch.linspace(0.5, 1.5, len(x), device=device)
    squares = (m.double() - 0.5 * x.double()).square().mean(1)
    for reduction, expected in (("mean", (weight * squares).mean()), ("none", weight * squares)):
        found = gk.ops.path_loss(m, x, x_coef=0.5, weight=weight, reduction=reduction)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0.0)
