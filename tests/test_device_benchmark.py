"""benchmarks.device loses nothing to a section that fails, hangs or dies, and counts and finds what it says."""

import json
import os
import runpy
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.device_facts import read_results
from benchmarks.device_report import Bench, Report, format_table
from benchmarks.device_runs import average_load
from benchmarks.device_steps import (
    COMPILED,
    FlopCount,
    StepCase,
    SyncRecorder,
    build_training,
    find_line,
    list_cases,
)
from codegrid.engine.settings import TrainerSettings
from tests.helpers.configs import compose_config
from tests.helpers.stage2 import lightning_warnings
from vqgan.stages.building import build_module

# Python 3.12 and later warn of forks of processes with threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path, {"bench": "device", "device": "cpu", "command": "python"})


def run(report: Report, section: Any, seconds: float = 20.0) -> dict[str, Any]:
    """What device.json has once a section has run in a process of its own."""
    settings = {"device": "cpu", "tiny": True, "out": report.out}
    report.run_section("part", "A part.", section, settings, "fork", time.monotonic() + seconds)
    saved: dict[str, Any] = json.loads((report.out / "device.json").read_text())
    return saved


def measure_two(bench: Bench) -> None:
    bench.remember(peak_tflops=2.0)
    bench.add("one", ms=1.5)
    bench.add("two", ms=2.5, tokens=3)


def fail_between(bench: Bench) -> None:
    with bench.guard("broken"):
        raise RuntimeError("out of luck\nand more")
    bench.add("after", ms=1.0)
    raise ValueError("the end")


def die(bench: Bench) -> None:
    bench.add("before", ms=1.0)
    os._exit(3)


def hang(bench: Bench) -> None:
    bench.add("before", ms=1.0)
    subprocess.run(["sleep", "60"], check=False)


def test_rows_and_facts_reach_the_files_and_later_sections(
    report: Report, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = run(report, measure_two)
    assert saved["rows"]["part"] == [
        {"name": "one", "ms": 1.5}, {"name": "two", "ms": 2.5, "tokens": 3}
    ]  # fmt: skip
    assert report.facts == saved["facts"] == {"peak_tflops": 2.0}
    page = (report.out / "device.md").read_text().splitlines()
    assert "| one | 1.5 | - |" in page
    assert "| two | 2.5 | 3 |" in page
    assert "part | two: ms 2.5, tokens 3" in capfd.readouterr().out


def test_an_exception_becomes_a_row_and_the_section_continues(report: Report) -> None:
    rows = run(report, fail_between)["rows"]["part"]
    assert [row["name"] for row in rows] == ["broken", "after", "section"]
    assert rows[0]["error"].startswith("RuntimeError: out of luck and more (")
    assert "test_device_benchmark.py:" in rows[0]["error"]
    assert rows[2]["error"].startswith("ValueError: the end")
    assert "the end" in (report.out / "profile.txt").read_text()


def test_a_section_that_dies_keeps_its_rows_and_says_so(report: Report) -> None:
    saved = run(report, die)
    assert saved["rows"]["part"] == [{"name": "before", "ms": 1.0}]
    assert "ended with 3" in saved["sections"]["part"]["state"]


def test_a_section_that_hangs_is_cut_off_in_time_with_all_that_it_started(report: Report) -> None:
    began = time.monotonic()
    saved = run(report, hang, seconds=1.5)
    assert time.monotonic() - began < 4
    assert saved["rows"]["part"] == [{"name": "before", "ms": 1.0}]
    assert saved["sections"]["part"]["state"].startswith("Cut off after")
    listed = subprocess.run(["pgrep", "-f", "^sleep 60$"], capture_output=True, check=False)
    assert not listed.stdout


def test_a_section_without_time_is_not_run(report: Report) -> None:
    saved = run(report, measure_two, seconds=0.5)
    assert "part" not in saved["rows"]
    assert saved["sections"]["part"]["state"] == "Not run: no time was left."


def test_a_table_has_the_columns_of_all_rows() -> None:
    lines = format_table([{"name": "a|b", "ms": 1234.5}, {"name": "c", "gib": 0.12345}])
    assert lines == [
        "| name | ms | gib |", "|---|---|---|", "| a\\|b | 1,234 | - |", "| c | - | 0.1235 |"
    ]  # fmt: skip


def test_flop_are_counted_forward_and_backward_also_where_a_gradient_is_taken_of_a_leaf() -> None:
    linear, leaf = nn.Linear(6, 5, bias=False), torch.randn(3, 6, requires_grad=True)
    with FlopCount() as counter:
        loss = linear(leaf).square().sum()
        torch.autograd.grad(loss, [linear.weight, leaf])
    assert counter.total == 3 * 2 * 3 * 6 * 5


def test_what_is_compiled_is_a_case_that_is_measured_before() -> None:
    names = [case.name for case in list_cases(tiny=False)]
    assert len(set(names)) == len(names)
    assert set(COMPILED) <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("case", list_cases(tiny=False), ids=lambda case: case.name)
def test_every_case_is_a_config_of_the_program(case: StepCase) -> None:
    stage = "prior" if case.is_prior else "vqgan"
    config = compose_config(f"stage={stage}", *case.words)
    settings = TrainerSettings.read(config.trainer)
    assert settings.checkpoint_activations == ("checkpointed" in case.name)
    if not case.is_prior:
        module = build_module(config, settings)
        assert set(module.tokenizer.encoder.image_size) == {config.data.image_size}
        assert (module.adversary is not None) == ("GAN" in case.name)


@lightning_warnings
@pytest.mark.filterwarnings("ignore:.*logging on a CPU", "ignore:.*does not have many")
def test_waits_are_counted_by_the_line_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch reports them: a warning from within the operation that waits."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    source = (
        "def wait(self):\n"
        "    if modes[-1:] == ['warn']:\n"
        "        warnings.warn('called a synchronizing CUDA operation', UserWarning)\n"
        "    return item(self)\n"
    )
    names = {"modes": modes, "warnings": warnings, "item": torch.Tensor.__float__}
    exec(compile(source, "/x/site-packages/torch/_tensor.py", "exec"), names)
    monkeypatch.setattr(torch.Tensor, "__float__", names["wait"])
    case = StepCase("small", tuple(list_cases(True)[-1].words), 2, 16, 2)
    training = build_training(case, "cpu")
    recorder = SyncRecorder(1, 2)
    step = type(training.module).training_step

    def training_step(self: Any, *batch: Any) -> None:
        step(self, *batch)
        float(self.vitals["loss"])

    monkeypatch.setattr(type(training.module), "training_step", training_step)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", recorder.show)
        training.fit(recorder)
    assert modes == ["warn", "default"]
    [(place, times)] = [p for p in recorder.places.items() if "training_step" in p[0]]
    assert times == 2
    assert place.startswith("tests/test_device_benchmark.py:")
    assert place.endswith("[in torch/_tensor.py:3 wait]")


