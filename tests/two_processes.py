"""What each of two processes does in test_two_processes.py."""

from __future__ import annotations

import torch
from torch import nn

import genkern as gk
from genkern import flows, ranks, training
from genkern.methods.times import Stratified
from genkern.noise import Noise

FLOW, N = gk.RectifiedFlow(), 6  # samples of each process
PAIRS = {"steps": 4, "seed": 3, "shard_size": 8}
FIT = {"steps": 12, "batch_size": 16, "lr": 1e-2, "warmup": 2, "checkpoint_every": 5}

OPTIONS = {  # of losses
    "stratified": {"times": "stratified"},
    "stratified of": {"times": Stratified(of=flows.LogitNormal())},
    "sum": {"reduction": "sum"},
}


class Cut(Exception):
    pass


class Net(nn.Module):
    def __init__(self, calls=None):
        super().__init__()
        self.calls = calls  # until it raises
        self.mix = nn.Linear(2, 2)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor([[0.5, -0.2], [0.1, 0.3]]))
            self.mix.bias.zero_()

    def forward(self, x, t):
        if self.training and self.calls is not None:
            self.calls -= 1
            if self.calls < 0:
                raise Cut
        return torch.tanh(self.mix(x)) + t[:, None]


def data(n, device):
    """Sources, data and labels of the whole batch, and its uniforms."""
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, n, 2, generator=g)
    found = x0, 2.0 * x1 + 1.0, torch.arange(n) % 2, torch.rand(n, dtype=torch.float64, generator=g)
    return tuple(each.to(device) for each in found)


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


def parameters(network):
    return {name: value.detach() for name, value in network.named_parameters()}


def fitted(store, options, device):
    """Parameters after training, and the last step's gradients: AdamW does not show their scale."""
    network = Net().to(device)
    training.fit_pairs(network, FLOW.loss, store, loss_options=options, **FIT)
    return parameters(network) | {f"gradient of {name}": value.grad for name, value in network.named_parameters()}


def body(rank, device, folder):
    mine = slice(rank * N, (rank + 1) * N)
    x0, x1, y, u = (part[mine] for part in data(2 * N, device))
    found = {name: gathered(name).sources(x0, x1, {"y": y, "text": "kept here"}, u) for name in COUPLINGS}
    noise = Noise(7, sample_ids=torch.arange(2 * N)[mine])
    net = Net().to(device)
    found["loss"] = FLOW.loss(net, x1, coupling=flows.Gathered(flows.Optimal()), noise=noise, reduction="none")
    found["sizes"] = said(lambda: gathered("optimal").sources(x0[rank:], x1[rank:], {}, u[rank:]))
    asking = x0.clone().requires_grad_(rank == 1)
    found["gradient"] = said(lambda: gathered("optimal").sources(asking, x1, {}, u))
    with torch.no_grad():
        found["unasked"] = gathered("optimal").sources(asking, x1, {}, u)
    found["failing"] = said(lambda: flows.Gathered(failing).sources(x0, x1, {}, u))
    store = FLOW.write_pairs(net, folder / "pairs", (20, 2), **PAIRS)
    found["missing"] = store.missing()
    network = Net().to(device)
    training.fit_pairs(network, FLOW.loss, store, **FIT)
    found["network"] = parameters(network)
    try:
        training.fit_pairs(Net(calls=8).to(device), FLOW.loss, store, checkpoint=folder / "c", **FIT)
    except Cut:
        resumed = Net(calls=7).to(device)  # after step 5
        training.fit_pairs(resumed, FLOW.loss, store, checkpoint=folder / "c", **FIT)
        found["resumed"] = parameters(resumed)
    (reflowed,) = FLOW.reflow(net, folder / "reflow", (20, 2), fit=FIT, **PAIRS)
    found["reflowed"] = parameters(reflowed)
    for name, options in OPTIONS.items():
        found[name] = fitted(store, options, device)
    ranks.barrier(device)
    if rank == 0:
        file = folder / "reflow" / "2-rectified" / "network.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    ranks.barrier(device)
    (mended,) = FLOW.reflow(net, folder / "reflow", (20, 2), fit=FIT, **PAIRS)
    found["mended"] = parameters(mended)
    found["answer"] = ranks.of_first(lambda: f"of {rank}", device)
    return found
