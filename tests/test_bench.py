"""The benchmark: every contender of a case does the same work, and a run writes what it says and nothing else."""

import importlib.util
import json
import pathlib
import statistics

import pytest
import torch
from typer.testing import CliRunner

from genkern import _library, cli, eager
from genkern.bench import cases, host, loops, machine, networks, peers, run, setup, table, timing, world
from genkern.bench.world import (
    CAREFUL,
    COMPILED,
    FLOOR,
    FLOOR_GRAPHED,
    GENKERN,
    GRAPHED,
    TEXTBOOK,
    Compiler,
    World,
)

pytestmark = pytest.mark.skipif(_library.torch_ops() is None, reason="the compiled library is missing")

CPU = torch.device("cpu")
SPECS = cases.specs(CPU) if _library.torch_ops() is not None else []
COMPILER = Compiler(wanted=False)
COMPILED_TOO = ("add_noise, by sample", "ddim_step, clipped", "path_loss, forward and backward")
ARRAYS = [(spec, dtype) for spec in SPECS for dtype in spec.dtypes]
LIBRARIES = ("diffusers", "k-diffusion", "flow_matching", "torchcfm", "torchdiffeq")


def built(spec, dtype, compiler=COMPILER, elements=run.SMALL):
    return spec.build(World(CPU, dtype, elements, compiler, same_noise=True))


def bench(*arguments):
    return CliRunner().invoke(cli.app, ["bench", "--device", "cpu", *arguments])


@pytest.mark.parametrize("spec, dtype", ARRAYS, ids=[f"{spec.name}-{dtype}" for spec, dtype in ARRAYS])
def test_every_contender_of_a_case_returns_what_genkern_returns(spec, dtype):
    case = built(spec, dtype)
    every = case.contenders.keys() - {GENKERN, FLOOR}
    with cases.setting(case):
        found = run.deviations(case)
    assert case.name == spec.name
    assert found.keys() == every
    assert {CAREFUL, TEXTBOOK} <= found.keys()
    assert all(value <= run.TOLERANCES[dtype] for value in found.values())


@pytest.mark.parametrize("spec", [s for s in SPECS if s.name in COMPILED_TOO], ids=lambda spec: spec.name)
def test_the_compiled_formula_returns_what_genkern_returns(spec):
    compiler = Compiler()
    if compiler.reason:
        pytest.skip(compiler.reason)
    assert run.deviations(built(spec, "float32", compiler))[COMPILED] <= run.TOLERANCES["float32"]


def test_a_contender_that_does_other_work_is_an_error():
    case = built(next(s for s in SPECS if s.name == "euler_step"), "float32")
    right = case.contenders[TEXTBOOK]
    case.contenders[TEXTBOOK] = lambda: right() * 1.001
    with pytest.raises(run.Disagreement, match="euler_step, float32: eager differs from genkern"):
        run.deviations(case)


def test_a_library_that_fails_is_skipped_with_the_reason_and_not_timed():
    def broken():
        raise TypeError("step() wants another argument\nmore")

    spec = next(s for s in SPECS if s.name == "heun_step")
    case, timed = built(spec, "float32"), built(spec, "float32")
    case.contenders["diffusers"] = timed.contenders["diffusers"] = broken
    assert "diffusers" not in run.deviations(case)
    assert case.skipped["diffusers"] == "step() wants another argument" and "diffusers" not in case.contenders
    run.leave_out(timed, case.skipped)
    assert "diffusers" not in timed.contenders and timed.skipped["diffusers"] == case.skipped["diffusers"]


def test_a_formula_that_does_not_compile_is_skipped_with_the_reason():
    def broken():
        raise RuntimeError("no such lowering")

    case = built(next(s for s in SPECS if s.name == "heun_step"), "float32")
    case.contenders[COMPILED] = broken
    run.leave_out(case, {})
    assert case.skipped[COMPILED] == "no such lowering" and COMPILED not in case.contenders


