"""Distillation from a guided teacher: fixed, a scale a sample, and scales drawn and told to the student."""

from __future__ import annotations

import pytest
import torch
from consistency_cases import F64, SHAPE, Net, gradient

import genkern as gk
from genkern.noise import Noise, Purpose

Y, EMPTY = torch.linspace(-1, 1, 6, dtype=F64), torch.zeros(6, dtype=F64)


class Guided:
    """The guided teacher as one network."""

    def __init__(self, inner, w):
        self.inner, self.w = inner, w

    def __call__(self, x, t, y):
        without = self.inner(x, t, EMPTY.to(x.device))
        return without + self.w * (self.inner(x, t, y) - without)


class Told(Net):
    """A student that is told w."""

    def forward(self, x, t, y=None, w=None):
        self.w = w
        return super().forward(x, t, y) + (0 if w is None else 0.1 * w.to(x.dtype)[:, None])


def options(device):
    return {"cond": {"y": Y.to(device)}, "n": torch.tensor([0, 1, 5, 9, 15, 16], device=device), "noise": Noise(2)}


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2s"])
@pytest.mark.parametrize("w", [3.0, torch.linspace(0, 5, 6, dtype=F64)])
def test_guided_teacher_is_the_teacher_that_guides_itself(solver, w, device):
    consistency, student, teacher = gk.Consistency(), Net().to(device), Net().to(device)
    x, more = torch.randn(SHAPE, dtype=F64, device=device), {**options(device), "solver": solver}
    w = w.to(device) if isinstance(w, torch.Tensor) else w
    column = w[:, None] if isinstance(w, torch.Tensor) else w
    expected = consistency.loss(student, x, teacher=Guided(teacher, column), **more)
    got = consistency.loss(student, x, teacher=teacher, guidance_scale=w, uncond={"y": EMPTY.to(device)}, **more)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient(got, student), gradient(expected, student))


def test_scales_are_drawn_between_their_bounds_and_told_to_student_and_target(device):
    consistency, student, target, teacher = gk.Consistency(), Told().to(device), Told().to(device), Net().to(device)
    x, more = torch.randn(SHAPE, dtype=F64, device=device), options(device)
    guided = {"uncond": {"y": EMPTY.to(device)}, "guidance_name": "w", "target": target}
    got = consistency.loss(student, x, teacher=teacher, guidance_scale=(2.0, 14.0), **guided, **more)
    u = gk.ops.uniform((6,), noise=more["noise"].at(Purpose.TIMES, 3), dtype=F64, device=device)
    torch.testing.assert_close(student.w, (2.0 + 12.0 * u).float())
    assert torch.equal(student.w, target.w)
    given = consistency.loss(student, x, teacher=teacher, guidance_scale=2.0 + 12.0 * u, **guided, **more)
    torch.testing.assert_close(got, given)


@pytest.mark.parametrize("more, words", [
    ({"guidance_scale": 2.0}, "uncond: expected conditions beside guidance_scale, got None"),
    ({"uncond": {}}, "uncond: expected None without guidance_scale"),
    ({"guidance_name": "w"}, "guidance_name: expected None without guidance_scale"),
    ({"guidance_scale": 2.0, "uncond": {}, "guidance_name": "a b"}, "guidance_name: expected the name of a keyword"),
    ({"guidance_scale": (3.0, 2.0), "uncond": {}}, r"guidance_scale\[1\]: expected a finite number >= 3, got 2.0"),
    ({"guidance_scale": (1.0, 2.0, 3.0), "uncond": {}}, r"guidance_scale: expected \(low, high\), got"),
    ({"guidance_scale": 2.0, "uncond": {"y": torch.zeros(5)}}, r"uncond\['y'\]: expected dimension 0 to be the batch"),
])  # fmt: skip
def test_bad_guidance_is_named_before_a_network_is_called(more, words):
    def called(*args, **kwargs):
        raise AssertionError("called")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        gk.Consistency().loss(called, torch.zeros(SHAPE), teacher=called, **more)
    assert torch.equal(torch.get_rng_state(), before)