def test_the_line_of_the_program_is_named_with_that_of_the_package_below_it() -> None:
    frames = [
        traceback.FrameSummary(f"{ROOT}/vqgan/module.py", 7, "step", line="look(x)"),
        traceback.FrameSummary("/x/site-packages/torch/_tensor.py", 9, "item", line="return"),
    ]
    line = find_line(traceback.StackSummary.from_list(frames))
    assert line == "vqgan/module.py:7 step: look(x) [in torch/_tensor.py:9 item]"


def test_each_test_leaves_a_row_as_soon_as_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks: dict[str, Any] = runpy.run_path(str(ROOT / "tests/device/conftest.py"))
    report, rows = hooks["pytest_runtest_logreport"], tmp_path / "rows.jsonl"
    assert read_results(rows) == []
    monkeypatch.setenv("CODEGRID_TEST_ROWS", str(rows))
    skipped = (str(tmp_path), 3, "Skipped: not here")
    for name, when, outcome, why in (
        ("a", "setup", "passed", None), ("a", "call", "passed", None),
        ("b", "call", "failed", ">   assert 1 == x\nE   assert 1 == 2\n"), ("c", "setup", "skipped", skipped),
    ):  # fmt: skip
        report(
            pytest.TestReport(
                f"tests/x.py::{name}", ("", 0, ""), {}, outcome, why, when, duration=0.5
            )
        )  # type: ignore[arg-type]
    assert read_results(rows) == [
        {"name": "a", "result": "passed", "seconds": 0.5},
        {"name": "b", "error": "failed: assert 1 == 2"},
        {"name": "c", "error": "skipped: Skipped: not here"},
    ]


def test_the_load_of_a_gpu_is_averaged_over_the_time_in_which_it_worked() -> None:
    load = average_load("0, 0, 70.1, 345\n50, 10, 100.0, 1000\n100, 30, 300.0, 2000\n[N/A]\n")
    assert load == {"gpu_percent": 75, "memory_percent": 20, "watt": 200, "sm_mhz": 1500}
    assert average_load("") == {}


@pytest.mark.slow
def test_the_whole_benchmark_runs_on_a_cpu_and_fills_every_section(tmp_path: Path) -> None:
    command = ["-m", "benchmarks.device", "--device", "cpu", "--tiny", "--minutes", "8"]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    saved = json.loads((tmp_path / "device.json").read_text())
    failed = {
        f"{section}, {row['name']}": row["error"]
        for section, rows in saved["rows"].items()
        for row in rows
        if "error" in row and "not installed" not in row["error"]
    }
    assert list(failed) == ["syncs, all"], "a CPU has none"
    assert all(about["state"].endswith(" s.") for about in saved["sections"].values())
    assert set(saved["rows"]) == set(saved["sections"])
    assert {row["name"] for row in saved["rows"]["runs"]} == {
        "stage=vqgan", "stage=prior", "stage=sample"
    }  # fmt: skip
    assert (tmp_path / "reconstructions.png").is_file()
    assert (tmp_path / "samples.png").is_file()
    assert len(list(tmp_path.iterdir())) <= 8
    assert "training | conv 32 px, eager: " in done.stdout
