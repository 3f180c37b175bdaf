"""Editing by a consistency function (algorithm 4), interpolation of initial states, and the search of times."""

from __future__ import annotations

import math

import pytest
import torch
from consistency_cases import EPS, F64, ExactFunction, f_of
from torch import nn

import genkern as gk
from genkern.methods import Blocks, Colours, search_times
from genkern.noise import Noise, Purpose
from genkern.samplers import interpolate

SHAPE = (3, 3, 8, 8)
TIMES = [80.0, 10.0, 1.0]


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 3, padding=1, dtype=F64)

    def forward(self, x, t):
        return torch.tanh(self.mix(x)) * (1 + 0.1 * t[:, None, None, None])


class Same:
    """The identity as a transform."""

    def forward(self, x):
        return x

    backward = forward


def written_out(model, y, mask, a, noise):
    """Algorithm 4 of arXiv:2303.01469, line by line."""
    known = a.forward(y) * (1 - mask)
    z = [gk.ops.randn(SHAPE, noise=noise.at(Purpose.STEP, n), dtype=F64) for n in range(len(TIMES))]
    x = a.backward(known) + TIMES[0] * z[0]
    for n, t in enumerate(TIMES):
        if n:
            x = x + math.sqrt(t**2 - EPS**2) * z[n]
        found = x.new_empty(SHAPE)
        for b in range(len(x)):  # f_of is written for [B, D]
            flat = f_of(lambda v, s: model(v.reshape(1, *SHAPE[1:]), s).flatten(1), x[b : b + 1].flatten(1),
                        torch.tensor([t], dtype=F64))  # fmt: skip
            found[b] = flat.reshape(SHAPE[1:])
        x = a.backward(known + mask * a.forward(found))
    return x


@pytest.mark.parametrize("transform", [None, Colours(), Blocks(4)])
def test_edit_is_the_papers_algorithm(transform):
    model, y, noise = Images(), torch.randn(SHAPE, dtype=F64), Noise(4)
    mask = torch.zeros(8, 8).index_fill(0, torch.arange(4), 1.0) if transform is None else transform.unknown(y)
    got = gk.Consistency().edit(model, y, mask, transform=transform, times=TIMES, noise=noise)
    expected = written_out(model, y, mask, Same() if transform is None else transform, noise)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)  # the network is told times in float32


def test_inpainting_keeps_what_is_known_to_the_bit_and_reads_nothing_else(device):
    y, mask = torch.randn(SHAPE, device=device), torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :4] = True
    y[..., :4] = math.nan
    got = gk.Consistency().edit(lambda x, t: 0.5 * x, y, mask, steps=2, seed=0)
    assert torch.equal(got[..., 4:], y[..., 4:])
    assert got.isfinite().all()
    other = y.clone()
    other[..., :4] = 7.0
    assert torch.equal(got, gk.Consistency().edit(lambda x, t: 0.5 * x, other, mask, steps=2, seed=0))


