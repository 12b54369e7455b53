"""Runs that are killed at any moment and resumed, again and again, end in the state of an uninterrupted run."""

import csv
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import TINY_GAN, TINY_PRIOR, launch, start
from tests.helpers.forks import ForkedRun

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tokenizer")]
TIMED = (
    "images_per_second",
    "memory_gib",
    "seconds",
    "run",
    "id",
    "pictures",
)  # these differ between any two runs
KILLS = {
    "": 10,
    "-otherwise": 4,
}  # per stage, with its default settings and with those of OTHERWISE
LONGER = [
    "trainer.max_steps=24",
    "trainer.val_every=5",
    "trainer.save_every=3",
    "callbacks.doctor.every=4",
]
STAGES = {
    "vqgan": [
        *TINY_GAN,
        "loss.gate.start=4",
        "loss.gate.ramp=4",
        "loss.gate.warmup=2",
        "loss.freeze_codes=false",
    ],
    "prior": [*TINY_PRIOR, "ckpt=tokenizer", "prior.dropout=0.1", "callbacks.doctor.patience=1"],
}
OTHERWISE = {  # data workers, random crops, dropped labels, and micro-batches, the last of which is smaller
    "vqgan": ["data.num_workers=2", "data.crop=random", "trainer.accumulate=3"],
    "prior": ["conditional=true", "label_drop=0.5", "trainer.accumulate=3"],
}


def finish(words: list[str]) -> None:
    """Run a command to its end."""
    done = launch(*words)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of this module's own, with a tokenizer in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("chaos"))
        finish(["stage=vqgan", "run_dir=tokenizer", *STAGES["vqgan"]])
        yield


def begun(folder: Path) -> bool:
    return any((folder / "checkpoints" / f"{name}.ckpt").is_file() for name in ("last", "previous"))


def alike(one: Any, two: Any) -> bool:
    """Whether two values are equal to the bit, including tensors in containers."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return (
            isinstance(two, dict)
            and one.keys() == two.keys()
            and all(alike(value, two[key]) for key, value in one.items())
        )
    if isinstance(one, list | tuple):
        return isinstance(two, list | tuple) and len(one) == len(two) and all(map(alike, one, two))
    return bool(one == two)


def untimed(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name.rpartition("/")[2] not in TIMED}


def series(folder: Path) -> list[dict[str, Any]]:
    [file] = (folder / "csv").rglob("metrics.csv")
    with file.open(newline="") as lines:
        return [untimed(row) for row in csv.DictReader(lines)]


def life(
    words: list[str],
    folder: Path,
    moments: random.Random,
    seconds: float,
    kills: int,
) -> tuple[int, int]:
    """Kill and resume a run up to `kills` times, then let it finish.

    Returns the number of kills, and how many of them came while a file was written. An uninterrupted run takes `seconds`,
    a third of them before its first step.
    """
    killed = saving = 0
    while killed < kills:
        if not begun(folder):  # it can't be resumed
            shutil.rmtree(folder, ignore_errors=True)
        run = start(
            *([words[0], f"resume={folder}"] if begun(folder) else [*words, f"run_dir={folder}"])
        )
        wait_for_file = moments.random() < 0.5
        skipped = moments.randrange(4)  # files that are written without a kill
        moment = (2 if wait_for_file else moments.uniform(0.3, 0.9)) * seconds
        caught = wait_for_file and wait_for_write(run, folder, skipped, moment)
        if not wait_for_file:
            run.poll(moment)
        run.send_signal(signal.SIGKILL)
        if (code := run.wait()) == 0:
            return killed, saving
        assert code == -signal.SIGKILL, run.log[-3000:]
        killed, saving = killed + 1, saving + caught
    if not begun(folder):
        shutil.rmtree(folder, ignore_errors=True)
    finish([words[0], f"resume={folder}"] if begun(folder) else [*words, f"run_dir={folder}"])
    return killed, saving


def wait_for_write(run: ForkedRun, folder: Path, skipped: int, seconds: float) -> bool:
    """Wait until a run writes a file after so many others; False if it doesn't within this time."""
    deadline = time.monotonic() + seconds
    while run.poll() is None and time.monotonic() < deadline:
        if any(folder.rglob("*.tmp")):
            if not skipped:
                return True
            skipped -= 1
            while any(folder.rglob("*.tmp")):
                time.sleep(0.001)
        time.sleep(0.001)
    return False


