"""What every loss() keeps to: it compiles, checks before it draws, and keeps no tensor that a tracer made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import genkern as gk

SHAPE = (6, 3, 4)


def losses() -> dict[str, Callable[..., Tensor]]:
    """loss() of every method, under one signature; methods that have kept no table yet."""
    consistency, diffusion = gk.Consistency(), gk.Diffusion(prediction="v")
    learned = gk.Diffusion(variance="learned_range")
    gamma = [t / 1000.0 for t in range(1000)]
    return {
        "diffusion": gk.Diffusion().loss,
        "weighted": lambda model, x, **o: diffusion.loss(
            model, x, weighting="min_snr", offset_noise=x[:, :1], times=None if "t" in o else "stratified", **o
        ),
        "antithetic": lambda model, x, **o: diffusion.loss(model, x, weighting=gamma, times="antithetic", **o),
        "learned": lambda model, x, **o: learned.loss(lambda x, t: torch.cat([model(x, t)] * 2, dim=1), x, **o),
        "continuous": gk.Diffusion("continuous_vp").loss,
        "flow": gk.FlowMatching(sigma_min=0.1).loss,
        "rectified": gk.RectifiedFlow().loss,
        "coupled": lambda model, x, **o: gk.RectifiedFlow().loss(model, x, x.flip(0), **o),
        "teacher": consistency.teacher_loss,
        "distillation": lambda model, x, **o: consistency.loss(model, x, teacher=model, **o),
    }


every_loss = pytest.mark.parametrize("name", losses())


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_loss
def test_loss_without_noise_compiles_once_and_follows_manual_seed(name: str, kernels: None) -> None:
    loss, weight, x = losses()[name], torch.tensor(0.5, requires_grad=True), torch.randn(SHAPE)

    def run(x: Tensor) -> Tensor:
        return loss(lambda x, t: weight * x.sin(), x)

    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(run, fullgraph=True, backend=counter)
    torch.manual_seed(3)
    first, second = traced(x), traced(x)
    torch.manual_seed(3)
    expected = run(x)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(*(torch.autograd.grad(found, weight) for found in (first, expected)))
    assert float(second.detach()) != float(first.detach())
    assert counter.frame_count == 1


@every_loss
def test_what_fake_tensors_made_is_not_kept(name: str) -> None:
    loss, x = losses()[name], torch.randn(SHAPE)
    with FakeTensorMode():
        assert loss(lambda x, t: x, torch.empty(SHAPE), noise=gk.Noise(1)).shape == ()
    expected = losses()[name](lambda x, t: x, x, noise=gk.Noise(1))
    assert torch.equal(loss(lambda x, t: x, x, noise=gk.Noise(1)), expected)
    with FakeTensorMode():  # nor is what is kept given to them
        assert loss(lambda x, t: x, torch.empty(SHAPE), noise=gk.Noise(1)).shape == ()


@every_loss
@pytest.mark.parametrize("options, error, words", [
    ({"kind": "foo"}, ValueError, "kind: expected one of 'l2', 'l1', 'pseudo_huber', got 'foo'"),
    ({"reduction": "foo"}, ValueError, "reduction: expected one of"),
    ({"cond": 5}, TypeError, "cond: expected a mapping"),
    ({"mask": torch.ones(7)}, ValueError, "mask: expected a shape that broadcasts"),
    ({"weight": torch.ones(5)}, ValueError, "weight: expected a number, one element, or shape"),
    ({"weight": "heavy"}, TypeError, "weight: expected a number"),
    ({"model_dtype": torch.int32}, TypeError, "model_dtype: expected float32, .*, got torch.int32"),
    ({"model_dtype": "float32"}, TypeError, "model_dtype: expected float32, .*, got 'float32'"),
    ({"generator": 5}, TypeError, "generator: expected a torch.Generator, got int"),
    ({"noise": 5}, TypeError, "noise: expected a Noise or a tensor, got int"),
    ({"wieght": 1.0}, TypeError, "loss.. got an unexpected keyword argument 'wieght'"),
])  # fmt: skip
def test_a_loss_that_is_refused_draws_nothing(
    name: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    state, called = torch.get_rng_state(), []
    with pytest.raises(error, match=words):
        losses()[name](
            lambda x, t, **c: called.append(1) or x, torch.randn(SHAPE, generator=torch.Generator()), **options
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert not called


@pytest.mark.parametrize("name, options, words", [
    ("diffusion", {"t": 1000}, "t: expected an integer from 0 to 999"),
    ("continuous", {"t": 1.5}, "t: expected a number from 0 to 1"),
    ("flow", {"t": -0.5}, "t: expected a number from 0 to 1"),
    ("rectified", {"t": 2.0}, "t: expected a number from 0 to 1"),
    ("teacher", {"std": -1.0}, "std: expected a finite number >= 0"),
    ("teacher", {"sigma": 0.0}, "sigma: expected a finite number >= 0.002"),
    ("distillation", {"n": 17}, "n: expected an integer from 0 to 16"),
])  # fmt: skip
def test_a_time_that_is_refused_draws_nothing(name: str, options: dict[str, Any], words: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        losses()[name](lambda x, t: x, torch.zeros(SHAPE), **options)
    assert torch.equal(torch.get_rng_state(), state)


@every_loss
def test_a_weight_that_returns_nothing_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"weight: expected a number or a tensor \[B\] from the callable, got None"):
        losses()[name](lambda x, t: x, torch.zeros(SHAPE), weight=lambda t: None)


@every_loss
def test_what_a_transform_made_is_not_kept(name: str) -> None:
    loss, x = losses()[name], torch.randn(SHAPE)

    def of(weight: Tensor) -> Tensor:
        return loss(lambda x, t: weight * x.sin(), x, noise=gk.Noise(1))

    weight = torch.tensor(0.5, requires_grad=True)
    slope = torch.func.grad(of)(weight.detach())
    torch.testing.assert_close(torch.autograd.grad(of(weight), weight)[0], slope)


@every_loss
def test_a_loss_in_inference_mode_leaves_the_next_one_its_gradient(name: str) -> None:
    loss, x, weight = losses()[name], torch.randn(SHAPE), torch.tensor(0.5, requires_grad=True)

    def of() -> Tensor:
        return loss(lambda x, t: weight * x.sin(), x, noise=gk.Noise(1), reduction="sum")

    with torch.inference_mode():
        expected = of()
    found = of()
    torch.testing.assert_close(found, expected.clone())
    assert float(torch.autograd.grad(found, weight)[0]) != 0.0


def test_importance_sampling_compiles_once_and_records(kernels: None) -> None:
    diffusion, x = gk.Diffusion(timesteps=25, schedule="squared_cosine"), torch.randn(SHAPE)
    samplers = [gk.methods.times.LossSecondMoment(25, history=1) for _ in range(2)]

    def run(x: Tensor, times: gk.methods.times.LossSecondMoment, noise: gk.Noise) -> Tensor:
        return diffusion.loss(lambda x, t: x.sin(), x, times=times, noise=noise)

    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(run, fullgraph=True, backend=counter)
    for step in range(12):
        noise = gk.Noise(1, stream=torch.tensor([step]))
        torch.testing.assert_close(traced(x, samplers[0], noise), run(x, samplers[1], noise))
    assert counter.frame_count == 1
    assert torch.equal(samplers[0].counts, samplers[1].counts)
    torch.testing.assert_close(samplers[0].losses, samplers[1].losses)