def test_baselines_draw_their_own_noise_where_they_are_timed():
    spec = next(s for s in SPECS if s.name == "add_noise")
    case = spec.build(World(CPU, "float32", run.SMALL, COMPILER))
    first, second = (case.contenders[TEXTBOOK]().clone() for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "name, tensors",
    [("randn", 1), ("add_noise", 2), ("add_noise, noise written", 3), ("ddim_step", 3), ("ddim_step, guided", 4)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_formula(name, tensors, dtype):
    case = built(next(s for s in SPECS if s.name == name), dtype)
    assert case.moved == tensors * run.SMALL * {"float32": 4, "bfloat16": 2}[dtype]


def test_mixed_precision_reads_the_network_output_in_half():
    case = built(next(s for s in SPECS if s.name == "ddim_step"), "mixed")
    assert case.moved == run.SMALL * (4 + 2 + 4)


def test_libraries_take_part_or_say_why_not():
    named = set()
    for spec in SPECS:
        case = built(spec, "float32")
        named |= {name for name in LIBRARIES if name in case.contenders}
        named |= {name for name, reason in case.skipped.items() if name in LIBRARIES and reason}
    assert named == set(LIBRARIES)


def test_a_library_that_is_absent_is_skipped_with_the_reason(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "diffusers" else find(name, *a))
    with pytest.raises(peers.Missing, match="diffusers is not installed"):
        peers.load("diffusers")
    case = built(next(s for s in SPECS if s.name == "ddim_step"), "float32")
    assert "diffusers" not in case.contenders and case.skipped["diffusers"] == "diffusers is not installed"


def test_a_setting_of_threads_and_instruction_set_is_undone():
    isa, threads = _library.torch_ops().cpu_isa, torch.get_num_threads()
    before = isa("")
    for spec in SPECS:
        if spec.name.startswith("normals"):
            case = built(spec, "float32")
            with cases.setting(case):
                assert isa("") == case.isa and torch.get_num_threads() == case.threads
    assert isa("") == before and torch.get_num_threads() == threads


def test_contenders_are_timed_in_turns():
    order = []
    found = timing.measure({name: lambda n=name: order.append(n) or sum(range(200000)) for name in "AB"}, CPU, 4, 60.0)
    rounds = [name for k, name in enumerate(order) if k == 0 or order[k - 1] != name]
    assert rounds == list("AB" * 5)  # the warm-up, then four rounds
    assert all(t.samples == 4 and t.least <= t.low <= t.median <= t.high <= t.most for t in found.values())


@pytest.mark.parametrize(("fills", "late", "writes"), [(2, 0, 2), (2, 2, 2 + 4 + 8), (2, 9, 2 + 4 + 8 + 16), (1, 9, 1)])
def test_a_call_that_the_host_enqueued_late_is_timed_again(
    fills: int, late: int, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After twice as many writes each time; the last time counts. A call that is not to be waited for is timed once."""

    made = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            made.append(self)
            self.number = len(made)

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return self.number // 2 < late

        def elapsed_time(self, end: "Event") -> float:
            return float(end.number)

    class Flush:
        written = 0

        def zero_(self) -> None:
            self.written += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    flush, calls = Flush(), []
    seconds = timing._device(lambda: calls.append(0), flush, fills)
    assert (flush.written, seconds) == (writes, 2e-3 * len(calls))


def test_times_are_the_median_and_quartiles():
    seconds = [5.0, 1.0, 3.0, 2.0, 4.0]
    found = timing.Times.of(seconds)
    assert (found.median, found.least, found.most) == (statistics.median(seconds), 1.0, 5.0)
    assert (found.low, found.high) == (2.0, 4.0)


def test_a_run_writes_json_tables_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Compiler", lambda wanted=True: COMPILER)
    options = ["--mib", "0.0625", "--repeats", "3", "--dtypes", "float32,mixed", "--only", "[eDn]*", "--quick"]
    found = bench(*options, "--out", str(tmp_path))
    assert found.exit_code == 0, found.output
    stem = machine.slug(CPU)
    result = json.loads((tmp_path / f"{stem}.json").read_text())
    assert result["arguments"]["mib"] == 0.0625 and result["machine"]["cpu"] == machine.cpu_name()
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert {row["kind"] for row in result["rows"]} == {"op", "normals", "loop"}
    for row in result["rows"]:
        own = row["seconds"][GENKERN]["median"]
        assert all(t["samples"] == 3 for t in row["seconds"].values())
        for name, speedup in row["speedup"].items():
            assert speedup == pytest.approx(row["seconds"][name]["median"] / own)
        if "bytes" in row:
            copy = 2 * 4 * row["count"] / row["seconds"]["copy_"]["median"]
            assert row["ratio_to_copy"] == pytest.approx(row["bytes"] / own / copy)
            assert row["bytes_per_second"][GENKERN] == pytest.approx(row["bytes"] / own)
    text = (tmp_path / f"{stem}.md").read_text()
    assert all(f"| {row['case']} |" in text for row in result["rows"])
    for picture in ("bandwidth", "speedup"):
        assert (tmp_path / f"{stem}-{picture}.png").read_bytes().startswith(b"\x89PNG")


def a_result(device="cpu", name="A processor", median=1e-3):
    times = timing.Times.of([median]).as_dict()
    rows = [
        {
            "case": "euler_step", "kind": "op", "dtype": "float32", "count": 1000, "bytes": 12000,
            "seconds": {GENKERN: times, TEXTBOOK: timing.Times.of([2.5 * median]).as_dict(), "copy_": times},
            "speedup": {TEXTBOOK: 2.5}, "ratio_to_copy": 1.5, "copy_bytes_per_second": 8000 / median,
            "bytes_per_second": {GENKERN: 12000 / median, TEXTBOOK: 4800 / median},
        }
    ]  # fmt: skip
    facts = {
        "name": name, "device": device, "threads": 2, "driver": "1.0", "revision": None, "python": "3",
        "date": "2020-01-01T00:00:00", "versions": {"torch": "2"},
    }  # fmt: skip
    return {"machine": facts, "arguments": {"mib": 1.0}, "rows": rows}


def test_rows_of_a_former_run_stay_until_they_are_measured_again():
    former, now = a_result(), a_result(median=2e-3)
    former["rows"].append({**former["rows"][0], "dtype": "bfloat16"})
    now["machine"] = {**now["machine"], "date": "2021-01-01T00:00:00"}
    found = run.with_earlier(now, former)
    assert [(row["dtype"], row.get("earlier")) for row in found["rows"]] == [
        ("float32", None),
        ("bfloat16", "2020-01-01T00:00:00"),
    ]
    again = run.with_earlier(a_result(), found)
    assert again["rows"][1]["earlier"] == "2020-01-01T00:00:00"
    assert run.with_earlier({**now, "arguments": {"mib": 2.0}}, former)["rows"] == now["rows"]
    text = table.section(found)
    assert "| euler_step † | bfloat16 |" in text and "† of an earlier run (2020-01-01 00:00 UTC)" in text


def test_the_readme_is_rewritten_between_its_markers_and_nowhere_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter | old\n")
    for _ in range(2):
        table.rewrite(readme, [a_result()])
    before, _, rest = readme.read_text().partition(table.BEGIN)
    inside, _, after = rest.partition(table.END)
    assert (before, after) == ("# before\n\n", "\n\nafter | old\n")
    assert "old" not in inside and inside == "\n" + table.section(a_result())
    assert "| euler_step | float32 | 1.00 ms | 0.01 | 1.50 | 2.50x | - | - |  |" in inside


def test_a_gpu_has_columns_of_host_time_and_peak_memory():
    result = a_result("cuda", "A GPU", 1e-4)
    (row,) = result["rows"]
    row["kind"] = "training"
    row["seconds"][GENKERN] = timing.Times.of([1e-4], host=2e-5, peak=3 << 20).as_dict()
    text = table.section(result)
    assert "| op | dtype | time | host | GB/s |" in text
    assert "| euler_step | float32 | 100 us | 20.0 us | 0.12 | 1.50 | 2.50x | - | - |  |" in text
    assert "| euler_step | float32 | 3.00 MiB | - |" in text


def test_small_calls_are_a_table_of_times_over_that_of_a_product(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "ROUNDS", 2)
    monkeypatch.setattr(run, "Compiler", lambda wanted=False: Compiler(wanted=False))
    asked = setup.prepare("cpu", only="host time", out=tmp_path)
    assert host.asked(None) and not host.asked("randn")
    result = run.run(asked, lambda text: None)
    product, *calls = result["host"]
    assert result["rows"] == []
    assert (product["call"], product["ratio"], product["gradient_ratio"]) == ("x * 2.0", 1.0, 1.0)
    named = {"euler_step", "heun_step", "ddim_step", "add_noise", "consistency_skip", "path_loss", "randn"}
    assert named < {call["call"] for call in calls}
    for call in calls:
        assert call["ratio"] == pytest.approx(call["seconds"] / product["seconds"])
    text = next(tmp_path.glob("*.md")).read_text()
    assert "| small call on the host | time | over `x * 2.0` | with a gradient | over it | through torch.ops |" in text
    assert eager.face is not None


def test_redrawing_covers_every_result_of_the_folder_with_gpus_first(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"{table.BEGIN}{table.END}")
    (tmp_path / "a-cpu.json").write_text(json.dumps(a_result()))
    (tmp_path / "b-cuda.json").write_text(json.dumps(a_result("cuda", "A GPU", 1e-5)))
    found = bench("--redraw", "--out", str(tmp_path), "--readme", str(readme))
    assert found.exit_code == 0, found.output
    text = readme.read_text()
    assert 0 < text.index("### A GPU") < text.index("### A processor")
    assert (tmp_path / "b-cuda-bandwidth.png").exists() and (tmp_path / "a-cpu.md").exists()


def test_the_readme_of_this_repository_has_the_markers():
    table.check_markers(pathlib.Path(__file__).parents[1] / "README.md")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--device", "toaster"], "--device: expected auto, cpu or cuda, got 'toaster'"),
        (["--mib", "0"], "--mib: expected a number from 0.0625 to 16384, got 0"),
        (["--mib", "nan"], "--mib: expected a number from 0.0625 to 16384, got nan"),
        (["--repeats", "0"], "--repeats: expected 1 or more, got 0"),
        (["--dtypes", "float32,int8"], "--dtypes: expected names of float32, bfloat16, float16, mixed"),
        (["--only", "nothing such"], "--only: no case of float32, bfloat16 matches 'nothing such'; there are: randn"),
        (["--only", "randn", "--dtypes", "mixed"], "--only: no case of mixed matches 'randn'"),
        (["--readme", "absent.md"], "--readme: absent.md cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_run_says_so_in_one_sentence_before_anything_is_made(options, message, tmp_path):
    found = bench("--out", str(tmp_path / "new"), *options)
    assert found.exit_code == 2 and not found.stdout
    lines = found.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"genkern: {message}")
    assert not (tmp_path / "new").exists()


def test_a_readme_without_markers_is_named(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    found = bench("--out", str(tmp_path / "new"), "--readme", str(readme))
    assert found.exit_code == 2 and f"expected one {table.BEGIN} and after it one {table.END}" in found.stderr
    assert readme.read_text() == "nothing\n" and not (tmp_path / "new").exists()


def test_without_kernels_nothing_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "torch_devices", frozenset)
    with pytest.raises(setup.CannotRun, match="genkern has no cpu kernels here"):
        setup.prepare("cpu", out=tmp_path)


def test_a_compiler_that_fails_is_a_reason_and_no_error(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    compiler = Compiler()
    assert compiler.reason == "torch.compile does not work here: no C++ compiler found"
    case = next(s for s in SPECS if s.name == "heun_step").build(World(CPU, "float32", run.SMALL, compiler))
    assert COMPILED not in case.contenders and case.skipped[COMPILED] == compiler.reason


def test_tensors_have_the_size_that_is_asked_for():
    assert cases.elements_of(64.0) * 4 == 64 << 20
    w = world.World(CPU, "bfloat16", cases.elements_of(1.0), COMPILER)
    assert w.state("x").numel() == 1 << 18 and w.state("x").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "network, shape",
    [
        (networks.UNet(channels=8), (2, 3, 16, 8)),
        (networks.UNet(channels=16, factors=(1, 2), image=1), (1, 1, 4, 4)),
        (networks.DiT(width=48, layers=2, heads=3, side=8), (2, 4, 8, 8)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_return_their_inputs_shape_and_heed_the_time(network, shape, dtype):
    network, x = network.to(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad():
        early, late = (network(x, torch.full(shape[:1], t)) for t in (0.1, 0.9))
        alone = network(x[:1], torch.full((1,), 0.1))
    assert early.shape == shape and early.dtype == dtype
    assert early.isfinite().all() and not torch.equal(early, late)
    torch.testing.assert_close(alone, early[:1], rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_the_transformer_has_the_size_of_dit_s_2():
    """Peebles and Xie, arXiv:2212.09748, table 1: 33 M parameters (ours has neither classes nor a variance)."""
    with torch.device("meta"):
        count = sum(p.numel() for p in networks.DiT().parameters())
    assert 31e6 < count < 34e6


def test_a_loop_over_a_network_in_bfloat16_is_the_same_work_for_all():
    network = networks.UNet(channels=8, factors=(1, 1)).bfloat16().requires_grad_(False)
    case = loops._flow(World(CPU, "float32", run.SMALL, COMPILER), network, (2, 3, 8, 8), "flow, small", 3)
    assert case.dtype == "mixed"
    assert {CAREFUL, TEXTBOOK} <= run.deviations(case).keys()
    assert case.contenders[FLOOR]().dtype == torch.bfloat16


def test_large_networks_are_benchmarked_on_a_gpu_alone():
    large = {loops.unet_name(1), loops.unet_name(16), loops.dit_name()}
    assert large <= {spec.name for spec in cases.specs(torch.device("cuda"))}
    assert not large & {spec.name for spec in cases.specs(CPU)}


def test_a_captured_loop_is_told_beside_the_graph_of_its_network():
    case = world.Case("a loop", "loop", "float32", None, {}, count=10)
    seconds = {GENKERN: 4e-3, FLOOR: 3e-3, GRAPHED: 1.05e-3, FLOOR_GRAPHED: 1e-3}
    row = run.row_of(case, {}, {name: timing.Times.of([s]) for name, s in seconds.items()})
    assert row["microseconds_a_step_over_the_network_graphed"] == pytest.approx(5.0)
    assert row["ratio_to_the_network_graphed"] == pytest.approx(1.05)
    result = a_result("cuda", "A GPU")
    result["rows"] = [row, {**row, "case": "another", "seconds": {k: row["seconds"][k] for k in (GENKERN, FLOOR)}}]
    del result["rows"][1]["microseconds_a_step_over_the_network_graphed"]
    del result["rows"][1]["ratio_to_the_network_graphed"]
    text = table.section(result)
    assert "| a loop | 10 | 4.00 ms | 3.00 ms | 100.0 us | 1.05 ms | 1.00 ms | 5.0 us | 1.050 |" in text
    assert "| another | 10 | 4.00 ms | 3.00 ms | 100.0 us | - | - | - | - |" in text
