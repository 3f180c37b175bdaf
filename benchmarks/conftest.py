"""genkern's cases under pytest-benchmark:  pytest benchmarks/bench_ddim_step.py [--device cuda] [--mib 256].

The cases are those of `genkern bench` (genkern.bench.cases), which takes its contenders in turns and empties the
cache; this is for one op at two revisions, by pytest-benchmark's --benchmark-compare. A file names its cases by CASES,
the beginning of their names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from genkern.bench import cases, run
from genkern.bench.world import FLOORS, Case, Compiler, World


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.addoption("--mib", type=float, default=16.0, help="size of a float32 tensor")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for every case, dtype and contender of the file."""
    if "contender" not in metafunc.fixturenames:
        return
    device = torch.device(metafunc.config.getoption("--device"))
    found = []
    for spec in cases.specs(device):
        for dtype in ("float32", "bfloat16"):
            if spec.name.startswith(metafunc.module.CASES) and dtype in spec.dtypes:
                small = spec.build(World(device, dtype, run.SMALL, Compiler(wanted=False)))
                names = [name for name in (*small.contenders, *small.skipped) if name not in FLOORS]
                found += [pytest.param((spec, dtype, name), id=f"{spec.name}-{dtype}-{name}") for name in names]
    metafunc.parametrize("contender", found, indirect=True)


@functools.cache
def case_of(spec: cases.Spec, dtype: str, device: torch.device, mib: float) -> Case:
    """A case, built once for all its contenders."""
    torch.compiler.reset()
    return spec.build(World(device, dtype, cases.elements_of(mib), compiler()))


@functools.cache
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def contender(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Measures the contender of this test with pytest-benchmark's fixture."""
    spec, dtype, name = request.param
    device = torch.device(request.config.getoption("--device"))
    case = case_of(spec, dtype, device, request.config.getoption("--mib"))
    if name in case.skipped:
        pytest.skip(case.skipped[name])

    def call() -> None:
        case.contenders[name]()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def measure(benchmark: Any) -> None:
        benchmark.group = f"{case.name}, {dtype}"
        benchmark.extra_info["bytes"] = case.moved
        with cases.setting(case):
            call()
            benchmark(call)

    return measure
