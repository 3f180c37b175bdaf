"""The named ops as cases: bytes by the formula, every contender into outputs that exist where its API takes them.

genkern, careful eager PyTorch and torch.compile write into a given output (the compiled formula ends in out.copy_(...),
which the compiler turns into a write of out). The textbook and the other libraries return new tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genkern as gk
from genkern.fused import apply_row
from genkern.rows import Elementwise, Out, Row

from . import peers
from .baselines import Careful, Textbook, per_sample
from .world import CAREFUL, COMPILED, GENKERN, TEXTBOOK, Case, World

ALPHA, SIGMA = 0.8, 0.6
STEP = 499  # the timestep at which DDIM is measured: of the linear schedule, one of 50 trailing ones
CLIP, GUIDANCE = 1.0, 3.0
DT_STEPS, DT_STEP = 50, 20


def scales(t: int) -> tuple[float, float]:
    """(alpha_t, sigma_t) of the linear schedule of 1000 steps."""
    kept = float(gk.Diffusion().alphas_cumprod[t])
    return kept**0.5, (1.0 - kept) ** 0.5


def ddim_path() -> tuple[float, float, float, float]:
    """(alpha_t, sigma_t, alpha_s, sigma_s) of the step that is measured."""
    return (*scales(STEP), *scales(STEP - peers.TIMESTEPS // peers.DDIM_STEPS))


def into(out: Tensor, formula: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The formula written to out, for torch.compile."""
    return lambda: out.copy_(formula())


def randn(world: World) -> Case:
    """z."""
    out, normals, ops = world.state("out"), world.normals(), gk.ops
    return world.case("randn", "op", [out], {
        GENKERN: lambda: ops.randn(world.shape, noise=world.noise, out=out),
        TEXTBOOK: lambda: normals.like(out),
        CAREFUL: lambda: normals.into(out),
        COMPILED: world.compiled(into(out, lambda: normals.like(out))),
    })  # fmt: skip


def add_noise(world: World, channels_last: bool = False) -> Case:
    """alpha x + sigma z, one alpha and sigma a call."""
    x, out, normals = world.state("x"), world.state("out"), None
    if channels_last:
        x, out = (v.contiguous(memory_format=torch.channels_last) for v in (x, out))
    normals = world.normals(like=x)
    return world.case("add_noise" + ", channels_last" * channels_last, "op", [x, out], {
        GENKERN: lambda: gk.ops.add_noise(x, ALPHA, SIGMA, noise=world.noise, out=out),
        TEXTBOOK: lambda: Textbook.add_noise(x, ALPHA, SIGMA, normals.like(x)),
        CAREFUL: lambda: Careful.add_noise(x, ALPHA, SIGMA, normals, out),
        COMPILED: world.compiled(into(out, lambda: Textbook.add_noise(x, ALPHA, SIGMA, normals.like(x)))),
    })  # fmt: skip


def add_noise_per_sample(world: World) -> Case:
    """alpha_b x + sigma_b z, from a table by timestep."""
    x, out, normals = world.state("x"), world.state("out"), world.normals()
    # From 100 on: below, diffusers' half-precision 1 - alphas_cumprod has no digits left, and it does other work.
    t = 100 + torch.arange(world.shape[0], device=world.device) * 397 % 900
    table = torch.tensor([scales(k) for k in range(peers.TIMESTEPS)], device=world.device).to(world.dtype).float()
    alpha, sigma = (table[t, k].contiguous() for k in range(2))
    a, s = per_sample(alpha, x), per_sample(sigma, x)
    case = world.case("add_noise, by sample", "op", [x, out], {
        GENKERN: lambda: gk.ops.add_noise(x, alpha, sigma, noise=world.noise, out=out),
        TEXTBOOK: lambda: Textbook.add_noise(x, a, s, normals.like(x)),
        CAREFUL: lambda: Careful.add_noise_per_sample(x, a, s, normals, out),
        COMPILED: world.compiled(into(out, lambda: Textbook.add_noise(x, a, s, normals.like(x)))),
    })  # fmt: skip
    peers.add(case, "diffusers", peers.diffusers_add_noise, x, t, normals, note="looks its coefficients up itself")
    return case


