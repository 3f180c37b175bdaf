"""Whole sampling loops over small networks, and a training step around the network, as cases.

Every contender calls the same eager network on the same times; torch.compile is given the update. The row "network
alone" is the same calls of the network, at the states that the loop visits, with nothing around them: what a loop
cannot be faster than; and so is one CUDA graph of these calls for a loop of captured graphs. The larger networks
compute in bfloat16, around a float32 state.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import genkern as gk
from genkern.noise import Purpose

from . import networks, peers
from .baselines import Careful, Textbook, per_sample
from .world import CAREFUL, COMPILED, FLOOR, FLOOR_GRAPHED, GENKERN, GRAPHED, TEXTBOOK, Case, Run, World

STEPS = peers.DDIM_STEPS
BATCH, WIDTH = 256, 64
IMAGES, CHANNELS, SIDE = 8, 3, 32
LATENTS = 4  # channels of the transformer's state
FEW = 20  # steps over the larger networks


class MLP(nn.Module):
    """A velocity or epsilon of states [B, 64]: two layers, the time as one more input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH + 1, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        joined = torch.cat([x, t.to(x.dtype)[:, None]], dim=1)
        return self.last(torch.nn.functional.silu(self.first(joined)))


class ConvNet(nn.Module):
    """A velocity of images [B, 3, 32, 32]: three convolutions, the time added to the first's channels."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, hidden, 3, padding=1)
        self.time = nn.Linear(1, hidden)
        self.middle = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.last = nn.Conv2d(hidden, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) + self.time(t.to(x.dtype)[:, None])[:, :, None, None]
        return self.last(torch.nn.functional.silu(self.middle(torch.nn.functional.silu(h))))


def _seeded(network: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network().to(device, dtype).eval().requires_grad_(False)


def _flow(world: World, network: Any, shape: tuple[int, ...], name: str, steps: int) -> Case:
    """x + dt v(x, t) from t = 0 to 1, over a network with a layer `last`, in its own dtype."""
    inner, dtype = network, next(network.parameters()).dtype
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(world.device)
    grid = torch.arange(steps, device=world.device, dtype=torch.float32) / steps
    times, dt, flow = grid[:, None].expand(steps, shape[0]).contiguous(), 1.0 / steps, gk.FlowMatching()

    def cast(network: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return network if dtype == torch.float32 else lambda x, t: network(x.to(dtype), t).float()

    network = cast(inner)
    visited = _visited(flow, inner, x0=x0, steps=steps, sampler="euler").to(dtype)

    def loop(update: Callable[[Tensor, Tensor], Tensor]) -> Run:
        def run() -> Tensor:
            x = x0.clone()
            for t in times:
                x = update(x, network(x, t))
            return x

        return run

    def textbook() -> Tensor:
        x = x0
        for k in range(steps):
            x = Textbook.euler_step(x, network(x, torch.full(shape[:1], k / steps, device=world.device)), dt)
        return x

    compiled = world.compiled(lambda x, v: x.copy_(Textbook.euler_step(x, v, dt)))
    case = world.case(name, "loop", [], {
        GENKERN: functools.partial(flow.sample, inner, x0=x0, steps=steps, sampler="euler"),
        TEXTBOOK: textbook,
        CAREFUL: loop(lambda x, v: Careful.euler_step(x, v, dt, x)),
        COMPILED: None if compiled is None else loop(compiled),
        FLOOR: lambda: [inner(x, t) for x, t in zip(visited, times, strict=False)][-1],
    })  # fmt: skip
    case.dtype = case.dtype if dtype == torch.float32 else "mixed"
    negated = copy.deepcopy(inner)
    negated.last.weight.neg_()
    negated.last.bias.neg_()
    peers.add(case, "diffusers", peers.diffusers_euler_loop, cast(negated), x0, times)
    peers.add(case, "torchdiffeq", peers.torchdiffeq_loop, network, x0, steps, "euler")
    peers.add(case, "flow_matching", peers.flow_matching_loop, network, x0, steps, "euler")
    return _loop(case, steps, world)


def flow_mlp(world: World) -> Case:
    """Euler's method over an MLP."""
    return _flow(world, _seeded(MLP, world.device), (BATCH, WIDTH), f"flow, Euler, MLP {BATCH}x{WIDTH}", STEPS)


def flow_conv(world: World) -> Case:
    """Euler's method over a small convolutional network."""
    shape = (IMAGES, CHANNELS, SIDE, SIDE)
    return _flow(world, _seeded(ConvNet, world.device), shape, f"flow, Euler, conv {IMAGES}x{SIDE}x{SIDE}", 20)


