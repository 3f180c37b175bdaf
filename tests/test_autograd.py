"""Gradients in reverse and forward mode, of every argument of every op, and under torch.func."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import CASES, NOISE, Case
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import genkern as gk
from genkern import fused, rows

SHAPE = (3, 1, 3)
PATH = ("alpha_t", "sigma_t", "alpha_s", "sigma_s")


def variable(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def coefficient(length: int, low: float = 0.3) -> Tensor:
    return (low + 0.3 * torch.rand(length, dtype=torch.float64)).requires_grad_()


def positional(function: Callable[..., Any], named: dict[str, Tensor]) -> Callable[..., Any]:
    return lambda *tensors: function(**dict(zip(named, tensors, strict=True)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_arrays_and_coefficients(case: Case, path: str) -> None:
    # The tests' numbers as float64 leaves; a coefficient of this case by sample stays so.
    tensors = {name: variable(*SHAPE) for name in case.arrays}
    options = dict(case.options)
    for name, value in case.options.items():
        if isinstance(value, Tensor):
            tensors[name] = options.pop(name).double().requires_grad_()
    case = dataclasses.replace(case, options=options)

    def run(**arrays: Tensor) -> tuple[Tensor, ...]:
        return case.run(gk.ops, **arrays)

    function = positional(run, tensors)
    gradcheck(function, tuple(tensors.values()), check_forward_ad=True)
    gradgradcheck(function, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_gradients_of_every_path_value(prediction: str, clip: float | None, path: str) -> None:
    tensors = {name: variable(*SHAPE) for name in ("x_t", "model_output", "uncond", "noise")}
    tensors |= {"alpha_t": coefficient(3), "sigma_t": coefficient(1), "alpha_s": coefficient(3, 0.8)}
    tensors |= {"sigma_s": coefficient(3), "eta": coefficient(1, 0.1), "guidance_scale": coefficient(3, 1.5)}

    def step(**arrays: Tensor) -> Any:
        return gk.ops.ddim_step(**arrays, prediction=prediction, clip=clip, return_pred=clip is not None)

    gradcheck(positional(step, tensors), tuple(tensors.values()), check_forward_ad=True)


@pytest.mark.parametrize("kind", ["l2", "l1", "pseudo_huber"])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("coefficients", ["numbers", "tensors"])
def test_gradients_of_path_loss(kind: str, mask: str | None, coefficients: str, path: str) -> None:
    tensors = {name: variable(*SHAPE) for name in ("model_output", "x", "noise", "h")}
    options: dict[str, Any] = {"kind": kind, "c": 0.7}
    if mask is not None:
        options["mask"] = torch.rand(SHAPE) > 0.4 if mask == "bool" else torch.rand(SHAPE, dtype=torch.float64)
    if coefficients == "tensors":
        tensors |= {"x_coef": coefficient(3), "noise_coef": coefficient(1), "m_coef": coefficient(3)}
        tensors |= {"h_coef": coefficient(1), "weight": coefficient(3)}
    else:
        options |= {"x_coef": 0.4, "noise_coef": -0.5, "m_coef": 0.8, "weight": 2.0}

    def loss(h: Tensor, h_coef: Any = 0.25, **arrays: Tensor) -> Tensor:
        return gk.ops.path_loss(**arrays, h=(h,), h_coefs=(h_coef,), **options)

    gradcheck(positional(loss, tensors), tuple(tensors.values()), check_forward_ad=True)


@pytest.mark.parametrize("kind", ["l2", "l1", "pseudo_huber"])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_gradient_beside_a_weight_that_has_none(
    kind: str, mask: str | None, reduction: str, length: int, path: str
) -> None:
    m, h = variable(*SHAPE), variable(*SHAPE)
    options: dict[str, Any] = {"kind": kind, "c": 0.7 if kind == "pseudo_huber" else None, "reduction": reduction}
    options |= {"noise": NOISE, "noise_coef": 0.6, "m_coef": coefficient(3).detach(), "h": (h,), "h_coefs": (0.3,)}
    if length:
        options["weight"] = coefficient(length).detach()
    if mask is not None:
        options["mask"] = torch.rand(SHAPE) > 0.4 if mask == "bool" else torch.rand(SHAPE, dtype=torch.float64)
    found, expected = gk.ops.path_loss(m, **options), gk.reference.path_loss(m, **options)
    torch.testing.assert_close(found, expected)
    incoming = torch.randn_like(expected)
    gradients = [torch.autograd.grad(loss, (m, h), incoming) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["l2", "pseudo_huber"])
def test_gradient_of_a_weight_has_the_losses_gradient(kind: str, path: str) -> None:
    m, weight = variable(*SHAPE), coefficient(3)
    options: dict[str, Any] = {"noise": NOISE, "noise_coef": 0.6, "kind": kind}
    loss = gk.ops.path_loss(m, weight=weight, **options)
    (of_weight,) = torch.autograd.grad(loss, weight, create_graph=True)
    (found,) = torch.autograd.grad(of_weight.sum(), m)
    (expected,) = torch.autograd.grad(gk.ops.path_loss(m, **options), m)
    torch.testing.assert_close(found, expected)


def test_gradient_of_the_coefficient_of_drawn_noise(path: str) -> None:
    tensors = (variable(*SHAPE), coefficient(3), coefficient(1))
    gradcheck(lambda x, a, s: gk.ops.add_noise(x, a, s, noise=NOISE), tensors, check_forward_ad=True)
    x = variable(*SHAPE).detach()
    gradcheck(
        lambda m, a, s: gk.ops.path_loss(m, x, x_coef=a, noise_coef=s, noise=NOISE), tensors, check_forward_ad=True
    )


@pytest.mark.parametrize("lines", [1, 3])
def test_gradient_of_a_table_of_rows(lines: int, path: str) -> None:
    row = rows.Row((rows.Out(y=0.7, x=0.3, h=(0.2,)),), pred=(1.1, -0.6), clip=(-9.0, 9.0), guidance=1.5)
    (cells,), use_pred = rows.host_table([row])
    bounds = torch.tensor(cells, dtype=torch.float64)[rows.LO : rows.HI + 1].repeat(lines, 1)
    table = torch.tensor([cells] * lines, dtype=torch.float64)
    left, right = table[:, : rows.LO].requires_grad_(), table[:, rows.W :].requires_grad_()

    def apply(left: Tensor, right: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
        x, m, u, h = arrays
        of = rows.RowTable(torch.cat([left, bounds, right], 1), 1, None, use_pred)
        return fused.apply_row(of, x=x, m=m, m_uncond=u, h=(h,))

    gradcheck(apply, (left, right, *(variable(*SHAPE) for _ in range(4))), check_forward_ad=True)


@pytest.mark.parametrize("index", [[2, 0, 1], [2, 0, 0], [1]])
def test_gradient_of_a_table_of_rows_goes_to_the_rows_of_the_index(index: list[int], path: str) -> None:
    row = rows.pack(rows.Row((rows.Out(x=0.3, m=0.7, h=(0.2,)),))).row
    left = torch.tensor(row[: rows.LO], dtype=torch.float64).repeat(4, 1).requires_grad_()
    right = torch.tensor(row[rows.W :], dtype=torch.float64).repeat(4, 1).requires_grad_()
    bounds = torch.tensor(row[rows.LO : rows.W], dtype=torch.float64).repeat(4, 1)

    def apply(left: Tensor, right: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
        x, m, h = arrays
        of = rows.RowTable(torch.cat([left, bounds, right], 1), 1, torch.tensor(index))
        return fused.apply_row(of, x=x, m=m, h=(h,))

    inputs = (left, right, *(variable(*SHAPE) for _ in range(3)))
    gradcheck(apply, inputs, check_forward_ad=True)
    gradgradcheck(apply, inputs, fast_mode=True)
    # gradcheck's numbers are the kernel's own, so the rows are counted here: sum of x over the samples of a row.
    x = torch.randn(SHAPE, dtype=torch.float64)
    table = torch.tensor(row, dtype=torch.float64).repeat(4, 1).requires_grad_()
    (out,) = fused.apply_row(rows.RowTable(table, 1, torch.tensor(index)), x=x, m=x, h=(x,))
    (found,) = torch.autograd.grad(out.sum(), table)
    expected = torch.zeros(4, dtype=torch.float64)
    for b, r in enumerate(index * (3 if len(index) == 1 else 1)):
        expected[r] += x[b].sum()
    torch.testing.assert_close(found[:, rows.out_cell(0, rows.X)], expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_gradients_of_path_values_at_zero(prediction: str, path: str) -> None:
    x, m = torch.randn(2, *SHAPE, dtype=torch.float64)
    for zero in ("sigma_s", "alpha_s"):
        given: dict[str, Any] = {"alpha_t": 0.6, "sigma_t": 0.8, "alpha_s": 0.8, "sigma_s": 0.6}
        given[zero] = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        out = gk.ops.ddim_step(x, m, **given, prediction=prediction)
        (found,) = torch.autograd.grad(out.sum(), given[zero])
        # x_s = alpha_s y + sigma_s epsilon
        epsilon = {"epsilon": m, "v": 0.6 * m + 0.8 * x, "sample": (x - 0.6 * m) / 0.8}[prediction]
        y = {"epsilon": (x - 0.8 * m) / 0.6, "v": 0.6 * x - 0.8 * m, "sample": m}[prediction]
        torch.testing.assert_close(found, (epsilon if zero == "sigma_s" else y).sum((1, 2)))
        along = torch.ones(3, dtype=torch.float64)
        change = jvp(
            lambda c, zero=zero, given=given: gk.ops.ddim_step(x, m, **{**given, zero: c}, prediction=prediction),
            (given[zero].detach(),), (along,),
        )[1]  # fmt: skip
        torch.testing.assert_close(change, epsilon if zero == "sigma_s" else y)


def test_gradients_at_sigma_s_zero_with_noise(path: str) -> None:
    x, m, z = torch.randn(3, *SHAPE, dtype=torch.float64)
    sigma_s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    out = gk.ops.ddim_step(x, m, 0.6, 0.8, 0.9, sigma_s, eta=0.5, noise=z)
    (found,) = torch.autograd.grad(out.sum(), sigma_s)
    d = 0.5 / 0.8 * (1.0 - (0.6 / 0.9) ** 2) ** 0.5  # by sigma_s
    torch.testing.assert_close(found, ((1.0 - d * d) ** 0.5 * m + d * z).sum((1, 2)))


@pytest.mark.parametrize("transform", ["backward", "grad", "grad of vmap"])
def test_nan_under_a_mask_reaches_no_gradient_of_a_coefficient(transform: str, path: str) -> None:
    m, x, h, z = (t.detach() for t in (variable(*SHAPE) for _ in range(4)))
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[1, 0, 2] = False
    holes = [t.masked_fill(~mask, float("nan")) for t in (m, x, h, z)]

    def value(module: Any, coefs: Tensor, arrays: Any) -> Tensor:
        m, x, h, z = arrays
        a, s, c, k = coefs[:, None]
        return module.path_loss(m, x, x_coef=a, noise_coef=s, noise=z, m_coef=c, h=(h,), h_coefs=(k,), mask=mask)

    coefs = torch.tensor([0.3, 0.5, 0.9, -0.4], dtype=torch.float64)
    expected = grad(lambda c: value(gk.reference, c, (m, x, h, z)))(coefs)
    for module in (gk.ops, gk.reference):
        if transform == "backward":
            leaf = coefs.clone().requires_grad_()
            (found,) = torch.autograd.grad(value(module, leaf, holes), leaf)
        elif transform == "grad":
            found = grad(lambda c, module=module: value(module, c, holes))(coefs)
        else:
            found = grad(lambda c, module=module: vmap(lambda c: value(module, c, holes))(c[None]).sum())(coefs)
        torch.testing.assert_close(found, expected)


def test_clamp_passes_gradients_by_torchs_rule(path: str) -> None:
    m = torch.tensor([[-2.0, -0.5, 0.0, 0.5, 2.0, float("nan")]], requires_grad=True)
    x = torch.zeros_like(m)
    _, y = gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6, prediction="sample", clip=0.5, return_pred=True)
    y.sum().backward()
    leaf = m.detach().requires_grad_()
    leaf.clamp(-0.5, 0.5).sum().backward()
    assert torch.equal(m.grad, leaf.grad)


@pytest.mark.parametrize("which", ["x", "v", "v_next", "dt"])
def test_no_gradient_is_lost_when_one_argument_alone_requires_it(which: str, path: str) -> None:
    given = {"x": variable(*SHAPE), "v": variable(*SHAPE), "v_next": variable(*SHAPE), "dt": coefficient(3)}
    given = {name: t.detach().requires_grad_(name == which) for name, t in given.items()}
    out = gk.ops.heun_step(**given)
    assert out.requires_grad
    (found,) = torch.autograd.grad(out.sum(), given[which])
    (expected,) = torch.autograd.grad(gk.reference.heun_step(**given).sum(), given[which])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_float16_gradients_of_the_loss_do_not_underflow(path: str) -> None:
    scale = 2.0**14  # a loss scale, as trained with
    m = torch.randn(8, 2**12).half().requires_grad_()
    loss = gk.ops.path_loss(m, noise=NOISE, noise_coef=1.0)
    (loss * scale).backward()
    z = gk.ops.randn(m.shape, noise=NOISE)
    residual = (m.detach().float() - z).half().double()  # kept unscaled, in the network's dtype
    expected = 2.0 * residual * scale / m.numel()
    assert float(expected.abs().mean()) > 0.1
    assert ((m.grad.double() - expected).abs() <= 2.0**-10 * expected.abs() + 2.0**-24).all()


def test_a_retained_graph_gives_the_same_gradient_twice(path: str) -> None:
    m = variable(*SHAPE)
    loss = gk.ops.path_loss(m, noise=NOISE, noise_coef=1.0, kind="pseudo_huber")
    first, second = (torch.autograd.grad(loss, m, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_second_derivative_of_the_loss_raises(path: str) -> None:
    weight = variable(3, 3)
    with pytest.raises(RuntimeError, match="path_loss: expected one derivative"):
        hessian(lambda w: noise_loss(X @ w))(weight)
    with pytest.raises(RuntimeError, match="path_loss: expected one derivative"):
        grad(lambda w: grad(lambda w: noise_loss(X @ w))(w).square().sum())(weight)
    huber = {"kind": "pseudo_huber", "weight": torch.ones(len(X), dtype=torch.float64)}
    for options in ({}, {"kind": "l1"}, huber, {"x_coef": weight.sum()[None]}):
        m = X @ weight
        value = gk.ops.path_loss(m, V, noise=NOISE, noise_coef=1.0, **options)
        (g,) = torch.autograd.grad(value, m, create_graph=True)
        with pytest.raises(RuntimeError, match="path_loss: expected one derivative"):
            g.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="path_loss: expected one derivative"):
            torch.autograd.grad(g.square().sum(), weight)


def test_forward_mode_over_a_gradient_of_the_loss_raises(path: str) -> None:
    with forward_ad.dual_level():
        m = forward_ad.make_dual(X.clone().requires_grad_(), V)
        with pytest.raises(RuntimeError, match="path_loss: expected one derivative"):
            torch.autograd.grad(noise_loss(m), m)


def test_a_gradient_with_create_graph_is_the_gradient(path: str) -> None:
    m = variable(*SHAPE)
    value = gk.ops.path_loss(m, noise=NOISE, noise_coef=1.0, kind="pseudo_huber")
    plain, graph = (torch.autograd.grad(value, m, retain_graph=True, create_graph=c)[0] for c in (False, True))
    assert torch.equal(plain, graph) and graph.requires_grad and not plain.requires_grad


def test_out_refuses_what_requires_a_gradient(path: str) -> None:
    x, v = variable(*SHAPE), variable(*SHAPE)
    out = torch.full(SHAPE, 3.0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="out: expected None"):
        gk.ops.euler_step(x, v, 0.5, out=out)
    assert (out == 3.0).all()
    with torch.no_grad():
        assert gk.ops.euler_step(x, v, 0.5, out=out) is out


def test_the_function_is_skipped_only_where_no_derivative_can_be_asked_for(path: str) -> None:
    x, v = torch.randn(2, *SHAPE)
    assert gk.ops.euler_step(x, v, 0.5).grad_fn is None
    v.requires_grad_()
    assert gk.ops.euler_step(x, v, 0.5).grad_fn is not None
    with torch.no_grad():
        assert gk.ops.euler_step(x, v, 0.5).grad_fn is None


def test_the_loss_keeps_one_residual_and_no_input(path: str) -> None:
    m, x = torch.randn(SHAPE).bfloat16().requires_grad_(), torch.randn(SHAPE)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gk.ops.path_loss(m, x, x_coef=1.0, noise=NOISE, noise_coef=-1.0)
    assert [t.dtype for t in kept if t.shape == m.shape] == [torch.bfloat16]


X, V = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DT = torch.tensor([0.2, 0.5, -0.4], dtype=torch.float64)


def euler(x: Tensor, v: Tensor, dt: Any = 0.5) -> Tensor:
    return gk.ops.euler_step(x, v, dt)


def loss(m: Tensor, x: Tensor) -> Tensor:
    return gk.ops.path_loss(m, x, x_coef=1.0)


def noise_loss(m: Tensor) -> Tensor:
    return gk.ops.path_loss(m, noise=NOISE, noise_coef=1.0)


def normals() -> Tensor:
    return gk.ops.randn(SHAPE, noise=NOISE, dtype=torch.float64)


TRANSFORMS: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "grad": (lambda: grad(lambda x: euler(x, V).square().sum())(X), lambda: 2 * (X + 0.5 * V)),
    "jvp": (lambda: jvp(lambda x: euler(x, V), (X,), (V,))[1], lambda: V),
    "jvp of a coefficient": (lambda: jvp(lambda dt: euler(X, V, dt), (DT,), (DT,))[1], lambda: DT[:, None, None] * V),
    "vmap": (lambda: vmap(euler)(X, V), lambda: X + 0.5 * V),
    "vmap of one": (lambda: vmap(euler, in_dims=(1, None))(X, V[:, 0]), lambda: X.transpose(0, 1) + 0.5 * V[:, 0]),
    "vmap of grad": (lambda: vmap(grad(lambda x, v: euler(x, v).sum()))(X, V), lambda: torch.ones_like(X)),
    "jacrev": (
        lambda: jacrev(lambda dt: euler(X, V, dt))(DT),
        lambda: jacfwd(lambda dt: X + dt[:, None, None] * V)(DT),
    ),
    "hessian": (
        lambda: hessian(lambda x: euler(x, V).pow(3).sum())(X).sum((3, 4, 5)),
        lambda: 6 * (X + 0.5 * V),
    ),
    "noise inside a transform": (
        lambda: vmap(lambda x: x + jvp(lambda v: v * normals(), (V,), (V,))[1])(torch.stack([X, V])),
        lambda: torch.stack([X, V]) + V * normals(),
    ),
    "vmap of drawn noise": (
        lambda: vmap(lambda x: gk.ops.add_noise(x, 1.0, 1.0, noise=NOISE))(torch.stack([X, V])),
        lambda: torch.stack([X, V]) + normals(),
    ),
    "grad of the loss": (lambda: grad(noise_loss)(X), lambda: 2 * (X - normals()) / X.numel()),
    "jvp of the loss": (
        lambda: jvp(noise_loss, (X,), (V,))[1],
        lambda: (2 * (X - normals()) * V).mean(),
    ),
    "vmap of the loss": (lambda: vmap(loss)(X, V), lambda: (X - V).square().mean((1, 2))),
    "vmap of grad of the loss": (lambda: vmap(grad(loss))(X, V), lambda: 2 * (X - V) / 3),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name: str, path: str) -> None:
    transform, expected = TRANSFORMS[name]
    torch.testing.assert_close(transform(), expected(), rtol=1e-12, atol=1e-12)


def test_forward_mode_of_a_ddim_step_through_its_path_values(path: str) -> None:
    def step(module: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda alpha, m: module.ddim_step(X, m, alpha, 0.8, 0.9, 0.4, eta=0.3, noise=V, clip=2.0)

    at, along = (0.5 * DT + 0.5, X), (DT, V)
    found = jvp(step(gk.ops), at, along)[1]
    torch.testing.assert_close(found, jvp(step(gk.reference), at, along)[1], rtol=1e-10, atol=1e-12)


def test_the_raw_op_does_not_lose_a_gradient_without_a_word(kernels: None) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    row = [0.0] * rows.n_cells(1)
    row[rows.out_cell(0, rows.X)] = 2.0
    arguments = (None, None, [], None, row, None, None, [], [], [], 0, 0, [], None, None, False, [0])
    (y,) = torch.ops.genkern.map(x, *arguments)
    if y.requires_grad:
        with pytest.warns(UserWarning, match="autograd kernel was not registered"):
            y.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="does not require grad"):
            y.sum().backward()


@pytest.mark.parametrize(
    "options", [{"kind": "pseudo_huber"}, {"reduction": "none"}, {"weight": torch.ones(4)}], ids=str
)
def test_a_second_derivative_above_the_loss_is_not_cut_off(options):
    m, scale = torch.randn(4, 3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    loss = scale * gk.ops.path_loss(m, torch.randn(4, 3), noise=gk.Noise(1), **options).sum()
    (g,) = torch.autograd.grad(loss, m, create_graph=True)
    with pytest.raises(RuntimeError, match="path_loss: expected one derivative, got a second one"):
        torch.autograd.grad(g.square().sum() + scale, scale)


def test_the_raw_op_takes_each_cell_once(kernels: None) -> None:
    x, value, cell = torch.randn(2, 3), torch.ones(2), rows.out_cell(0, rows.X)
    row = [0.0] * rows.n_cells(1)
    arguments = (None, None, [], None, row, None, None, [value, value], [cell, cell], [1.0, 1.0], 0, 0, [], None, None)
    with pytest.raises((ValueError, RuntimeError), match=f"cells: expected each once, got {cell} twice"):
        torch.ops.genkern.map(x, *arguments, False, [0])
