"""genkern.info, and the sentences on compiled halves that do not load."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genkern import _diagnose, _library, info


@pytest.fixture
def fresh_library(monkeypatch):
    """_library as in a process that has asked for nothing yet."""
    monkeypatch.setattr(_library, "_loaded", {})
    monkeypatch.setattr(_library, "_reasons", {})


def elf(path: Path, machine: int) -> Path:
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(11) + machine.to_bytes(2, "little") + bytes(44))
    return path


def this_machine() -> int:
    return {"x86_64": 62, "aarch64": 183}[platform.machine()]


LINUX = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="kernels exist on x86-64 and aarch64"
)


def test_the_facts_are_plain_values_and_agree_with_torch():
    facts = info.as_dict()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == {"version": str(torch.__version__), "cuda": torch.version.cuda}
    assert len(facts["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert ("cpu" in facts["kernels"]) == (facts["instruction_set"] in ("scalar", "avx2", "avx512"))


def test_the_report_has_a_line_for_each_thing():
    names = [line[:11].strip() for line in info.report().splitlines()]
    assert names[:6] == ["genkern", "python", "torch", "CPU half", "CUDA half", "arrays"]
    assert str(torch.__version__) in info.report()


def test_the_report_says_what_runs_without_compiled_halves(monkeypatch, tmp_path, fresh_library):
    monkeypatch.setattr(_library, "TORCH_LIBRARY", tmp_path / "libgenkern_torch.so")
    monkeypatch.setattr(_diagnose, "_PACKAGE", tmp_path)
    monkeypatch.setitem(sys.modules, "genkern._arrays", None)
    text = info.report()
    assert "genkern.reference" in text
    assert "libgenkern_torch.so is not built: run pip install -e ." in text


def test_importing_info_imports_no_torch():
    code = "import sys, genkern.info; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_torch_that_is_too_old_is_named(monkeypatch, fresh_library):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert _library.torch_ops() is None
    assert "torch 2.10 or newer and this is torch 2.9.1+cu128: pip install --upgrade torch" in (
        _library.why_missing() or ""
    )


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0"])
def test_torch_from_2_10_on_is_accepted(version):
    assert _diagnose.old_torch(version) is None


def test_a_library_of_another_machine_is_named(monkeypatch, tmp_path, fresh_library):
    other = 183 if platform.machine() == "x86_64" else 62
    monkeypatch.setattr(_library, "TORCH_LIBRARY", elf(tmp_path / "libgenkern_torch.so", other))
    assert _library.torch_ops() is None
    reason = _library.why_missing() or ""
    assert f"was built for {'aarch64' if other == 183 else 'x86_64'} and this machine is {platform.machine()}" in reason


def test_a_damaged_library_is_named(monkeypatch, tmp_path, fresh_library):
    (tmp_path / "libgenkern_torch.so").write_text("not a library")
    monkeypatch.setattr(_library, "TORCH_LIBRARY", tmp_path / "libgenkern_torch.so")
    assert _library.torch_ops() is None
    assert "no library of Linux" in (_library.why_missing() or "")


@LINUX
@pytest.mark.parametrize(
    "loader, words",
    [
        ("x.so: undefined symbol: aoti_torch_new", "asks torch 2.14.0 for aoti_torch_new, which it lacks"),
        ("libc.so.6: version `GLIBC_2.40' not found (required by x.so)", "needs GLIBC_2.40, which this system lacks"),
        ("libgomp.so.1: cannot open shared object file: No such file or directory", "needs libgomp.so.1"),
        ("something new", "did not load (something new)"),
    ],
)
def test_the_loaders_words_become_a_sentence_with_a_remedy(tmp_path, loader, words):
    text = _diagnose.load_error(elf(tmp_path / "x.so", this_machine()), OSError(loader), "2.14.0")
    assert words in text and "pip install" in text and "undefined symbol" not in text and "\n" not in text


def test_arrays_of_another_python_are_named(monkeypatch, tmp_path):
    built = {"platform": "linux-x86_64", "python": "3.9.1", "cpu": {"torch": "2.13.0"}}
    (tmp_path / "_build.json").write_text(json.dumps(built))
    monkeypatch.setattr(_diagnose, "_PACKAGE", tmp_path)
    assert "was built for Python 3.9.1 and this is Python" in _diagnose.missing("_arrays")


@pytest.mark.parametrize(
    "driver, nvcc, old", [(12080, "13.0.88", True), (13000, "13.2.1", False), (0, "13.0.88", False)]
)
def test_a_driver_of_an_older_cuda_is_named(driver, nvcc, old):
    text = _diagnose.old_driver(driver, nvcc)
    assert (text is not None) == old
    if text is not None:
        assert "compiled by CUDA 13.0.88 and this GPU's driver runs CUDA up to 12.8" in text


def test_the_cuda_half_is_left_alone_where_the_driver_is_too_old(monkeypatch, tmp_path, fresh_library):
    ops = _library.torch_ops()
    if ops is None or not ops.has_cuda():
        pytest.skip("the CUDA half is not built here")
    _library._loaded.clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_diagnose, "driver_version", lambda: 11080)
    assert _library.torch_devices() == {"cpu"}
    assert "this GPU's driver runs CUDA up to 11.8" in (_library.why_missing() or "")