def unet_name(batch: int) -> str:
    """The name of a case of flow_unet()."""
    return f"flow, Euler, UNet {batch}x{CHANNELS}x{SIDE}x{SIDE}"


def flow_unet(world: World, batch: int) -> Case:
    """Euler's method over a small UNet."""
    network = _seeded(networks.UNet, world.device, torch.bfloat16)
    return _flow(world, network, (batch, CHANNELS, SIDE, SIDE), unet_name(batch), FEW)


def dit_name() -> str:
    """The name of the case of flow_dit()."""
    return f"flow, Euler, DiT-S/2 {IMAGES}x{LATENTS}x{SIDE}x{SIDE}"


def flow_dit(world: World) -> Case:
    """Euler's method over a transformer of the size of DiT-S/2."""
    network = _seeded(networks.DiT, world.device, torch.bfloat16)
    return _flow(world, network, (IMAGES, LATENTS, SIDE, SIDE), dit_name(), FEW)


def heun_mlp(world: World) -> Case:
    """Heun's method over an MLP: two calls a step."""
    network, dt, flow = _seeded(MLP, world.device), 1.0 / STEPS, gk.FlowMatching()
    x0 = torch.randn((BATCH, WIDTH), generator=torch.Generator().manual_seed(0)).to(world.device)
    grid = torch.arange(STEPS + 1, device=world.device, dtype=torch.float32) / STEPS
    times = grid[:, None].expand(STEPS + 1, BATCH).contiguous()

    def textbook() -> Tensor:
        x = x0
        for k in range(STEPS):
            v = network(x, torch.full((BATCH,), k / STEPS, device=world.device))
            v_next = network(x + dt * v, torch.full((BATCH,), (k + 1) / STEPS, device=world.device))
            x = Textbook.heun_step(x, v, v_next, dt)
        return x

    def loop(predict: Callable[..., Tensor], correct: Callable[..., Tensor]) -> Run:
        def run() -> Tensor:
            x, point = x0.clone(), torch.empty_like(x0)
            for k in range(STEPS):
                v = network(x, times[k])
                correct(x, v, network(predict(x, v, point), times[k + 1]))
            return x

        return run

    def predict(x: Tensor, v: Tensor, point: Tensor) -> Tensor:
        return point.copy_(Textbook.euler_step(x, v, dt))

    def correct(x: Tensor, v: Tensor, v_next: Tensor) -> Tensor:
        return x.copy_(Textbook.heun_step(x, v, v_next, dt))

    points = _visited(flow, network, x0=x0, steps=STEPS, sampler="heun")
    compiled = world.compiled(predict), world.compiled(correct)
    case = world.case(f"flow, Heun, MLP {BATCH}x{WIDTH}", "loop", [], {
        GENKERN: functools.partial(flow.sample, network, x0=x0, steps=STEPS, sampler="heun"),
        TEXTBOOK: textbook,
        CAREFUL: loop(
            lambda x, v, point: Careful.euler_step(x, v, dt, point),
            lambda x, v, v_next: Careful.heun_step(x, v, v_next, dt, x),
        ),
        COMPILED: None if compiled[0] is None else loop(*compiled),
        FLOOR: lambda: [network(points[k + i], times[k + i]) for k in range(STEPS) for i in (0, 1)][-1],
    })  # fmt: skip
    peers.add(case, "torchdiffeq", peers.torchdiffeq_loop, network, x0, STEPS, "heun2")
    peers.add(case, "flow_matching", peers.flow_matching_loop, network, x0, STEPS, "heun2")
    return _loop(case, STEPS, world)