def test_all_generated_is_multistep_sampling():
    """From zeros; the first noise is that of the step instead of the initial state's."""
    consistency, y, noise = gk.Consistency(), torch.zeros(5, 2, dtype=F64), Noise(3)
    f = ExactFunction(0.8)
    got = consistency.edit(f, y, torch.ones(1), times=TIMES, noise=noise)
    z = torch.stack([gk.ops.randn((5, 2), noise=noise.at(Purpose.STEP, n), dtype=F64) for n in range(3)])
    same = consistency.sample(f, times=TIMES, noise=80.0 * z[0], step_noise=z[[1, 2, 0]], dtype=F64)
    torch.testing.assert_close(got, same, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("transform", [Colours(), Colours((1.0, 0.0, 0.0)), Blocks(2), Blocks(8)])
def test_transforms_are_orthogonal_and_keep_luminance_or_means(transform):
    x = torch.randn(SHAPE, dtype=F64)
    turned = transform.forward(x)
    torch.testing.assert_close(transform.backward(turned), x)
    torch.testing.assert_close(turned.square().sum(), x.square().sum())
    model = gk.Consistency().edit(lambda a, t: 0.3 * a, x, transform.unknown(x), transform=transform, seed=1)
    if isinstance(transform, Blocks):
        size = transform.size
        means = [torch.nn.functional.avg_pool2d(a, size) for a in (model, x)]
        torch.testing.assert_close(*means)
        torch.testing.assert_close(turned[:, :: size * size], size * means[1])
    elif transform.matrix[0, 1]:
        luminance = torch.tensor([0.299, 0.587, 0.114], dtype=F64)
        torch.testing.assert_close(*(torch.einsum("c,bchw->bhw", luminance, a) for a in (model, x)))


@pytest.mark.parametrize("change, error, words", [
    ({"mask": 1.0}, TypeError, "mask: expected a tensor, got float"),
    ({"mask": torch.full((8,), 2.0)}, ValueError, "mask: expected a number from 0 to 1, got 2 to 2"),
    ({"mask": torch.ones(7)}, ValueError, "mask: expected"),
    ({"y": torch.zeros(SHAPE, dtype=torch.float16)}, TypeError, "y: expected float32 or float64, got torch.float16"),
    ({"steps": 2, "times": [1.0]}, ValueError, "steps: expected None beside times, got 2"),
    ({"times": [1.0, 2.0]}, ValueError, "times: expected"),
    ({"transform": Blocks(3)}, ValueError, r"x: expected \[B, C, H, W\] with sides divisible by 3, got"),
    ({"transform": Colours((1.0, 1.0))}, ValueError, r"x: expected 2 channels, \[B, C, ...\], got shape"),
    ({"seed": 1, "noise": Noise(2)}, ValueError, "seed"),
])  # fmt: skip
def test_bad_argument_of_edit_is_named_before_the_network_is_called(change, error, words):
    def called(x, t):
        raise AssertionError("called")

    with pytest.raises(error, match=words):
        gk.Consistency().edit(called, **{"y": torch.zeros(SHAPE), "mask": torch.ones(8), **change})


def test_bad_transform_is_named():
    with pytest.raises(ValueError, match="weights: expected at least two numbers, not all 0, got"):
        Colours((0.0, 0.0))
    with pytest.raises(ValueError, match="size: expected an integer >= 2, got 1"):
        Blocks(1)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_interpolation_is_the_papers_formula_between_its_ends(dtype, device):
    z0, z1 = (torch.randn(4, 3, 5, device=device).to(dtype) for _ in range(2))
    found = interpolate(z0, z1, 5)
    assert found.shape == (5, 4, 3, 5) and found.dtype == dtype
    assert torch.equal(found[0], z0) and torch.equal(found[4], z1)
    a, b = z0.double().flatten(1), z1.double().flatten(1)
    psi = torch.acos((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)))[:, None]
    for k, place in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        expected = (torch.sin((1 - place) * psi) * a + torch.sin(place * psi) * b) / torch.sin(psi)
        torch.testing.assert_close(found[k].flatten(1), expected.to(dtype))


def test_interpolation_keeps_length_on_the_sphere_and_is_linear_between_parallel_states():
    z0, z1 = (torch.nn.functional.normalize(torch.randn(4, 30, dtype=F64), dim=1) for _ in range(2))
    torch.testing.assert_close(interpolate(z0, z1, [0.1, 0.6]).norm(dim=2), torch.ones(2, 4, dtype=F64))
    torch.testing.assert_close(interpolate(z0, 3.0 * z0, [0.25])[0], 1.5 * z0)
    assert torch.equal(interpolate(z0, z0, 3), z0.expand(3, 4, 30))
    assert interpolate(z0, -z0, [0.5])[0].abs().max() < 1e-15


@pytest.mark.parametrize("at, words", [(1, "at: expected an integer >= 2, got 1"), ([2.0], "at: expected a number fr")])
def test_bad_place_of_an_interpolation_is_named(at, words):
    with pytest.raises(ValueError, match=words):
        interpolate(torch.zeros(2, 2), torch.zeros(2, 2), at)


def test_search_finds_the_best_times_of_a_quality_that_falls_and_rises():
    candidates, calls = gk.Consistency().times(40)[:0:-1].tolist(), []
    best = [candidates[0], candidates[11], candidates[25], candidates[30]]

    def quality(times):
        calls.append(tuple(times))
        return sum(abs(math.log(t / b)) for t, b in zip(times, best, strict=False)) - len(times)

    times, values = search_times(quality, candidates, 4)
    assert times == best
    assert values == pytest.approx([-1.0, -2.0, -3.0, -4.0])
    assert len(set(calls)) == len(calls) < 3 * 2 * math.log(40) / math.log(1.5) + 4


@pytest.mark.parametrize("count, steps", [(1, 1), (2, 2), (5, 5), (7, 3)])
def test_search_leaves_room_for_the_times_that_follow(count, steps):
    candidates = [float(count - k) for k in range(count)]
    times, values = search_times(lambda times: times[-1], candidates, steps)
    assert len(times) == len(values) == steps
    assert times == [float(count), *(float(steps - k) for k in range(1, steps))]


@pytest.mark.parametrize("call, error, words", [
    (lambda: search_times(3, [1.0], 1), TypeError, "quality: expected a callable of times, got int"),
    (lambda: search_times(lambda t: 0.0, [1.0, 2.0], 1), ValueError, "candidates: expected strictly decreasing"),
    (lambda: search_times(lambda t: 0.0, [2.0, 1.0], 3), ValueError, "steps: expected an integer from 1 to 2, got 3"),
    (lambda: search_times(lambda t: math.nan, [2.0], 1), ValueError, r"quality: expected a number, got NaN at .*\[2.0"),
])  # fmt: skip
def test_bad_argument_of_the_search_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
