"""The named ops as one call each: the row that csrc/python makes of an op's arguments is the one that Python makes, and
what its checks do not know goes the way through Python, which words the errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager_ways import connected, pair, slow, taken
from op_cases import CASES, LOSSES, NOISE, SHAPE, Case, arrays, on
from torch import Tensor

import genkern as gk
from genkern import check, eager, ops, rows

pytestmark = connected

by_sample = torch.tensor([0.3, -0.2, 0.9])
PATH = {
    "alpha_t": torch.tensor([0.6, 0.5, 0.1]),
    "sigma_t": torch.tensor([[0.8]], dtype=torch.float64),
    "alpha_s": 0.8,
    "sigma_s": torch.tensor(0.6),
}
SUMMED = [
    *(options for options in LOSSES if options.get("kind") != "pseudo_huber"),
    {"x_coef": 2, "noise_coef": -1, "m_coef": 3, "noise": NOISE, "weight": 2},
    {"x_coef": by_sample, "noise_coef": rows.Scaled(by_sample, 0.5), "m_coef": torch.tensor([0.7]), "noise": NOISE},
    {"x": None, "noise_coef": 1.0, "noise": NOISE, "reduction": "sum"},
    {"x_coef": 0.5, "h": ("m", "x", "m"), "h_coefs": (0.25, by_sample, -2.0), "kind": "l1", "reduction": "sum"},
    {"x_coef": 0.5, "h": ("x", "m"), "weight": by_sample},
]


def through_rows(what: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same with the row made in Python."""
    with monkeypatch.context() as patch:
        for name in ("linear", "ddim", "path_loss"):
            patch.setattr(eager.face, name, lambda *_: None)
        return what()


def one_call(case: Case) -> bool:
    """Whether the op's own call takes it: all but two outputs of a linear row, and an eta that is a tensor."""
    return "return_noise" not in case.options and not isinstance(case.options.get("eta"), Tensor)


OF_TENSORS = [
    Case("ddim_step", ("x_t", "model_output"), {**PATH, "prediction": prediction, "clip": clip}, 1.0, prediction)
    for prediction, clip in (("epsilon", None), ("v", (-0.5, 0.25)), ("sample", 1.0))
]
OF_TENSORS += [Case("euler_step", ("x", "v"), {"dt": torch.tensor(0.25)}, 1.0, "0-d")]


