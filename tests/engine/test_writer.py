"""Checkpoints that are written while training continues are those of the moment at which they were saved."""

import copy
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from codegrid.engine import writer as writing
from codegrid.engine.callbacks.checkpointing import BestCheckpoint, Checkpoints
from codegrid.engine.callbacks.ema import WeightAverage
from codegrid.engine.callbacks.signals import Stop, StopNow
from codegrid.engine.checkpoint import make_header, save_atomically
from codegrid.engine.folder import BEST, LAST, PREVIOUS
from codegrid.engine.writer import AtomicCheckpointIO, copy_state, count_state_bytes
from tests.helpers.stage1 import Noise, fit, lightning_warnings, make_module

pytestmark = lightning_warnings

HEADER = make_header("vqgan", {"id": "mine"})
SECONDS = 20  # that a test waits for a thread at most


def make_state() -> dict[str, Any]:
    """A state with what checkpoints hold: shared memory, views, other strides, numbers, and what torch adds to a state dict."""
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    weight = torch.arange(12.0).view(3, 4)
    return {
        "state_dict": network.state_dict(),
        "tied": [weight, weight, weight.T, weight[1:, 2:]],
        "random": (torch.get_rng_state(), None),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "trained": torch.ones(2, requires_grad=True),
        "channels_last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "nested": {"a": [1, "b", {"c": torch.zeros(1)}]},
    }


def saved_bytes(content: Any, file: Path) -> dict[str, bytes]:
    torch.save(content, file)
    return read_parts(file)


def read_parts(file: Path) -> dict[str, bytes]:
    """The parts of a checkpoint by their names below its folder."""
    with zipfile.ZipFile(file) as parts:
        return {name.partition("/")[2]: parts.read(name) for name in parts.namelist()}


def test_a_copied_state_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    state = make_state()
    assert saved_bytes(copy_state(state), tmp_path / "x") == saved_bytes(state, tmp_path / "x")


def test_a_copy_has_memory_of_its_own() -> None:
    state = make_state()
    copied = copy_state(state)
    with torch.no_grad():
        for tensor in writing.find_tensors(state):
            if tensor.numel():
                tensor.fill_(7)
    state["nested"]["a"].append("later")
    assert torch.equal(copied["tied"][2], torch.arange(12.0).view(3, 4).T)
    assert copied["nested"]["a"][1:2] == ["b"]
    assert len(copied["nested"]["a"]) == 3
    assert copied["state_dict"]["1.running_mean"].tolist() == [0, 0]


def test_tensors_that_share_memory_share_it_in_a_copy_and_are_counted_once() -> None:
    weight = torch.zeros(10)
    copied = copy_state({"a": weight, "b": weight[2:4]})
    copied["a"][2] = 1
    assert copied["b"].tolist() == [1, 0]
    assert count_state_bytes({"a": weight, "b": [weight[2:4], weight]}) == 40


def test_tensors_that_are_more_than_their_memory_are_copied_too() -> None:
    sparse = torch.eye(3).to_sparse()
    turned = torch.tensor([1 + 2j]).conj()
    copied = copy_state(
        {"sparse": sparse, "turned": turned, "parameter": nn.Parameter(torch.ones(1))}
    )
    assert torch.equal(copied["sparse"].to_dense(), torch.eye(3))
    assert torch.equal(copied["turned"], turned)
    assert isinstance(copied["parameter"], nn.Parameter)