def ddim_mlp(world: World) -> Case:
    """DDIM over an MLP."""
    network, diffusion = _seeded(MLP, world.device), gk.Diffusion()
    x0 = torch.randn((BATCH, WIDTH), generator=torch.Generator().manual_seed(0)).to(world.device)
    stride = peers.TIMESTEPS // STEPS
    visited = list(range(peers.TIMESTEPS - 1, -1, -stride))
    kept = [float(diffusion.alphas_cumprod[t]) for t in visited] + [1.0]
    paths = [(a**0.5, (1 - a) ** 0.5, b**0.5, (1 - b) ** 0.5) for a, b in zip(kept, kept[1:], strict=False)]
    times = torch.tensor(visited, device=world.device)[:, None].expand(STEPS, BATCH).contiguous()
    # Numbers that change recompile, tensors of no dimension do not.
    table = [tuple(torch.tensor(c, device=world.device) for c in path) for path in paths]

    def compiled_step(x: Tensor, m: Tensor, at: Tensor, st: Tensor, as_: Tensor, ss: Tensor) -> Tensor:
        return x.copy_(as_ * ((x - st * m) / at) + ss * m)

    def textbook() -> Tensor:
        x = x0
        for t, path in zip(visited, paths, strict=True):
            m = network(x, torch.full((BATCH,), t, device=world.device))
            x = Textbook.ddim_step(x, m, path)
        return x

    def loop(update: Callable[..., Tensor], rows: Any) -> Run:
        def run() -> Tensor:
            x = x0.clone()
            for t, row in zip(times, rows, strict=True):
                update(x, network(x, t), row)
            return x

        return run

    states = _visited(diffusion, network, noise=x0, steps=STEPS, sampler="ddim", spacing="trailing")
    compiled = world.compiled(compiled_step)
    case = world.case(f"DDIM, MLP {BATCH}x{WIDTH}", "loop", [], {
        GENKERN: functools.partial(
            diffusion.sample, network, noise=x0, steps=STEPS, sampler="ddim", spacing="trailing"
        ),
        TEXTBOOK: textbook,
        CAREFUL: loop(lambda x, m, row: Careful.ddim_step(x, m, row, x), paths),
        COMPILED: None if compiled is None else loop(lambda x, m, row: compiled(x, m, *row), table),
        FLOOR: lambda: [network(x, t) for x, t in zip(states, times, strict=False)][-1],
    })  # fmt: skip
    peers.add(case, "diffusers", peers.diffusers_ddim_loop, network, x0)
    return _loop(case, STEPS, world)


def flow_training(world: World) -> Case:
    """Everything around the network in a flow-matching step: x_t, the loss, the gradient of the network's output.

    A tensor stands for that output, so that the network itself costs nothing. It reads x, writes x_t; reads x and the
    output, writes the gradient.
    """
    x, m, flow = world.state("x"), world.state("m").detach().requires_grad_(), gk.FlowMatching()
    z, x_t, target = (world.state(name) for name in ("z", "x_t", "target"))
    normals, t = world.normals(world.noise.at(Purpose.TRAINING)), world.coefficient("t")
    t_x = per_sample(t, x)
    seen: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen[:] = [x_t]
        return m

    def fused() -> tuple[Tensor, ...]:
        loss = flow.loss(network, x, t=t, noise=world.noise)
        return seen.pop(), loss.detach(), *torch.autograd.grad(loss, m)

    def step(noising: Callable[[], tuple[Tensor, Tensor]], loss_of: Callable[..., Tensor]) -> Run:
        def run() -> tuple[Tensor, ...]:
            x_t, target = noising()
            loss = loss_of(m, target)
            return x_t, loss.detach(), *torch.autograd.grad(loss, m)

        return run

    mse = torch.nn.functional.mse_loss
    compiled = world.compiled(lambda: Textbook.flow_noising(x, normals.like(x), t_x)), world.compiled(mse)
    case = world.case("flow matching, around the network", "training", [x, x_t, x, m, m], {
        GENKERN: fused,
        TEXTBOOK: step(lambda: Textbook.flow_noising(x, normals.like(x), t_x), mse),
        CAREFUL: step(lambda: Careful.flow_noising(x, normals, t_x, z, x_t, target), mse),
        COMPILED: None if compiled[0] is None else step(compiled[0], compiled[1]),
    })  # fmt: skip
    for name, make in (("flow_matching", peers.flow_matching_path), ("torchcfm", peers.torchcfm_path)):
        peers.add(case, name, lambda make=make: step(make(x, t.to(x.dtype), normals), mse))
    return case


def _visited(method: Any, network: Any, **options: Any) -> Tensor:
    """The states of a loop, [steps + 1, B, ...]: of a network whose numbers are large, some operations take longer."""
    _, states = method.sample(network, return_trajectory=True, **options)
    return states


def _loop(case: Case, steps: int, world: World) -> Case:
    """A case of `steps` steps, without gradients, of which no number of bytes is stated; on CUDA with the captured
    loop, and the captured calls of the network, besides."""
    case.moved, case.count = None, steps
    runs: dict[str, Any] = case.contenders
    if world.device.type == "cuda":
        runs[GRAPHED] = functools.partial(runs[GENKERN], cuda_graph=True)
    case.contenders = {name: functools.partial(_without_gradient, run) for name, run in runs.items()}
    if GRAPHED in runs:
        case.contenders[FLOOR_GRAPHED] = _captured(case.contenders[FLOOR])
    return case


def _captured(run: Run) -> Run:
    """The replay of a run as one CUDA graph."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # libraries set themselves up before the capture
        for _ in range(3):
            run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def _without_gradient(run: Run) -> Any:
    with torch.no_grad():
        return run()
