"""Fixtures of the tests: every device and dtype that is here, and both paths: compiled kernels and reference."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from fake_capture import FakeCapture

from genkern import _library
from genkern.graphs import loop as graphs_loop

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NO_CUDA = "no CUDA device here, or genkern was built without CUDA"


def cuda_works() -> bool:
    return torch.cuda.is_available() and "cuda" in _library.torch_devices()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not cuda_works(), reason=NO_CUDA))])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["kernel", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on the compiled kernels, and again on the plain PyTorch that takes their place elsewhere."""
    from genkern import calls, eager

    if request.param == "reference":
        monkeypatch.setattr(calls, "_DEVICES", frozenset())
        monkeypatch.setattr(eager, "face", None)
    elif not calls._DEVICES:
        pytest.skip(f"the compiled library is missing: {_library.why_missing()}")
    return request.param


@pytest.fixture
def kernels() -> None:
    """Skips a test that is about the compiled library where that is missing."""
    if _library.torch_ops() is None:
        pytest.skip(f"the compiled library is missing: {_library.why_missing()}")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=["whole", "steps"])
def captures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeCapture]]:
    """The captures that a test has made, of loops whose steps are short or long."""
    monkeypatch.setattr(graphs_loop, "capture_on", FakeCapture)
    monkeypatch.setattr(FakeCapture, "made", [])
    monkeypatch.setattr(FakeCapture, "step_seconds", 1e-5 if request.param == "whole" else 1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="cuda_graph")
        yield FakeCapture.made