class SlowDisk:
    """save_atomically for a disk that writes nothing before it is `released`; notes when each write begins and ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = LAST.name) -> None:
        self.name = name
        self.released = threading.Event()
        self.events: list[tuple[str, str, int]] = []
        self.at_once = 0
        self.most_at_once = 0
        for module in ("codegrid.engine.writer", "codegrid.engine.callbacks.checkpointing"):
            monkeypatch.setattr(f"{module}.save_atomically", self)

    def __call__(self, content: Any, file: Path, previous: Path | None = None) -> None:
        step = content["clock"]["step"]
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        self.events.append(("begins", file.name, step))
        if file.name == self.name:
            assert self.released.wait(SECONDS)
        save_atomically(content, file, previous)
        self.events.append(("ends", file.name, step))
        self.at_once -= 1

    def writes(self, file: Path) -> list[tuple[str, int]]:
        return [(what, step) for what, name, step in self.events if name == file.name]


class At(Callback):
    """Calls a function before the update after a step, at which the run's checkpoint has been saved if it was due."""

    def __init__(self, step: int, do: Callable[[], Any]) -> None:
        self.step = step
        self.do = do

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if module.step == self.step:
            self.do()


def train(folder: Path, is_async: bool, *more: Callback, **settings: Any) -> Any:
    """8 steps, a validation at 4 and 8, saved at 3 and 6 and at the end."""
    callbacks = [WeightAverage(0.5), Checkpoints(HEADER, 3, pauses=(0, 0)), *more]
    module = make_module()
    plugins = [AtomicCheckpointIO(is_async)]
    fit(module, callbacks, default_root_dir=folder, plugins=plugins, **settings)
    return module


def assert_same_state(one: Path, two: Path) -> None:
    """Check that two checkpoints hold the same bytes of tensors and the same of everything else but the clock's time."""
    parts = [read_parts(file) for file in (one, two)]
    tensors = [{n: p for n, p in own.items() if n.startswith("data/")} for own in parts]
    assert tensors[0] == tensors[1]
    states = [torch.load(file, weights_only=True) for file in (one, two)]
    for state in states:
        del state["clock"]["seconds"]
    keys = [state.keys() for state in states]
    assert keys[0] == keys[1]
    for key in ("clock", "loops", "codegrid", "unjudged", "global_step"):
        assert states[0][key] == states[1][key], key


def test_training_continues_while_a_slow_disk_writes_and_the_file_is_of_the_moment_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        disk = SlowDisk(patch)

        def look() -> None:
            assert disk.events == [("begins", "last.ckpt", 3)]
            assert not (tmp_path / "async" / LAST).exists()
            disk.released.set()

        train(tmp_path / "async", True, At(5, look), At(7, lambda: copy_file(tmp_path / "async")))
    assert disk.writes(LAST) == [(what, step) for step in (3, 6, 8) for what in ("begins", "ends")]
    assert disk.most_at_once == 1
    train(tmp_path / "sync", False, At(7, lambda: copy_file(tmp_path / "sync")))
    for name in ("copied.ckpt", LAST, PREVIOUS):
        assert_same_state(tmp_path / "async" / name, tmp_path / "sync" / name)


def copy_file(folder: Path) -> None:
    """Keep previous.ckpt, of step 3, under another name, once last.ckpt is of step 6."""
    deadline = time.monotonic() + SECONDS
    while torch.load(folder / LAST, weights_only=True)["clock"]["step"] != 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (folder / "copied.ckpt").write_bytes((folder / PREVIOUS).read_bytes())


def test_a_state_that_is_not_copied_would_be_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "copy_state", copy.copy)
    with monkeypatch.context() as patch:
        disk = SlowDisk(patch)
        more = [At(5, disk.released.set), At(7, lambda: copy_file(tmp_path / "async"))]
        train(tmp_path / "async", True, *more)
    train(tmp_path / "sync", False, At(7, lambda: copy_file(tmp_path / "sync")))
    with pytest.raises(AssertionError):
        assert_same_state(tmp_path / "async" / "copied.ckpt", tmp_path / "sync" / "copied.ckpt")