def add_noise_written(world: World) -> Case:
    """(alpha x + sigma z, z)."""
    x, out, z, normals = world.state("x"), world.state("out"), world.state("z"), world.normals()

    def textbook() -> tuple[Tensor, Tensor]:
        drawn = normals.like(x)
        return Textbook.add_noise(x, ALPHA, SIGMA, drawn), drawn

    def compiled() -> tuple[Tensor, Tensor]:
        drawn = normals.like(x)
        return out.copy_(Textbook.add_noise(x, ALPHA, SIGMA, drawn)), z.copy_(drawn)

    noise = world.noise
    return world.case("add_noise, noise written", "op", [x, out, z], {
        GENKERN: lambda: gk.ops.add_noise(x, ALPHA, SIGMA, noise=noise, return_noise=True, out=(out, z)),
        TEXTBOOK: textbook,
        CAREFUL: lambda: Careful.add_noise_written(x, ALPHA, SIGMA, normals, out, z),
        COMPILED: world.compiled(compiled),
    })  # fmt: skip


def ddim_step(world: World, variant: str = "") -> Case:
    """(13.13): plain, clipped, guided, or with eta = 1 (the DDPM's step)."""
    x, m, out, path = world.state("x"), world.output("m"), world.state("out"), ddim_path()
    tensors = [x, m, out]
    options: dict[str, Any] = {}  # genkern's
    shared: dict[str, Any] = {}  # the baselines' and diffusers'
    own: dict[str, Any] = {}  # their noise
    if variant == "clipped":
        options, shared = {"clip": CLIP}, {"clip": CLIP}
    elif variant == "guided":
        u = world.output("u")
        tensors.append(u)
        options, shared = {"uncond": u, "guidance_scale": GUIDANCE}, {"uncond": u, "scale": GUIDANCE}
    elif variant == "eta 1":
        options, shared, own = {"eta": 1.0, "noise": world.noise}, {"eta": 1.0}, {"normals": world.normals()}

    def textbook() -> Tensor:
        z = own["normals"].like(x) if own else None
        return Textbook.ddim_step(x, m, path, z=z, **shared)

    case = world.case(", ".join(filter(None, ("ddim_step", variant))), "op", tensors, {
        GENKERN: lambda: gk.ops.ddim_step(x, m, *path, out=out, **options),
        TEXTBOOK: textbook,
        CAREFUL: lambda: Careful.ddim_step(x, m, path, out, **shared, **own),
        COMPILED: world.compiled(into(out, textbook)),
    })  # fmt: skip
    peers.add(case, "diffusers", lambda: peers.diffusers_ddim(x, m, STEP, **shared, **own))
    return case


def ddim_step_of_data(world: World) -> Case:
    """(13.13) from predicted data on the variance-exploding path, alpha = 1: Euler's step of the EDM sampler."""
    x, m, out, path = world.state("x"), world.output("m"), world.state("out"), (1.0, 2.0, 1.0, 1.5)
    case = world.case("ddim_step, data predicted", "op", [x, m, out], {
        GENKERN: lambda: gk.ops.ddim_step(x, m, *path, prediction="sample", out=out),
        TEXTBOOK: lambda: Textbook.ddim_step(x, m, path, data=True),
        CAREFUL: lambda: Careful.ddim_step(x, m, path, out, data=True),
        COMPILED: world.compiled(into(out, lambda: Textbook.ddim_step(x, m, path, data=True))),
    })  # fmt: skip
    peers.add(case, "k-diffusion", peers.k_diffusion_euler, x, m, path[1], path[3])
    return case


def learned_variance_step(world: World) -> Case:
    """c_x x + c_m m + exp(l0 + l1 v) z: the DDPM's step between two variances."""
    x, m, v, out, normals = world.state("x"), world.output("m"), world.output("u"), world.state("out"), world.normals()
    c, log_scale = (0.95, -0.15), (-1.2, 0.1)
    row = Row((Out(x=c[0], m=c[1], z=1.0),), elementwise=Elementwise(log_scale))

    def textbook() -> Tensor:
        return Textbook.learned_variance_step(x, m, v, normals.like(x), c, log_scale)

    return world.case("learned variance, step", "op", [x, m, v, out], {
        GENKERN: lambda: apply_row(row, x=x, m=m, v=v, noise=world.noise, out=out)[0],
        TEXTBOOK: textbook,
        CAREFUL: lambda: Careful.learned_variance_step(x, m, v, normals, out, c, log_scale),
        COMPILED: world.compiled(into(out, textbook)),
    })  # fmt: skip