@pytest.mark.parametrize("case", CASES + OF_TENSORS, ids=str)
def test_an_op_makes_the_row_that_python_makes(
    case: Case, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arrays(case, device, dtype) | on(case.options, device)

    def run() -> tuple[Tensor, ...]:
        leaves = {k: v.clone().requires_grad_() if k in case.arrays else v for k, v in given.items()}
        found = getattr(gk.ops, case.op)(**leaves)
        outs = found if isinstance(found, tuple) else (found,)
        gradients = torch.autograd.grad(outs[0].square().sum(), [leaves[name] for name in case.arrays])
        return (*outs, *gradients)

    for a, b in zip(run(), through_rows(run, monkeypatch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [case for case in CASES + OF_TENSORS if one_call(case)], ids=str)
def test_an_op_of_plain_arguments_makes_no_row_in_python(
    case: Case, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arrays(case, device, dtype) | on(case.options, device)
    for name in ("Row", "DDIMRow"):
        monkeypatch.setattr(ops, name, None)
    monkeypatch.setattr(check, "coefficient", None)
    assert taken(lambda: getattr(gk.ops, case.op)(**given)) == 1
    state = given[case.arrays[0]]
    if "return_pred" not in case.options:
        assert getattr(gk.ops, case.op)(**given, out=state) is state


@pytest.mark.parametrize("options", SUMMED)
def test_a_loss_makes_the_row_that_python_makes(
    options: dict[str, Any], device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, x = torch.randn(2, *SHAPE, device=device).to(dtype)
    options = on(options, device)
    if isinstance(options.get("h_coefs"), tuple):
        options["h_coefs"] = tuple(k.to(device) if isinstance(k, Tensor) else k for k in options["h_coefs"])
    if isinstance(options.get("noise_coef"), rows.Scaled):
        options["noise_coef"] = rows.Scaled(by_sample.to(device), 0.5)

    def run() -> tuple[Tensor, ...]:
        f, data = m.clone().requires_grad_(), x.clone().requires_grad_()
        terms = {"x": data} | options
        terms["h"] = tuple({"m": f, "x": data}[name] for name in options.get("h", ()))
        loss = gk.ops.path_loss(f, **terms)
        wanted = [f] if terms["x"] is None else [f, data]
        return (loss.detach(), *torch.autograd.grad(loss, wanted))

    for a, b in zip(run(), through_rows(run, monkeypatch), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(ops, "Row", None)
    assert taken(lambda: gk.ops.path_loss(m, **{"x": x} | options | {"h": (), "h_coefs": ()})) == 1


def test_a_coefficient_that_requires_a_gradient_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, m = pair((3, 4))

    def run() -> tuple[Tensor, ...]:
        c = by_sample.clone().requires_grad_()
        (of_loss,) = torch.autograd.grad(gk.ops.path_loss(m, x, x_coef=c), c)
        (of_step,) = torch.autograd.grad(gk.ops.heun_step(x, m, x, c).sum(), c)
        return of_loss, of_step

    for a, b in zip(run(), through_rows(run, monkeypatch), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(run()[1], 0.5 * (m + x).sum(1))


def test_a_coefficient_of_one_element_gets_a_gradient_of_its_shape() -> None:
    x, v = pair((3, 4))
    for shape in ((), (1,), (1, 1)):
        dt = torch.full(shape, 0.25, requires_grad=True)
        (found,) = torch.autograd.grad(gk.ops.euler_step(x, v, dt).sum(), dt)
        torch.testing.assert_close(found, v.sum().expand(shape))


def flushed(what: Callable[[], Any]) -> Any:
    """Runs something while denormal numbers are zeros, also to comparisons."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU does not flush denormal numbers")
    try:
        return what()
    finally:
        torch.set_flush_denormal(False)


NOT_FINITE = torch.tensor([0.5, math.nan, 0.5])
BEYOND = 4e38  # float32 ends at 3.4e38
REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a word": lambda x, m: gk.ops.path_loss(m, x, x_coef="1"),
    "a boolean": lambda x, m: gk.ops.euler_step(x, m, True),
    "not a number": lambda x, m: gk.ops.path_loss(m, x, x_coef=math.nan),
    "infinite": lambda x, m: gk.ops.consistency_skip(x, m, 0.5, math.inf),
    "an integer beyond float64": lambda x, m: gk.ops.path_loss(m, x, m_coef=10**400),
    "beyond float32": lambda x, m: gk.ops.path_loss(m, x, x_coef=BEYOND),
    "beyond float32, halved": lambda x, m: gk.ops.heun_step(x, m, m, BEYOND),
    "not a number among numbers": lambda x, m: gk.ops.path_loss(m, x, x_coef=NOT_FINITE),
    "not a number, scaled": lambda x, m: gk.ops.path_loss(m, x, x_coef=rows.Scaled(NOT_FINITE, 0.5)),
    "infinite of float64": lambda x, m: gk.ops.euler_step(x, m, torch.tensor([math.inf], dtype=torch.float64)),
    "coefficients of integers": lambda x, m: gk.ops.path_loss(m, x, x_coef=torch.ones(3).long()),
    "coefficients of another batch": lambda x, m: gk.ops.path_loss(m, x, x_coef=torch.ones(2)),
    "coefficients of two dimensions": lambda x, m: gk.ops.path_loss(m, x, x_coef=torch.ones(3, 4)),
    "a guidance scale that is none": lambda x, m: gk.ops.euler_step(x, m, 0.5, uncond=m, guidance_scale=NOT_FINITE),
    "a guidance scale alone": lambda x, m: gk.ops.euler_step(x, m, 0.5, guidance_scale=2.0),
    "a weight that is none": lambda x, m: gk.ops.path_loss(m, x, x_coef=1.0, weight=NOT_FINITE),
    "a weight of another batch": lambda x, m: gk.ops.path_loss(m, x, x_coef=1.0, weight=torch.ones(2)),
    "a weight beyond float32": lambda x, m: gk.ops.path_loss(m, x, x_coef=1.0, weight=BEYOND),
    "less than 0": lambda x, m: gk.ops.add_noise(x, -0.5, 0.5, noise=NOISE),
    "less than 0 among numbers": lambda x, m: gk.ops.add_noise(x, by_sample, 0.5, noise=NOISE),
    "less than 0 on the path": lambda x, m: gk.ops.ddim_step(x, m, 0.6, -0.8, 0.8, 0.6),
    "0 where it divides": lambda x, m: gk.ops.ddim_step(x, m, torch.tensor([0.6, 0.0, 0.6]), 0.8, 0.8, 0.6),
    "0 where it divides, denormals flushed": lambda x, m: flushed(
        lambda: gk.ops.ddim_step(x, m, torch.tensor([0.6, 0.0, 0.6]), 0.8, 0.8, 0.6)
    ),
    "0 beside tensors, denormals flushed": lambda x, m: flushed(
        lambda: gk.ops.ddim_step(x, m, 0.6, 0.0, by_sample.abs(), 0.6, prediction="sample")
    ),
    "0 beside tensors": lambda x, m: gk.ops.ddim_step(x, m, 0.6, 0.0, by_sample.abs(), 0.6, prediction="sample"),
    "too large an eta in a sample": lambda x, m: gk.ops.ddim_step(
        x, m, torch.tensor([0.6, 0.6, 0.6]), 0.8, 0.8, 0.6, eta=5.0, noise=NOISE
    ),
    "another prediction": lambda x, m: gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6, prediction="noise"),
    "bounds in disorder": lambda x, m: gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6, clip=(1.0, -1.0)),
    "a bound below 0": lambda x, m: gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6, clip=-1.0),
    "a bound that is infinite": lambda x, m: gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6, clip=math.inf),
    "no output of the network": lambda x, m: gk.ops.ddim_step(x, None, 0.6, 0.8, 0.8, 0.6),
    "no velocity, no step": lambda x, m: gk.ops.euler_step(x, None, 0.0),
    "neither velocity nor step": lambda x, m: gk.ops.euler_step(x, None, None),  # type: ignore[arg-type]
    "neither output nor coefficient": lambda x, m: gk.ops.consistency_skip(x, None, 0.5, None),
    "no second velocity": lambda x, m: gk.ops.heun_step(x, m, None, 0.0),
    "another kind": lambda x, m: gk.ops.path_loss(m, x, x_coef=1.0, kind="l3"),
    "another reduction": lambda x, m: gk.ops.path_loss(m, x, x_coef=1.0, reduction="max"),
    "no noise": lambda x, m: gk.ops.path_loss(m, x, noise_coef=1.0),
    "no data": lambda x, m: gk.ops.path_loss(m, x_coef=1.0),
    "unread noise of another shape": lambda x, m: gk.ops.add_noise(x, 1.0, 0.0, noise=torch.randn(2, 2)),
    "unread noise of another shape in a step": lambda x, m: gk.ops.ddim_step(x, m, 0.6, 0.8, 0.8, 0.6, noise=x[:2]),
    "unread noise of another shape in a loss": lambda x, m: gk.ops.path_loss(m, x, x_coef=1.0, noise=x[:2]),
    "unread booleans for noise": lambda x, m: gk.ops.path_loss(m, x, x_coef=1.0, noise=x > 0),
    "unread integers for noise": lambda x, m: gk.ops.path_loss(m, x, x_coef=1.0, noise=x.long()),
    "no state, coefficients by sample": lambda x, m: gk.ops.consistency_skip(None, m, 0.0, torch.ones(3)),
    "no state, a coefficient of 0": lambda x, m: gk.ops.consistency_skip(None, m, 0.0, 1.0),
    "no state to step from": lambda x, m: gk.ops.euler_step(None, m, 0.5),
    "no state to correct": lambda x, m: gk.ops.heun_step(None, m, m, torch.ones(3)),
    "no data to noise": lambda x, m: gk.ops.add_noise(None, 0.0, torch.ones(3), noise=m),
    "no state, a path by sample": lambda x, m: gk.ops.ddim_step(None, m, torch.ones(3), 0.8, 0.8, 0.6),
    "no state, whose coefficient is 0": lambda x, m: gk.ops.ddim_step(None, m, 0.6, 0.8, 1.0, 0, prediction="sample"),
    "a path value that is scaled": lambda x, m: gk.ops.ddim_step(
        x, m, rows.Scaled(torch.tensor([0.6]), 1.0), 0.8, 0.8, 0.6
    ),
    "a guidance scale that is scaled": lambda x, m: gk.ops.ddim_step(
        x, m, 0.6, 0.8, 0.8, 0.6, uncond=m, guidance_scale=rows.Scaled(torch.tensor([2.0]), 1.0)
    ),
    "no dimension": lambda x, m: gk.ops.path_loss(m[0, 0], x[0, 0], x_coef=torch.ones(1)),
    "more coefficients than tensors": lambda x, m: gk.ops.path_loss(m, x, h=(x,), h_coefs=(1.0, 2.0)),
    "an output of more precision": lambda x, m: gk.ops.path_loss(m.double(), x, x_coef=1.0),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_an_error_is_worded_by_python_and_nothing_is_counted(refused: str) -> None:
    x, m = pair((3, 4))

    def message() -> tuple[type, str]:
        with pytest.raises((ValueError, TypeError)) as raised:
            REFUSED[refused](x, m)
        return raised.type, str(raised.value)

    before = eager.face.eager_calls()
    assert message() == slow(message)
    assert eager.face.eager_calls() == before
    assert ":" in message()[1]


def test_a_loss_takes_lists_of_targets_as_it_takes_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    x, m = pair((3, 4))
    found: list[Tensor] = []
    monkeypatch.setattr(ops, "Row", None)
    assert taken(lambda: found.append(gk.ops.path_loss(m, h=[x, m], h_coefs=[0.5, by_sample]))) == 1
    assert torch.equal(found[0], gk.ops.path_loss(m, h=(x, m), h_coefs=(0.5, by_sample)))


def test_numbers_beyond_float32_are_numbers_of_float64_arithmetic() -> None:
    x, m = (t.double() for t in pair((3, 4)))
    torch.testing.assert_close(gk.ops.euler_step(x, m, BEYOND), x + BEYOND * m)


def test_values_are_looked_at_on_the_host_and_elsewhere_under_debug(device: torch.device) -> None:
    x, m = pair((3, 4), device)
    values = NOT_FINITE.to(device)
    if device.type == "cuda":
        assert gk.ops.path_loss(m, x, x_coef=values).isnan()
    with gk.debug(values=True), pytest.raises(ValueError, match="x_coef: expected a finite number, got nan at index 1"):
        gk.ops.path_loss(m, x, x_coef=values)


def test_a_coefficient_of_another_stride_or_precision_is_read_as_its_value() -> None:
    x, m = pair((3, 4))
    wide = torch.stack([by_sample, -by_sample], dim=1)
    assert torch.equal(gk.ops.euler_step(x, m, wide[:, 0]), gk.ops.euler_step(x, m, by_sample))
    half = by_sample.bfloat16()
    assert torch.equal(gk.ops.euler_step(x, m, half), gk.ops.euler_step(x, m, half.float()))