class BreakOff(Callback):
    """Ends the run with an error before the update after a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step = step
        self.error = error

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if module.step == self.step:
            raise self.error


@pytest.mark.slow
def test_readers_can_start_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    data = Noise(16, cache="none", batch_size=4, num_workers=2)
    module = make_module()
    callbacks = [Checkpoints(HEADER, 3), At(5, disk.released.set)]
    plugins = [AtomicCheckpointIO(is_async=True)]
    fit(module, callbacks, data, default_root_dir=tmp_path, plugins=plugins)  # validates at 4
    assert module.step == 8
    assert disk.writes(LAST)[:2] == [("begins", 3), ("ends", 3)]


@pytest.mark.parametrize("error", [Stop(143), ValueError("mine"), StopNow(130)])
def test_a_run_that_breaks_off_waits_for_the_write_and_saves_what_is_newer(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    disk = SlowDisk(monkeypatch)
    later = threading.Timer(0.2, disk.released.set)
    with pytest.raises(type(error)):
        train(tmp_path, True, At(4, later.start), BreakOff(4, error))
    is_saved = not isinstance(error, StopNow)
    waits = "a checkpoint is being written; the run ends when it is on the disk"
    assert (waits in capsys.readouterr().err) == (not is_saved)
    last = [("begins", 4), ("ends", 4)] if is_saved else []
    assert disk.writes(LAST) == [("begins", 3), ("ends", 3), *last]
    assert torch.load(tmp_path / LAST, weights_only=True)["clock"]["step"] == (4 if is_saved else 3)


def test_a_state_that_is_being_written_is_not_saved_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    later = threading.Timer(0.2, disk.released.set)
    with pytest.raises(Stop):
        train(tmp_path, True, At(3, later.start), BreakOff(3, Stop(143)))
    assert disk.writes(LAST) == [("begins", 3), ("ends", 3)]


@pytest.mark.parametrize("error", [Stop(143), StopNow(130)])
def test_a_failed_write_is_repeated_by_a_run_that_breaks_off_between_two_updates(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
) -> None:
    steps: list[int] = []

    def refuse(content: Any, file: Path, previous: Path | None = None) -> None:
        steps.append(content["clock"]["step"])
        if len(steps) == 2:
            raise OSError(28, "No space left on device")
        save_atomically(content, file, previous)

    monkeypatch.setattr(writing, "save_atomically", refuse)
    with pytest.raises(type(error)):
        train(tmp_path, True, BreakOff(6, error))
    is_saved = not isinstance(error, StopNow)
    assert steps == ([3, 6, 6] if is_saved else [3, 6])
    last = torch.load(tmp_path / LAST, weights_only=True)["clock"]["step"]
    assert last == (6 if is_saved else 3)
    message = capsys.readouterr().err
    assert "step 6:" in message
    outlook = "and saves its last state" if is_saved else "without another try"
    assert f"the last one is of step 3. The run ends {outlook}" in message
    assert "continues" not in message


def test_the_best_weights_are_those_of_their_validation_and_wait_for_the_write_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path, is_async: bool) -> None:
        best = BestCheckpoint(HEADER, "val/psnr")
        callbacks = [best, WeightAverage(0.5), Checkpoints(HEADER, 2)]
        plugins = [AtomicCheckpointIO(is_async)]
        fit(make_module(), callbacks, default_root_dir=folder, plugins=plugins)

    with monkeypatch.context() as patch:
        disk = SlowDisk(patch, BEST.name)
        threading.Timer(1, disk.released.set).start()
        run(tmp_path / "async", True)
    assert disk.most_at_once == 1
    assert ("ends", "best.ckpt", 4) in disk.events
    run(tmp_path / "sync", False)
    assert_same_tensors(tmp_path / "async" / BEST, tmp_path / "sync" / BEST)
    assert_same_state(tmp_path / "async" / LAST, tmp_path / "sync" / LAST)


def assert_same_tensors(one: Path, two: Path) -> None:
    first, second = (torch.load(file, weights_only=True)["state_dict"] for file in (one, two))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert isinstance(value, Tensor)
        assert torch.equal(value, second[name]), name


def test_one_write_at_a_time_in_the_order_of_the_saves() -> None:
    writer, events = AtomicCheckpointIO(is_async=True), []
    threads: set[int] = set()

    def save(number: int) -> None:
        threads.add(threading.get_ident())
        events.append((number, "begins"))
        time.sleep(0.01)
        events.append((number, "ends"))

    for number in range(4):
        writer.write(number, save)
    writer.finish()
    assert events == [(n, what) for n in range(4) for what in ("begins", "ends")]
    assert threading.get_ident() not in threads
    assert not writer.is_writing


def test_without_async_a_write_is_done_when_save_returns(tmp_path: Path) -> None:
    writer, done = AtomicCheckpointIO(is_async=False), []
    writer.write(1, lambda _: done.append(threading.get_ident()))
    assert done == [threading.get_ident()]


def test_what_is_no_fault_of_the_disk_is_raised_once_and_the_next_write_works(
    tmp_path: Path,
) -> None:
    writer = AtomicCheckpointIO(is_async=True)

    def fail(_: Any) -> None:
        raise ValueError("no picture of the disk")

    writer.write(1, fail)
    with pytest.raises(ValueError, match="no picture of the disk"):
        writer.finish()
    writer.finish()
    writer.save_checkpoint({"a": 1}, tmp_path / "last.ckpt")
    assert writer.take_error(tmp_path / "last.ckpt") is None
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"a": 1}


def test_lightnings_teardown_waits_for_the_write() -> None:
    writer, done = AtomicCheckpointIO(is_async=True), []

    def save(content: int) -> None:
        time.sleep(0.05)
        done.append(content)

    writer.write(1, save)
    writer.teardown()
    assert done == [1]


def test_an_error_of_the_disk_belongs_to_its_file(tmp_path: Path) -> None:
    writer = AtomicCheckpointIO(is_async=True)
    (tmp_path / "file").write_text("no folder")
    writer.save_checkpoint({"a": 1}, tmp_path / "file" / "last.ckpt")
    writer.save_checkpoint({"a": 1}, tmp_path / "hpc.ckpt")
    assert writer.take_error(tmp_path / "hpc.ckpt") is None
    assert isinstance(writer.take_error(tmp_path / "file" / "last.ckpt"), OSError)
    assert writer.take_error(tmp_path / "file" / "last.ckpt") is None, "once"


def test_without_room_for_a_copy_training_waits_for_the_write_which_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"a": torch.zeros(2**20)}
    monkeypatch.setattr(writing, "free_host_memory", lambda: 7 * 2**20)
    writer, done = AtomicCheckpointIO(is_async=True), []
    for _ in range(2):
        writer.write(state, done.append)
    assert [saved is state for saved in done] == [True, True]
    message = capsys.readouterr().err
    assert message.count("checkpoints are written while training waits") == 1
    assert "takes 4 MiB, and 7 MiB of memory are free" in message
    monkeypatch.setattr(writing, "free_host_memory", lambda: 8 * 2**20)
    writer.write(state, done.append)
    writer.finish()
    assert done[2] is not state
    assert torch.equal(done[2]["a"], state["a"])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("you tried to allocate 4 bytes")])
def test_a_copy_that_fails_makes_training_wait_for_the_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def refuse(content: Any) -> Any:
        raise error

    monkeypatch.setattr(writing, "copy_state", refuse)
    state = {"a": torch.zeros(2**20)}
    writer, done = AtomicCheckpointIO(is_async=True), []
    for _ in range(2):
        writer.write(state, done.append)
    assert [saved is state for saved in done] == [True, True]
    message = capsys.readouterr().err
    assert message.count("takes 4 MiB and can't be made") == 1
    assert not writer.is_writing


@pytest.mark.slow
def test_the_end_of_a_program_waits_for_the_write(tmp_path: Path) -> None:
    program = (
        "import sys, time; from codegrid.engine.writer import AtomicCheckpointIO\n"
        "def save(content): time.sleep(1); open(sys.argv[1], 'w').write(content)\n"
        "AtomicCheckpointIO(True).write('whole', save); sys.exit(3)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=False)
    assert done.returncode == 3
    assert (tmp_path / "x").read_text() == "whole"