@pytest.mark.parametrize("how", KILLS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_again_and_again_ends_like_an_uninterrupted_one(
    stage: str, how: str
) -> None:
    words, name = (
        [f"stage={stage}", *STAGES[stage], *LONGER, *(OTHERWISE[stage] if how else [])],
        f"{stage}{how}",
    )
    whole, moments = Path(f"whole-{name}"), random.Random(name)
    began = time.monotonic()
    finish([*words, f"run_dir={whole}"])
    seconds = time.monotonic() - began
    killed = while_writing = lives = 0
    while killed < KILLS[how]:
        folder, lives = Path(f"chaos-{name}-{lives}"), lives + 1
        kills = life(words, folder, moments, seconds, KILLS[how] - killed)
        killed, while_writing = killed + kills[0], while_writing + kills[1]
        compare(whole, folder)
    assert while_writing >= (2 if KILLS[how] >= 10 else 0)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_that_are_killed_and_terminated_end_like_uninterrupted_ones(stage: str) -> None:
    words, moments = (
        [f"stage={stage}", *STAGES[stage], *LONGER, "trainer.max_steps=36", "trainer.devices=2"],
        random.Random(stage),
    )
    whole, folder = Path(f"whole-{stage}-ranks"), Path(f"chaos-{stage}-ranks")
    finish([*words, f"run_dir={whole}"])
    begin = [*words, f"run_dir={folder}"]
    for n, (number, whom) in enumerate(
        [(signal.SIGKILL, "all"), (signal.SIGTERM, "first"), (signal.SIGTERM, "second")]
    ):
        run = start(*begin)
        begin = [words[0], f"resume={folder}"]
        step = moments.randrange(3 + 7 * n, 7 + 7 * n)  # later each time
        wait_until(partial(reached, folder, step), run)
        if whom == "all":
            os.killpg(run.pid, number)
        else:
            os.kill(run.pid if whom == "first" else other_rank(run.pid), number)
        assert run.wait() == (-number if number == signal.SIGKILL else 128 + number), run.log[
            -3000:
        ]
        wait_until(partial(gone, run.pid))
        if number == signal.SIGTERM:
            saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["clock"]["step"]
            assert run.log.count(f"stopped at step {saved}, saved; resume with: ") == 1
    finish(begin)
    compare(whole, folder)
    assert len(torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["random"]) == 2


def wait_until(true: Callable[[], bool], run: ForkedRun | None = None) -> None:
    """Wait until the condition holds. `run` must not end before that."""
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline
        assert run is None or run.poll() is None, run.log[-3000:]
        time.sleep(0.01)


def reached(folder: Path, step: int) -> bool:
    """Whether a run has reached this step and can be resumed."""
    if not begun(folder):
        return False
    for file in (folder / "csv").rglob("metrics.csv"):  # which may be half written
        head, *rows = [line.split(",") for line in file.read_text().splitlines()] or [[]]
        steps = [row[head.index("step")] for row in rows if len(row) == len(head)]
        if any(int(text) >= step for text in steps if text.isdigit()):
            return True
    return False


def other_rank(process: int) -> int:
    """The process that the main process of a run has started for the second device."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    [child] = [int(line) for line in children]
    return child


def gone(group: int) -> bool:
    """Whether no process of a run is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def compare(whole: Path, chaos: Path) -> None:
    """Check that two run folders agree in everything except times and paths."""
    one, two = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (whole, chaos)
    )
    for part in ("state_dict", "average", "optimizer_states", "callbacks", "random", "unjudged"):
        assert alike(one[part], two[part]), part
    assert untimed(one["clock"]) == untimed(two["clock"])
    assert series(chaos) == series(whole)
    figures = [
        untimed(json.loads((folder / "metrics.json").read_text())) for folder in (chaos, whole)
    ]
    assert figures[0] == figures[1]
    names = [
        {file.name: file.read_bytes() for file in (folder / "pictures").iterdir()}
        for folder in (whole, chaos)
    ]
    assert names[0] == names[1]
    lines = [
        file.read_text() if (file := folder / "doctor.txt").is_file() else None
        for folder in (whole, chaos)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_ends_a_run_with_its_exit_code_and_the_command_that_resumes_it(
    number: signal.Signals, code: int, workers: int
) -> None:
    folder = Path(f"signalled-{code}-{workers}")
    more = [f"data.num_workers={workers}", "trainer.max_steps=100000", "trainer.save_every=100000"]
    run = start("stage=vqgan", f"run_dir={folder}", *TINY_GAN, *more)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(folder.rglob("metrics.csv")):
        time.sleep(0.01)
    os.killpg(run.pid, number)  # as terminals and schedulers do, so data workers get it too
    assert run.wait() == code
    step = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["clock"]["step"]
    assert step >= 1
    log = run.log
    assert (
        f"stopped at step {step}, saved; resume with: python train.py stage=vqgan resume={folder}\n"
        in log
    )
    finish(["stage=vqgan", f"resume={folder}", f"trainer.max_steps={step + 2}"])
    assert [int(row["step"]) for row in series(folder) if row["train/rec"]] == list(range(step + 2))


def test_ctrl_c_ends_a_sweep_after_its_point_is_saved() -> None:
    words = ["-m", "stage=vqgan", "sweep=mine", "seed=0,1", *TINY_GAN, "trainer.max_steps=100000"]
    run, first = start(*words), Path("runs/sweeps/mine/0_seed-0")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (first / "checkpoints/last.ckpt").is_file():
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait() == 130
    assert not Path("runs/sweeps/mine/1_seed-1").exists()
    assert "saved; the same command again continues the sweep" in run.log
