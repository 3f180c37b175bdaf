"""The command line: what it prints, and that what cannot run says so in one sentence before anything is made."""

import importlib.util
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from genkern import cli, info


def run(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


def complaint(result):
    """The one sentence on stderr of a command that refused."""
    assert result.exit_code == 2 and not result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("genkern: ")
    return lines[0]


def test_info_prints_the_report():
    result = run("info")
    assert result.exit_code == 0
    assert result.stdout.strip() == info.report().strip()


def test_help_names_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert "demo" in result.stdout and "info" in result.stdout


def test_the_module_runs_without_importing_torch_for_its_help():
    code = "import sys\nfrom genkern import cli\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_device_is_named(tmp_path):
    message = complaint(run("demo", "--device", "toaster", "--out", str(tmp_path / "new")))
    assert "--device: expected auto, cpu, cuda or cuda:N, got 'toaster'" in message
    assert not (tmp_path / "new").exists()


def test_a_device_that_is_absent_is_named_with_those_that_are_there(tmp_path):
    message = complaint(run("demo", "--device", "cuda:99", "--out", str(tmp_path / "new")))
    assert "--device: cuda:99 is not usable here; this machine has cpu" in message


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = complaint(run("demo", "--out", str(tmp_path / "file" / "below")))
    assert f"--out: {tmp_path / 'file' / 'below'} cannot be written" in message


@pytest.mark.parametrize("seed", ["-1", str(1 << 63)])
def test_a_seed_outside_its_range_is_named(seed, tmp_path):
    message = complaint(run("demo", f"--seed={seed}", "--out", str(tmp_path)))
    assert f"--seed: expected 0 to 2^63 - 1, got {seed}" in message


def test_missing_extras_are_named_with_the_command_that_installs_them(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "sklearn" else find(name, *a))
    message = complaint(run("demo", "--out", str(tmp_path)))
    assert "scikit-learn" in message and "pip install 'genkern[demo]'" in message
