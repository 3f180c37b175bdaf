"""What each of two processes does in test_two_processes.py: its results in RANK.pt of a folder."""

from __future__ import annotations

import pathlib
import sys

import torch
import torch.distributed as dist
from torch import nn

import genkern as gk
from genkern import flows, ranks, training
from genkern.methods.times import Stratified
from genkern.noise import Noise

FLOW, N = gk.RectifiedFlow(), 6  # samples of each process
PAIRS = {"steps": 4, "seed": 3, "shard_size": 8}
FIT = {"steps": 12, "batch_size": 16, "lr": 1e-2, "warmup": 2}

OPTIONS = {  # of losses
    "stratified": {"times": "stratified"},
    "stratified of": {"times": Stratified(of=flows.LogitNormal())},
    "sum": {"reduction": "sum"},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(2, 2)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor([[0.5, -0.2], [0.1, 0.3]]))
            self.mix.bias.zero_()

    def forward(self, x, t):
        return torch.tanh(self.mix(x)) + t[:, None]


def data(n):
    """Sources, data and labels of the whole batch, and its uniforms."""
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, n, 2, generator=g)
    return x0, 2.0 * x1 + 1.0, torch.arange(n) % 2, torch.rand(n, dtype=torch.float64, generator=g)


COUPLINGS = {
    "optimal": flows.Optimal(),
    "labels": flows.Optimal("y"),
    "sinkhorn": flows.Sinkhorn(0.1),
    "features": flows.Optimal(),
}


def gathered(name):
    return flows.Gathered(COUPLINGS[name], features=(lambda x: x[:, :1]) if name == "features" else None)


def failing(*_):
    raise ArithmeticError("no plan")


def said(call):
    """The error of a call."""
    try:
        call()
    except (ArithmeticError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def fitted(store, options):
    """Parameters after training, and the last step's gradients: AdamW does not show their scale."""
    network = Net()
    training.fit_pairs(network, FLOW.loss, store, loss_options=options, **FIT)
    found = {name: value.detach() for name, value in network.named_parameters()}
    return found | {f"gradient of {name}": value.grad for name, value in network.named_parameters()}


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = slice(rank * N, (rank + 1) * N)
    x0, x1, y, u = (part[mine] for part in data(2 * N))
    found = {name: gathered(name).sources(x0, x1, {"y": y, "text": "kept here"}, u) for name in COUPLINGS}
    noise = Noise(7, sample_ids=torch.arange(2 * N)[mine])
    found["loss"] = FLOW.loss(Net(), x1, coupling=flows.Gathered(flows.Optimal()), noise=noise, reduction="none")
    found["sizes"] = said(lambda: gathered("optimal").sources(x0[rank:], x1[rank:], {}, u[rank:]))
    asking = x0.clone().requires_grad_(rank == 1)
    found["gradient"] = said(lambda: gathered("optimal").sources(asking, x1, {}, u))
    with torch.no_grad():
        found["unasked"] = gathered("optimal").sources(asking, x1, {}, u)
    found["failing"] = said(lambda: flows.Gathered(failing).sources(x0, x1, {}, u))
    store = FLOW.write_pairs(Net(), folder / "pairs", (20, 2), **PAIRS)
    found["missing"] = store.missing()
    network = Net()
    training.fit_pairs(network, FLOW.loss, store, **FIT)
    found["network"] = {name: value.detach() for name, value in network.named_parameters()}
    (reflowed,) = FLOW.reflow(Net(), folder / "reflow", (20, 2), fit=FIT, **PAIRS)
    found["reflowed"] = {name: value.detach() for name, value in reflowed.named_parameters()}
    for name, options in OPTIONS.items():
        found[name] = fitted(store, options)
    ranks.barrier()
    if rank == 0:
        file = folder / "reflow" / "2-rectified" / "network.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    ranks.barrier()
    (mended,) = FLOW.reflow(Net(), folder / "reflow", (20, 2), fit=FIT, **PAIRS)
    found["mended"] = {name: value.detach() for name, value in mended.named_parameters()}
    found["answer"] = ranks.of_first(lambda: f"of {rank}")
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), pathlib.Path(sys.argv[2]))