def inpainting_step(world: World) -> Case:
    """c_x x + c_m m where data are generated, p known + q z where they are known."""
    x, m, known, out = world.state("x"), world.output("m"), world.state("known"), world.state("out")
    normals, scratch = world.normals(), torch.empty_like(out)
    keep = (torch.arange(x.numel(), device=x.device) % 3 == 0).reshape(x.shape)
    c, weights = (0.95, -0.15), (ALPHA, SIGMA)
    row = Row((Out(x=c[0], m=c[1]),), elementwise=Elementwise(known=(weights,)))

    def textbook() -> Tensor:
        return Textbook.inpainting_step(x, m, known, keep, normals.like(x), c, weights)

    return world.case("inpainting, step", "op", [x, m, known, keep, out], {
        GENKERN: lambda: apply_row(row, x=x, m=m, known=known, mask=keep, noise=world.noise, out=out)[0],
        TEXTBOOK: textbook,
        CAREFUL: lambda: Careful.inpainting_step(x, m, known, keep, normals, scratch, out, c, weights),
        COMPILED: world.compiled(into(out, textbook)),
    })  # fmt: skip


def euler_step(world: World) -> Case:
    """x + dt v."""
    x, v, out, dt = world.state("x"), world.output("m"), world.state("out"), 1.0 / DT_STEPS
    case = world.case("euler_step", "op", [x, v, out], {
        GENKERN: lambda: gk.ops.euler_step(x, v, dt, out=out),
        TEXTBOOK: lambda: Textbook.euler_step(x, v, dt),
        CAREFUL: lambda: Careful.euler_step(x, v, dt, out),
        COMPILED: world.compiled(into(out, lambda: Textbook.euler_step(x, v, dt))),
    })  # fmt: skip
    peers.add(case, "diffusers", peers.diffusers_euler, x, v, DT_STEPS, DT_STEP)
    return case


def heun_step(world: World) -> Case:
    """x + dt/2 (v + v')."""
    x, v, v_next, out, dt = world.state("x"), world.output("m"), world.output("u"), world.state("out"), 1.0 / DT_STEPS
    return world.case("heun_step", "op", [x, v, v_next, out], {
        GENKERN: lambda: gk.ops.heun_step(x, v, v_next, dt, out=out),
        TEXTBOOK: lambda: Textbook.heun_step(x, v, v_next, dt),
        CAREFUL: lambda: Careful.heun_step(x, v, v_next, dt, out),
        COMPILED: world.compiled(into(out, lambda: Textbook.heun_step(x, v, v_next, dt))),
    })  # fmt: skip


def consistency_skip(world: World, by_sample: bool = False) -> Case:
    """c_skip x + c_out F, the coefficients numbers, or one a sample."""
    x, f, out = world.state("x"), world.output("m"), world.state("out")
    row: Any = (world.coefficient("c_skip"), world.coefficient("c_out")) if by_sample else (0.3, 0.7)
    c_skip, c_out = (per_sample(c, x) for c in row) if by_sample else row
    return world.case("consistency_skip" + ", by sample" * by_sample, "op", [x, f, out], {
        GENKERN: lambda: gk.ops.consistency_skip(x, f, *row, out=out),
        TEXTBOOK: lambda: Textbook.consistency_skip(x, f, c_skip, c_out),
        CAREFUL: lambda: Careful.consistency_skip(x, f, c_skip, c_out, out),
        COMPILED: world.compiled(into(out, lambda: Textbook.consistency_skip(x, f, c_skip, c_out))),
    })  # fmt: skip


def path_loss(world: World, backward: bool = False) -> Case:
    """mean (F - (x - z))^2, and its gradient. The baselines read the noise that was stored when x was noised."""
    x, m, z, target = world.state("x"), world.state("m"), world.drawn(), world.state("out")
    m = m.detach().requires_grad_(backward)

    def with_gradient(loss: Callable[..., Tensor], *args: Any) -> Callable[[], Any]:
        def run() -> Any:
            found = loss(m, x, *args)
            return (found.detach(), *torch.autograd.grad(found, m)) if backward else found

        return run

    def fused(m: Tensor, x: Tensor) -> Tensor:
        return gk.ops.path_loss(m, x, x_coef=1.0, noise_coef=-1.0, noise=world.noise)

    # Where a gradient is asked for, it is written.
    moved = [x, m, target] if backward else [x, m]
    compiled = world.compiled(Textbook.flow_loss)
    case = world.case("path_loss, forward and backward" if backward else "path_loss", "op", moved, {
        GENKERN: with_gradient(fused),
        TEXTBOOK: with_gradient(Textbook.flow_loss, z),
        CAREFUL: with_gradient(Careful.flow_loss, z, target),
        COMPILED: None if compiled is None else with_gradient(compiled, z),
    })  # fmt: skip
    stored = "reads the stored noise, which genkern draws again"
    case.notes.update(dict.fromkeys((TEXTBOOK, CAREFUL, COMPILED), stored))
    return case
