"""The build's tools and plan (build_tools/), and what a user reads when a tool is missing or unsuitable."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_tools import plan, record, toolchain  # noqa: E402
from build_tools.toolchain import BuildProblem, Compiler, Nvcc, Package  # noqa: E402

LINUX = pytest.mark.skipif(toolchain.machine() is None, reason="kernels are built on Linux x86-64 and aarch64")
NVCC = Nvcc("/toolkit/bin/nvcc", "13.0.88", ("/toolkit/include",), ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0"))


def script(path: Path, text: str) -> str:
    """A program that stands for a tool."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def sentence(problem: pytest.ExceptionInfo[BuildProblem]) -> str:
    """The message, which has to be one line that ends as a sentence."""
    text = str(problem.value)
    assert "\n" not in text and text.endswith(".")
    return text


def tools(tmp_path: Path, nvcc: Nvcc | None, machine: str = "x86_64") -> plan.Tools:
    for name in ("torch/include", "torch/lib", "pybind11/include"):
        (tmp_path / "site" / name).mkdir(parents=True, exist_ok=True)
    torch = Package(tmp_path / "site/torch", "2.13.0+cpu")
    pybind11 = Package(tmp_path / "site/pybind11", "3.1.0")
    return plan.Tools(machine, Compiler(("c++",), "c++ 12"), torch, pybind11, nvcc, ("9.0",) if nvcc else ())


def commands_of(tmp_path: Path, nvcc: Nvcc | None, machine: str = "x86_64") -> str:
    """The ninja file of a tree with one source of each kind."""
    for name in (
        "kernels/map_cpu.cpp",
        "kernels/dispatch.cpp",
        "kernels/map_cuda.cu",
        "torch/library.cpp",
        "python/arrays.cpp",
    ):
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    plan.write(tmp_path, Path("build/here"), tools(tmp_path, nvcc, machine))
    return (tmp_path / "build/here/build.ninja").read_text()


def test_a_missing_compiler_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildProblem) as problem:
        toolchain.find_compiler({})
    assert "needs a C++ compiler" in sentence(problem)
    with pytest.raises(BuildProblem) as problem:
        toolchain.find_compiler({"CXX": "no-such-compiler -m64"})
    assert "CXX names no-such-compiler" in sentence(problem)


@LINUX
def test_a_compiler_that_does_not_compile_is_one_sentence(tmp_path):
    path = script(tmp_path / "c++", "echo 'error: unrecognized option -std=c++17' >&2; exit 1")
    with pytest.raises(BuildProblem) as problem:
        toolchain.find_compiler({"CXX": path})
    assert "unrecognized option" in sentence(problem) and "GCC 9 or newer" in sentence(problem)


def test_a_missing_nvcc_is_one_sentence(monkeypatch):
    monkeypatch.setattr(toolchain, "nvcc_path", lambda environ: None)
    with pytest.raises(BuildProblem) as problem:
        toolchain.find_nvcc({})
    assert "12.0 to 13.x" in sentence(problem) and "GENKERN_CUDA=0" in sentence(problem)


@pytest.mark.parametrize("release", ["10.2", "11.8", "14.0"])
def test_an_unsupported_nvcc_is_one_sentence_that_names_the_supported(tmp_path, release):
    script(tmp_path / "bin/nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.89'")
    with pytest.raises(BuildProblem) as problem:
        toolchain.find_nvcc({"CUDA_HOME": str(tmp_path)})
    assert f"is {release}.89" in sentence(problem) and "12.0 to 13.x" in sentence(problem)


def test_an_nvcc_that_refuses_the_host_compiler_is_one_sentence(tmp_path):
    version = "case $1 in --version) echo 'release 12.4, V12.4.99'; exit 0;; esac"
    script(tmp_path / "bin/nvcc", f"{version}\necho 'error: unsupported GNU version!' >&2; exit 1")
    with pytest.raises(BuildProblem) as problem:
        toolchain.find_nvcc({"CUDA_HOME": str(tmp_path)})
    assert "unsupported GNU version" in sentence(problem) and "-ccbin" in sentence(problem)


def test_an_old_torch_is_one_sentence(monkeypatch):
    monkeypatch.setattr(toolchain, "find_package", lambda name: Package(Path(), "2.9.1"))
    with pytest.raises(BuildProblem) as problem:
        toolchain.find_torch()
    assert "torch 2.9.1" in sentence(problem) and "2.10 or newer" in sentence(problem)


def test_a_package_missing_at_build_time_is_one_sentence():
    with pytest.raises(BuildProblem) as problem:
        toolchain.find_package("a_package_that_nobody_has")
    assert "--no-build-isolation" in sentence(problem)


@pytest.mark.parametrize("text, pair", [("2.10.0", (2, 10)), ("2.13.0+cpu", (2, 13)), ("2.15.0a0+git1", (2, 15))])
def test_versions_compare_as_numbers(text, pair):
    assert toolchain.version_of(text) == pair


def test_default_architectures_are_those_that_nvcc_knows_and_the_last_has_ptx():
    assert toolchain.cuda_architectures(NVCC, {}) == ["7.5", "8.0", "9.0", "10.0", "12.0+PTX"]
    older = Nvcc("nvcc", "12.4.99", (), ("7.0", "7.5", "8.0", "8.6", "9.0"))
    assert toolchain.cuda_architectures(older, {}) == ["7.5", "8.0", "9.0+PTX"]


