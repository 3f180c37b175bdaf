"""What the tests of captured loops share: a network, the options and samplers that they go through."""

from __future__ import annotations

import torch
from test_samplers import SHAPE
from torch import nn

import genkern as gk
from genkern.noise import Noise
from genkern.samplers import EDMHeun

FLOW = gk.FlowMatching()


class Net(nn.Module):
    """Counts how often its code runs; a replay does not run it."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.inner, self.dropout, self.calls = nn.Linear(4, 4), nn.Dropout(dropout), [0]

    def forward(self, x, t, y=None, more=None, flag=None):
        self.calls[0] += 1
        out = self.dropout(self.inner(x)).sin() + 1e-3 * t.reshape(-1, 1, 1).to(x.dtype)
        for given in (y, None if more is None else more["z"][0]):
            out = out if given is None else out * given.reshape(-1, 1, 1).to(x.dtype)
        return out


def same(got, wanted):
    assert torch.equal(got[0], wanted[0]) if isinstance(got, tuple) else torch.equal(got, wanted)
    if isinstance(got, tuple):
        assert torch.equal(got[1], wanted[1])


OPTIONS = {
    "plain": {"seed": 1},
    "noise": {"noise": Noise(3, stream=5, sample_ids=[7, 1 << 40, 0, 3, 4])},
    "seed on the device": {"noise": Noise(torch.tensor([3]), stream=torch.tensor([1 << 62]))},
    "initial state": {"noise": torch.linspace(-1, 1, 60).reshape(SHAPE), "seed": 1},
    "strided initial state": {"noise": torch.linspace(-1, 1, 60).reshape(3, 5, 4).transpose(0, 1), "seed": 1},
    "half network": {"model_dtype": torch.bfloat16, "seed": 1},
    "float64": {"dtype": torch.float64, "seed": 1},
    "split": {"batch_size": 2, "seed": 1},
    "trajectory": {"return_trajectory": True, "seed": 1},
    "split trajectory": {"return_trajectory": True, "batch_size": 3, "seed": 1},
    "step noise": {"step_noise": torch.linspace(-2, 2, 4 * 60).reshape(4, *SHAPE), "seed": 1},
    "step noise by a function": {"step_noise": lambda k: torch.full(SHAPE, 0.1 * k), "seed": 1, "batch_size": 2},
}

SAMPLERS = {
    "ddim": {"clip": 1.0}, "ddpm": {"clip": (-0.5, 2.0), "final_sigma": 0.1}, "euler": {}, "euler_ancestral": {},
    "dpmpp_1": {}, "dpmpp_2m": {"clip": 1.0}, "dpmpp_3m": {}, "dpmpp_1_sde": {}, "dpmpp_2m_sde": {}, "unipc": {},
    "thresholded": {"sampler": "dpmpp_2m", "clip": gk.DynamicThreshold(0.9)},
    # From a start below the path's highest noise level, which is churned too.
    "churn": {"sampler": EDMHeun(s_churn=2.0), "steps": None, "timesteps": [800, 500, 200, 0]},
}  # fmt: skip
