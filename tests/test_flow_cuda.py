"""Flows on a GPU: what the CPU finds, nothing that waits for the device, and memory of a chunk."""

from __future__ import annotations

import pytest
import torch
from conftest import NO_CUDA, cuda_works
from torch import nn
from watching import unsynchronised

import genkern as gk
from genkern import flows, paths
from genkern.methods.times import Stratified

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not cuda_works(), reason=NO_CUDA)]

F64 = torch.float64


@pytest.mark.parametrize("times", [None, flows.Beta(2.0, 0.7), Stratified(of=flows.LogitNormal()), flows.UShaped()])
@pytest.mark.parametrize("coupling", [None, flows.Sinkhorn(labels="y"), flows.Independent()])
@pytest.mark.parametrize("path", ["cond_ot", "cosine", paths.Reversed(paths.CosineVP())])
def test_loss_does_not_wait_for_the_device(times, coupling, path):
    flow, model = gk.FlowMatching(path), nn.Linear(8, 8).cuda()
    x, y = torch.randn(32, 8, device="cuda"), torch.arange(32, device="cuda") % 4

    def loss(seed):
        return flow.loss(
            lambda x, t, y: model(x), x, times=times, coupling=coupling, cond={"y": y}, noise=gk.Noise(seed)
        )

    loss(0).backward()  # tables are copied once
    with unsynchronised():
        loss(1).backward()


@pytest.mark.parametrize("divergence", [{}, {"divergence": "hutchinson", "probes": 3}])
def test_likelihood_is_that_of_the_cpu(divergence):
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)).double(), torch.randn(5, 6, dtype=F64)

    def run(device):
        model.to(device)
        return gk.RectifiedFlow().log_prob(
            lambda x, t: model(x), x.to(device), steps=8, dtype=F64, seed=3, model_dtype=F64, **divergence
        )

    torch.testing.assert_close(run("cuda").cpu(), run("cpu"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["midpoint", "rk4"])
def test_captured_solver_has_the_bits_of_the_uncaptured_one(sampler):
    model = nn.Linear(6, 6).cuda().eval()

    def network(x, t):
        return model(x).sin()

    for seed in range(2):
        options = {"steps": 5, "sampler": sampler, "seed": seed, "device": "cuda"}
        wanted = gk.RectifiedFlow().sample(network, (4, 6), **options)
        assert torch.equal(gk.RectifiedFlow().sample(network, (4, 6), cuda_graph=True, **options), wanted)


def test_couplings_are_those_of_the_cpu():
    x0, x1, u = torch.randn(64, 3, dtype=F64), torch.randn(64, 3, dtype=F64), torch.rand(64, dtype=F64)
    for coupling in (flows.Optimal(), flows.Sinkhorn(0.1), flows.Independent()):
        found = coupling(x0.cuda(), x1.cuda(), {}, u.cuda())
        assert found.is_cuda
        assert torch.equal(found.cpu(), coupling(x0, x1, {}, u))


def test_marginal_field_of_50000_images_takes_the_memory_of_a_chunk():
    data = torch.randn(50_000, 3, 32, 32, device="cuda")
    field, x, t = flows.MarginalField(data), torch.randn(64, 3, 32, 32, device="cuda"), torch.rand(64, device="cuda")
    with unsynchronised():
        field(x, t)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = field(x, t)
    assert found.isfinite().all()
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20