def test_torch_cuda_arch_list_overrides_the_architectures():
    environ = {"TORCH_CUDA_ARCH_LIST": "8.6; 9.0a 9.0a,12.0+PTX"}
    assert toolchain.cuda_architectures(NVCC, environ) == ["8.6", "9.0a", "12.0+PTX"]


@pytest.mark.parametrize("name", ["5.2", "Hopper", "9"])
def test_an_unknown_architecture_is_one_sentence(name):
    with pytest.raises(BuildProblem) as problem:
        toolchain.cuda_architectures(NVCC, {"TORCH_CUDA_ARCH_LIST": f"9.0;{name}"})
    assert f"names {name}," in sentence(problem) and "12.0" in sentence(problem)


def test_gencode_gives_code_and_for_ptx_both():
    assert toolchain.gencode(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@LINUX
def test_cpu_kernels_are_compiled_once_for_each_instruction_set(tmp_path):
    text = commands_of(tmp_path, None)
    for isa, flag in (("scalar", ""), ("avx2", "-mavx2"), ("avx512", "-mavx512f")):
        line = text.partition(f"map_cpu.{isa}.o: cxx csrc/kernels/map_cpu.cpp\n")[2].partition("\n")[0]
        assert f"-DGENKERN_ISA={isa} {flag}".rstrip() in line
    assert text.count(": cxx csrc/kernels/dispatch.cpp") == 1
    assert text.count(": cxx csrc/kernels/map_cpu.cpp") == 3
    assert commands_of(tmp_path, None, "aarch64").count(": cxx csrc/kernels/map_cpu.cpp") == 1


@LINUX
def test_nothing_is_contracted_but_what_the_sources_name(tmp_path):
    rules = [
        line for line in commands_of(tmp_path, NVCC).splitlines() if line.startswith("  command") and " -c " in line
    ]
    assert len(rules) == 2
    assert all("-ffp-contract=off" in rule and "fast-math" not in rule for rule in rules)
    assert "-fmad=false" in rules[1]


@LINUX
def test_the_cuda_half_is_compiled_only_with_nvcc(tmp_path):
    without = commands_of(tmp_path, None)
    assert "map_cuda.cu" not in without and "GENKERN_WITH_CUDA" not in without and "USE_CUDA" not in without
    text = commands_of(tmp_path, NVCC)
    assert "map_cuda.cu.o: nvcc csrc/kernels/map_cuda.cu\n  flags = -gencode=arch=compute_90,code=sm_90" in text
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in text and "-DUSE_CUDA" in text
    assert "-cudart static" in text


@LINUX
def test_the_build_writes_into_its_folder_alone(tmp_path):
    text = commands_of(tmp_path, NVCC)
    targets = [line.split()[1] for line in text.splitlines() if line.startswith("build ")]
    assert len(targets) == 9 and all(target.startswith("build/here/") for target in targets)
    assert "builddir = build/here\n" in text  # ninja's own log


@LINUX
def test_libraries_carry_no_path_of_the_build(tmp_path):
    assert "rpath" not in commands_of(tmp_path, NVCC)


@LINUX
def test_commands_stay_the_same_when_an_isolated_build_installs_torch_elsewhere(tmp_path):
    first = commands_of(tmp_path, None)
    (tmp_path / "site").rename(tmp_path / "moved")
    assert commands_of(tmp_path, None) == first


def test_the_record_says_what_was_built(tmp_path):
    built = record.of(tools(tmp_path, NVCC), None)
    assert built["cpu"] == {
        "instruction_sets": ["scalar", "avx2", "avx512"],
        "compiler": "c++ 12",
        "torch": "2.13.0+cpu",
    }
    assert built["cuda"] == {"nvcc": "13.0.88", "architectures": ["9.0"]}
    assert "CUDA half (9.0), nvcc 13.0.88" in record.lines(built)[1]
    assert (
        record.lines(record.of(tools(tmp_path, None), "GENKERN_CUDA=0"))[1] == "genkern: no CUDA half: GENKERN_CUDA=0"
    )


def run_setup(tmp_path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--build-lib", str(tmp_path)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=False, timeout=60
    )


@LINUX
@pytest.mark.parametrize(
    "environ, words",
    [
        ({"GENKERN_CUDA": "yes"}, "GENKERN_CUDA is 'yes': set it to auto, 0 or 1."),
        ({"GENKERN_CUDA": "0", "CXX": "no-such-compiler"}, "CXX names no-such-compiler, which was not found"),
    ],
)
def test_setup_ends_with_the_sentence_and_without_a_traceback(tmp_path, environ, words):
    pytest.importorskip("setuptools")
    done = run_setup(tmp_path, **environ)
    assert done.returncode != 0
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@LINUX
def test_insisting_on_cuda_without_a_usable_nvcc_fails(tmp_path):
    pytest.importorskip("setuptools")
    script(tmp_path / "bin/nvcc", "echo 'release 11.8, V11.8.89'")
    done = run_setup(tmp_path / "out", GENKERN_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "GENKERN_CUDA=1, but" in done.stderr and "Traceback" not in done.stderr


@LINUX
def test_the_compiler_of_this_machine_is_found():
    try:
        compiler = toolchain.find_compiler()
    except BuildProblem as problem:
        pytest.skip(str(problem))
    assert subprocess.run([*compiler.command, "--version"], check=False).returncode == 0, shlex.join(compiler.command)
