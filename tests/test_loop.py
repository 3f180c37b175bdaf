"""cuda_graph=True: whatever is asked of a captured loop, it returns the bits of the uncaptured one.

On the CPU, with a capture that records operations and runs them again (fake_capture.py); test_loop_cuda.py has the GPU.
"""

from __future__ import annotations

import functools

import pytest
import torch
from fake_capture import FakeCapture
from loop_cases import FLOW, OPTIONS, SAMPLERS, Net, same
from test_samplers import SHAPE, conditioned, every_family, rotating, runs

import genkern as gk
from genkern.graphs import plan


@every_family
@pytest.mark.parametrize("given", OPTIONS)
def test_captured_loop_has_the_bits_of_the_uncaptured_one(family, given, captures):
    options, sample = OPTIONS[given], runs()[family]

    def model(x, t):
        return rotating(x, t)

    wanted = sample(model, **options)
    for _ in range(3):
        same(sample(model, **options, cuda_graph=True), wanted)
    assert captures and all(graph.replays for capture in captures for graph in capture.graphs)


@every_family
@pytest.mark.parametrize("w", [2.5, torch.tensor([1.5]), torch.tensor([0.0, 1.0, 2.0, 3.5, -1.0])])
@pytest.mark.parametrize("more", [{}, {"model_dtype": torch.bfloat16}, {"batch_size": 2, "return_trajectory": True}])
def test_guidance_is_captured_once_and_each_call_has_its_own_scale(family, w, more, captures):
    sample = runs()[family]

    def model(x, t, y):
        return conditioned(x, t, y)

    made = None
    for seed in range(3):
        options = {"cond": {"y": torch.rand(5)}, "uncond": {"y": torch.rand(5)}, "guidance_scale": w - seed}
        wanted = sample(model, seed=seed, **options, **more)
        same(sample(model, seed=seed, **options, **more, cuda_graph=True), wanted)
        made = made or [len(capture.graphs) for capture in captures]
        assert [len(capture.graphs) for capture in captures] == made


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_every_sampler_of_diffusion_is_captured(name, prediction, steps, captures):
    method, model = gk.Diffusion(prediction=prediction), Net()
    for seed in range(2):
        options = {"steps": steps, "sampler": name, "seed": seed, "model_dtype": torch.float16} | SAMPLERS[name]

        def call(x, t):
            return rotating(x, t)

        same(method.sample(call, SHAPE, **options, cuda_graph=True), method.sample(call, SHAPE, **options))
    x = torch.randn(SHAPE)
    loop = gk.Loop(method, model)
    same(method.encode(model, x, steps=3, cuda_graph=loop), method.encode(model, x, steps=3))


def test_the_churn_of_a_given_start_is_captured(captures):
    method, options, x = gk.Diffusion(), SAMPLERS["churn"], torch.randn(SHAPE)
    plain = method.sample(rotating, noise=x, **(options | {"sampler": "heun"}))
    for seed in range(2):
        wanted = method.sample(rotating, noise=x, seed=seed, **options)
        assert not torch.equal(wanted, plain)
        same(method.sample(rotating, noise=x, seed=seed, **options, cuda_graph=True), wanted)


@pytest.mark.parametrize("path", ["kernel", "reference"], indirect=True)
def test_both_paths_are_captured(path, captures):
    for name in ("ddim", "rectified", "unipc", "sde"):
        sample = runs()[name]
        options = {"cond": {"y": torch.ones(5)}, "uncond": {"y": torch.zeros(5)}, "guidance_scale": 2.0, "seed": 3}

        def model(x, t, y):
            return conditioned(x, t, y)

        same(sample(model, **options, cuda_graph=True), sample(model, **options))


def test_each_call_draws_its_own_noise_and_the_network_is_not_called_again(captures):
    model, sample = Net().eval(), runs()["ddpm"]
    loop = gk.Loop(gk.Diffusion(prediction="v"), model)
    run = functools.partial(loop.sample, SHAPE, steps=4, sampler="ddpm")
    first = run(seed=1)
    called, copy = model.calls[0], first.clone()
    others = [run(seed=seed) for seed in (2, 1 << 63, (1 << 64) - 1, 1)]
    assert model.calls[0] == called
    for seed, other in zip((2, 1 << 63, (1 << 64) - 1, 1), others, strict=True):
        assert torch.equal(other, sample(model, seed=seed))
    assert torch.equal(first, copy) and torch.equal(first, others[-1])
    assert len({x.data_ptr() for x in (first, *others)}) == 5
    torch.manual_seed(0)
    drawn = run(), run()
    torch.manual_seed(0)
    assert torch.equal(run(), drawn[0]) and not torch.equal(*drawn)


def test_conditions_are_copied_in_at_every_call(captures):
    model = Net().eval()
    loop = gk.Loop(FLOW, model)
    for k in range(3):
        cond = {"y": torch.rand(5), "more": {"z": [torch.rand(5)]}, "flag": "word"}
        wanted = FLOW.sample(model, SHAPE, steps=3, seed=k, cond=cond)
        same(loop.sample(SHAPE, steps=3, seed=k, cond=cond), wanted)
    assert loop.captured == 1
    loop.sample(SHAPE, steps=3, cond={**cond, "flag": "another"})
    assert loop.captured == 2


def test_callback_and_progress_come_between_steps(captures, capsys):
    model, seen = Net().eval(), {False: [], True: []}
    for graphed in seen:
        FLOW.sample(
            model, SHAPE, steps=4, sampler="heun", seed=1, cuda_graph=graphed, progress=True,
            callback=lambda k, t, x, graphed=graphed: seen[graphed].append((k, t, x, model.calls[0])),
        )  # fmt: skip
    assert "4/4" in capsys.readouterr().err
    for (k, t, x, _), (other_k, other_t, other_x, _) in zip(*seen.values(), strict=True):
        assert (k, t) == (other_k, other_t) and torch.equal(x, other_x)
    assert len({calls for *_, calls in seen[True]}) == 1  # all steps are replays


def test_a_short_loop_is_one_graph_and_steps_are_captured_when_they_are_watched(captures):
    short, model = FakeCapture.step_seconds < plan.SHORT, Net().eval()
    loop = gk.Loop(FLOW, model)
    loop.sample(SHAPE, steps=6, seed=0)
    (capture,) = captures
    assert [graph.replays for graph in capture.graphs] == ([1, 1] if short else [4, 3])  # 1: timed
    loop.sample(SHAPE, steps=6, seed=0, return_trajectory=True)
    assert [graph.replays for graph in capture.graphs] == ([4, 1, 3] if short else [7, 6])


def test_paths_whose_stages_are_equal_do_not_share_a_capture(captures):
    """A flow's ODE rows are of the velocity alone; what is known and APG's data are of the path."""
    straight, other = gk.FlowMatching(), gk.FlowMatching(path="cosine")

    def call(x, t, y=None):
        return rotating(x, t) if y is None else conditioned(x, t, y)

    y = {"cond": {"y": torch.zeros(5)}, "uncond": {"y": torch.ones(5)}, "guidance_scale": 2.0}
    edits = {"mask": torch.rand(SHAPE) > 0.5, "known": torch.randn(SHAPE)}
    for options in (edits, {**y, "apg": gk.APG()}):
        for flow in (straight, other, straight):
            given = {"steps": 4, "seed": 3, **options}
            same(flow.sample(call, SHAPE, **given, cuda_graph=True), flow.sample(call, SHAPE, **given))
