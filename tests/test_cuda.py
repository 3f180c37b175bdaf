"""What only a GPU can show: bits against the CPU over many normals, very large tensors, streams and graphs."""

from __future__ import annotations

import pytest
import torch

import genkern as gk
from genkern import _library, eager, fused, rows
from genkern.reference.noise import randn_at

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or "cuda" not in _library.torch_devices(),
        reason="no CUDA device here, or genkern was built without CUDA",
    ),
]


def test_normals_have_the_same_bits_on_cpu_and_cuda() -> None:
    """2^26 of them, over samples whose size is no multiple of four."""
    shape = (64, (1 << 20) + 1)
    noise = gk.Noise(seed=0x0123456789ABCDEF, stream=77)
    cpu = gk.ops.randn(shape, noise=noise, device="cpu")
    cuda = gk.ops.randn(shape, noise=noise, device="cuda").cpu()
    assert torch.equal(cpu.view(torch.int32), cuda.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_map_has_the_same_bits_on_cpu_and_cuda(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x, m = (torch.randn((7, 3, 33, 5), generator=generator).to(dtype) for _ in range(2))
    alpha_t, sigma_t = torch.rand(7, generator=generator) + 0.1, torch.rand(7, generator=generator) + 0.1
    noise = gk.Noise(seed=5)

    def step(device: str) -> torch.Tensor:
        values = [t.to(device) for t in (x, m, alpha_t, sigma_t)]
        return gk.ops.ddim_step(*values, 1.0, 0.05, eta=0.01, noise=noise, clip=(-1.0, 1.0)).cpu()

    assert torch.equal(step("cpu"), step("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_over_many_tiles_of_channels_last_has_the_same_bits_on_cpu_and_cuda(dtype: torch.dtype) -> None:
    """12880 tiles, of which a block takes three; a sample ends with a tile that is not whole, in a block of one."""
    shape = (40, 5, 512, 512)
    x = torch.linspace(-3.0, 3.0, 40 * 5 * 512 * 512).to(dtype).reshape(shape)
    x = x.contiguous(memory_format=torch.channels_last)
    noise = gk.Noise(seed=9, stream=2)
    cpu = gk.ops.add_noise(x, 0.8, 0.6, noise=noise)
    assert torch.equal(cpu, gk.ops.add_noise(x.cuda(), 0.8, 0.6, noise=noise).cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_loss_is_the_same_whether_a_gradient_is_to_come(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """2^25 elements, of which a block takes several chunks: the tree of the sum is that of a written residual."""
    x, m = (torch.randn((128, 4, 256, 256), device="cuda").to(dtype).contiguous(memory_format=layout) for _ in range(2))
    terms = {"x_coef": 1.0, "noise_coef": -1.0, "noise": gk.Noise(seed=4)}
    with torch.no_grad():
        without = gk.ops.path_loss(m, x, **terms)
    assert torch.equal(gk.ops.path_loss(m.requires_grad_(), x, **terms).detach(), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("order", ["plain", "channels_last", "halves"])
def test_elementwise_terms_have_the_same_bits_on_cpu_and_cuda(dtype: torch.dtype, order: str) -> None:
    """The exponential over 2^22 numbers from -120 to 100, and a mask of 0, 1 and between."""
    generator = torch.Generator().manual_seed(3)
    shape = (8, 8, 256, 256)
    x, known = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    out = torch.randn((8, 16, 256, 256), generator=generator)
    out[:, 8:] = torch.linspace(-120.0, 100.0, x.numel()).reshape(shape)
    out = out.to(torch.bfloat16 if dtype == torch.float32 else dtype)
    m, v = out.chunk(2, dim=1) if order == "halves" else (half.contiguous() for half in out.chunk(2, dim=1))
    mask = torch.rand(shape, generator=generator).mul(3.0).sub(1.0).clamp(0.0, 1.0).to(dtype)
    if order == "channels_last":
        x, m, v, known, mask = (t.contiguous(memory_format=torch.channels_last) for t in (x, m, v, known, mask))
    elementwise = rows.Elementwise((0.0, 0.9), ((0.6, 0.8),))
    row = rows.Row((rows.Out(x=0.9, m=-0.3, z=0.5),), elementwise=elementwise)

    def step(device: str, mask: torch.Tensor) -> torch.Tensor:
        terms = {name: t.to(device) for name, t in (("x", x), ("m", m), ("v", v), ("known", known), ("mask", mask))}
        return fused.apply_row(row, **terms, noise=gk.Noise(seed=5))[0].cpu()

    for weights in (mask, mask > 0.5):
        torch.testing.assert_close(step("cuda", weights), step("cpu", weights), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("times", ["uniform", "stratified", "antithetic"])
def test_drawn_training_times_are_the_same_on_cpu_and_cuda(times: str) -> None:
    seen: list[torch.Tensor] = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t.cpu())
        return x

    for schedule in ("linear", "continuous_vp"):
        for device in ("cpu", "cuda"):
            x = torch.zeros(100_003, 1, device=device)
            gk.Diffusion(schedule).loss(model, x, times=times, noise=gk.Noise(seed=3, stream=9))
        assert torch.equal(*seen)
        seen.clear()


def test_brownian_increments_have_the_same_bits_on_cpu_and_cuda() -> None:
    brownian = gk.BrownianNoise(5)
    cpu, cuda = (brownian.normal(0.01, 0.7, (16, 33), device=device) for device in ("cpu", "cuda"))
    assert torch.equal(cpu, cuda.cpu())


def test_importance_sampling_records_on_the_device_without_waiting() -> None:
    sampler = gk.methods.times.LossSecondMoment(50, history=2).cuda()
    diffusion, x = gk.Diffusion(timesteps=50, schedule="squared_cosine"), torch.randn(64, 3, device="cuda")
    diffusion.loss(lambda x, t: x, x, times=sampler, noise=gk.Noise(seed=1))  # makes the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        diffusion.loss(lambda x, t: x, x, times=sampler, noise=gk.Noise(seed=2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(sampler.counts.sum()) == 128


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 30 << 30,
    reason="needs 30 GiB of device memory",
)
def test_more_than_2_to_31_elements() -> None:
    n = (1 << 31) + 4096 + 3
    x = torch.empty((1, n), device="cuda", dtype=torch.bfloat16).fill_(1.0)
    out = gk.ops.add_noise(x, 1.0, 1.0, noise=gk.Noise(seed=9))
    torch.cuda.synchronize()
    tail = gk.ops.add_noise(torch.ones((1, n), dtype=torch.bfloat16)[:, :8], 1.0, 1.0, noise=gk.Noise(seed=9))
    assert torch.equal(out[:, :8].cpu(), tail)
    # The last quad's normals by the reference, at their own index.
    words = randn_at(torch.arange(n - 8, n), noise=gk.Noise(seed=9), sample_id=0)
    assert torch.allclose(out[0, -8:].float().cpu(), (1.0 + words).float(), atol=2e-2)
    expected = (x[:, -4096:].float() + 0.5 * out[:, -4096:].float()).bfloat16()
    stepped = gk.ops.euler_step(x, out, 0.5, out=out)
    assert torch.equal(stepped[:, -4096:], expected)  # 0.5 v is exact, so the sum is rounded once on both sides


def test_a_side_stream_is_used() -> None:
    stream = torch.cuda.Stream()
    x = torch.randn((64, 1 << 16), device="cuda")
    expected = gk.ops.euler_step(x, x, 0.5)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        found = gk.ops.euler_step(x, x, 0.5)
        found.record_stream(stream)
    stream.synchronize()
    assert torch.equal(found, expected)


def test_a_captured_graph_replays_with_a_new_seed_from_device_memory() -> None:
    x = torch.randn((4, 1000), device="cuda")
    seed = torch.tensor([1], device="cuda")
    out = torch.empty_like(x)

    def step() -> None:
        gk.ops.add_noise(x, 0.8, 0.6, noise=gk.Noise(seed=seed), out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for value in (7, 8):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(out, gk.ops.add_noise(x, 0.8, 0.6, noise=gk.Noise(seed=value)))


def test_a_captured_graph_replays_calls_past_the_dispatcher_on_new_data() -> None:
    if eager.face is None:
        pytest.skip("this torch has no exchange API")
    x, v = (torch.randn((4, 1000), device="cuda") for _ in range(2))
    noise = gk.Noise(seed=3)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return gk.ops.euler_step(x, v, 0.5), gk.ops.path_loss(v, x, x_coef=1.0, noise_coef=-1.0, noise=noise)

    step()
    torch.cuda.synchronize()
    graph, before = torch.cuda.CUDAGraph(), eager.face.eager_calls()
    with torch.cuda.graph(graph):
        state, loss = step()
    assert eager.face.eager_calls() == before + 2
    x.normal_()
    v.normal_()
    graph.replay()
    wanted = step()
    assert torch.equal(state, wanted[0])
    assert torch.equal(loss, wanted[1])


def test_no_op_synchronises() -> None:
    x, v = (torch.randn((8, 64), device="cuda") for _ in range(2))
    alpha = torch.rand(8, device="cuda")
    gk.ops.add_noise(x, alpha, alpha, noise=gk.Noise(seed=1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        gk.ops.add_noise(x, alpha, alpha, noise=gk.Noise(seed=1))
        gk.ops.euler_step(x, v, 0.1)
        gk.ops.path_loss(v.requires_grad_(), x, x_coef=1.0, noise_coef=-1.0, noise=gk.Noise(seed=1)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
