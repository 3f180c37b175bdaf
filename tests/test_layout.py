"""The passes of a loop are laid out once for a table of stages; a step asks torch for its pass alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from eager_ways import connected, slow, taken
from watching import Calls

import genkern as gk
from genkern import check, spec
from genkern.fused import prepared
from genkern.rows import Out, Row
from genkern.samplers import editing, layout, passes
from genkern.samplers.table import Stage

SHAPE = (3, 4, 2)


def wavy(x, t, **cond):
    return torch.sin(x + t.to(x.dtype)[:, None, None])


def guided(x, t, label):
    return wavy(x, t) * label[:, None, None]


def laid_out(monkeypatch, run):
    """How many rows a call lays out."""
    count, real = [], layout.prepared
    with monkeypatch.context() as patch:
        patch.setattr(layout, "prepared", lambda *a: count.append(1) or real(*a))
        run()
    return len(count)


@pytest.mark.parametrize("sampler, draws", [("ddim", False), ("dpmpp_2m", False), ("ddpm", True), ("heun", False)])
def test_a_second_loop_lays_nothing_out_and_has_the_bits_of_the_first(sampler, draws, monkeypatch):
    diffusion, x = gk.Diffusion(), torch.randn(SHAPE)

    def run(seed, start=x):
        return diffusion.sample(wavy, noise=start, steps=6, sampler=sampler, seed=seed)

    def anew(seed):
        return gk.Diffusion().sample(wavy, noise=x, steps=6, sampler=sampler, seed=seed)

    first = run(1)
    assert laid_out(monkeypatch, lambda: run(2)) == laid_out(monkeypatch, lambda: run(1, x[:2])) == 0
    assert torch.equal(run(1), first)
    assert torch.equal(run(2), anew(2))
    assert torch.equal(run(2), first) is not draws


def test_another_way_of_running_a_table_is_laid_out_anew():
    diffusion, x = gk.Diffusion(), torch.randn(SHAPE)
    cond = {"cond": {"label": torch.full((3,), 2.0)}, "uncond": {"label": torch.zeros(3)}}
    known = {"mask": torch.rand(SHAPE) < 0.5, "known": torch.randn(SHAPE)}
    ways = [
        {},
        {"clip": 1.0},
        {"clip": 0.5},
        {"clip": gk.DynamicThreshold(0.9)},
        {"model_dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"dtype": torch.float64, "model_dtype": torch.float32},
        {"differentiable": True},
        {"step_noise": torch.randn(6, *SHAPE)},
        known,
        {**cond, "guidance_scale": 1.5, "differentiable": True},
        *({**cond, "guidance_scale": w} for w in (1.5, 3.0, torch.tensor([1.0, 2.0, 3.0]))),
        {**cond, "guidance_scale": 1.5, "guidance_rescale": 0.7},
        {**cond, "guidance_scale": 1.5, "guidance_interval": (0.0, 500.0)},
    ]

    def run(by, way):
        network = guided if "cond" in way else wavy
        return by.sample(network, noise=x, steps=6, sampler="ddpm", seed=0, **way)

    for way in [*ways, *reversed(ways)]:
        assert torch.equal(run(diffusion, way), run(gk.Diffusion(), way))
    for way in ways[1:]:  # right after the plain one, which is kept
        run(diffusion, {})
        assert torch.equal(run(diffusion, way), run(gk.Diffusion(), way))


def test_a_second_loop_packs_no_row_of_one_that_draws(monkeypatch):
    diffusion, x = gk.Diffusion(), torch.randn(SHAPE)

    def run():
        return diffusion.sample(wavy, noise=x, steps=6, sampler="ddpm", seed=3)

    expected = run()
    monkeypatch.setattr(passes, "packed", lambda spec: pytest.fail("a row was packed"))
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("draw", [(1, 2, 3), (-5, 2**62, 7)])
def test_a_packed_call_with_another_key(draw):
    row = Row((Out(x=0.5, z=2.0),))
    found, _ = prepared(row, gk.Noise(1, stream=2).at(3), torch.empty(4), 0, (torch.float32,))
    assert spec.keyed(spec.packed(found), draw) == spec.packed(found._replace(key=draw))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_second_loop_asks_no_path_how_much_is_known(sampler, monkeypatch):
    diffusion, x = gk.Diffusion(), torch.randn(SHAPE)
    known = {"mask": torch.rand(SHAPE) < 0.5, "known": torch.randn(SHAPE)}

    def run(by=diffusion):
        return by.sample(wavy, noise=x, steps=6, sampler=sampler, seed=3, **known)

    assert laid_out(monkeypatch, run) == 6
    expected = run(gk.Diffusion())
    monkeypatch.setattr(editing, "weights_of", lambda *a: pytest.fail("the path was asked"))
    assert torch.equal(run(), expected)


LABELS = [{"label": torch.full((3,), float(k))} for k in range(3)]
EXPLICIT = {
    "several": {"cond": LABELS[1:], "guidance_scale": (2.0, 3.0)},
    "apg": {"cond": LABELS[1], "apg": gk.APG()},
    "guide": {"cond": LABELS[1], "guide": lambda x, t, y: y.square().sum(), "guide_scale": 0.1},
}


@pytest.mark.parametrize("form", EXPLICIT)
def test_guidance_beside_the_row_is_laid_out_once(form, monkeypatch):
    diffusion, x = gk.Diffusion(), torch.randn(SHAPE)
    options = {"uncond": LABELS[0], "guidance_scale": 2.0, **EXPLICIT[form]}

    def run():
        return diffusion.sample(guided, noise=x, steps=6, sampler="ddim", seed=0, **options)

    expected = run()
    assert laid_out(monkeypatch, run) == 0
    assert torch.equal(run(), expected)


def test_the_way_asked_for_last_is_kept(monkeypatch):
    diffusion, x = gk.Diffusion(), torch.randn(SHAPE)

    def run(clip):
        return laid_out(monkeypatch, lambda: diffusion.sample(wavy, noise=x, steps=6, sampler="ddim", clip=clip))

    assert [run(clip) for clip in (1.0, 2.0, 1.0, 3.0, 1.0)] == [6, 6, 0, 6, 0]


class Counted(Stage):
    read = 0

    @property
    def input_scale(self):
        type(self).read += 1
        return 1.0

    @input_scale.setter
    def input_scale(self, value):
        pass


def test_a_loop_looks_at_its_stages_a_fixed_number_of_times(monkeypatch):
    class Own:
        order = 1

        def stages(self, network, grid):
            made = gk.samplers.Euler().stages(network, grid)
            fields = [field.name for field in dataclasses.fields(Stage)]
            return [Counted(**{name: getattr(s, name) for name in fields}) for s in made]

    def read(steps):
        Counted.read = 0
        gk.FlowMatching().sample(lambda x, t: x, x0=torch.randn(SHAPE), steps=steps, sampler=Own())
        return Counted.read

    assert 0 < read(40) < 2.5 * read(20)


def test_a_compiled_loop_packs_nothing_and_is_not_kept(monkeypatch):
    diffusion, x = gk.Diffusion(), torch.randn(SHAPE)

    def run(clip):
        return diffusion.sample(wavy, noise=x, steps=3, sampler="ddpm", seed=1, clip=clip)

    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    found = torch.compile(run, backend="eager")(1.0)
    assert not [reason for reason in breaks if "truct" in reason]
    assert laid_out(monkeypatch, lambda: torch.testing.assert_close(found, run(1.0))) == 3
    assert laid_out(monkeypatch, lambda: run(1.0)) == 0


@pytest.mark.parametrize("sampler, of_step", [("euler", 1), ("heun", 2), ("ab2", 1), ("rk4", 4)])
def test_a_step_asks_torch_for_its_passes_alone(sampler, of_step):
    flow, x0 = gk.FlowMatching(), torch.randn(SHAPE)

    def asked(steps):
        flow.sample(lambda x, t: x, x0=x0, steps=steps, sampler=sampler)
        with Calls() as calls:
            flow.sample(lambda x, t: x, x0=x0, steps=steps, sampler=sampler)
        return sorted(calls.names)

    few, many = asked(4), asked(9)
    assert many == sorted([*few, *["map_numbers" if "map_numbers" in few else "map"] * (5 * of_step)])


@connected
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_3m", "unipc"])
def test_a_step_goes_past_the_dispatcher_and_is_checked_there(sampler, monkeypatch):
    diffusion, x = gk.Diffusion(), torch.randn(SHAPE)

    def run():
        return diffusion.sample(wavy, noise=x, steps=7, sampler=sampler, seed=0)

    expected = slow(run)
    monkeypatch.setattr(check, "separate", lambda *a: pytest.fail("a pass was checked in Python"))
    assert taken(run) == 1 + 7
    assert torch.equal(run(), expected)


@pytest.mark.parametrize(
    "returned",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: torch.complex(x, -x).conj().imag,
        lambda x: torch.nn.Parameter(x.clone()),
        lambda x: x.double(),
        lambda x: x.view(SHAPE),
    ],
    ids=["transposed", "strided", "negative", "parameter", "double", "view of the input"],
)
def test_whatever_holds_the_networks_output_the_numbers_are_the_same(returned):
    flow, x0 = gk.FlowMatching(), torch.randn(SHAPE)
    expected = flow.sample(lambda x, t: x.clone(), x0=x0, steps=5, sampler="heun")
    assert torch.equal(flow.sample(lambda x, t: returned(x), x0=x0, steps=5, sampler="heun"), expected)


def test_an_output_that_overlaps_the_next_state_is_refused():
    seen = []

    def network(x, t):
        seen.append(x)
        state = seen[0].reshape(-1)  # where the second call's pass writes
        return x.clone() if len(seen) == 1 else torch.as_strided(state, (2, 3), (1, 1), state.storage_offset() + 1)

    with pytest.raises(ValueError, match="out: expected m itself or memory apart from it, got a partial overlap"):
        gk.FlowMatching().sample(network, x0=torch.randn(2, 3), steps=4, sampler="euler")
