"""Settings and fixtures of all tests."""

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.quick_hydra import shorten_composition
from tests.helpers.time_limit import count_left_out, skip_if_late

gc.disable()  # until all tests are collected
atexit.register(gc.unfreeze)  # triton's library would report leaks

os.environ["WANDB_MODE"] = "disabled"  # tests of the W&B logger override it

torch.set_num_threads(1)  # tests run in several processes

# A shell that starts the tests in the background makes them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports and collected tests are a million objects that stay. Each search of them for garbage would take a second.

    Test files are translated once, not in each process of both suites, also where PYTHONDONTWRITEBYTECODE is set.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", False)
        result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_runtest_setup(item: pytest.Item) -> None:
    skip_if_late(item)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if n := count_left_out(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(
            f"{n} slow tests were left out: this machine had no time for them"
        )


@pytest.fixture(autouse=True, scope="session")
def shortened() -> Iterator[None]:
    """Hydra composes in a third of the time; commands in fresh processes have it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_composition(patch)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with two class folders of eight small pictures each."""
    random = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for i in range(8):
            Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(
                folder / f"{i}.png"
            )
    return tmp_path / "photos"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`python train.py ...` in this process and an empty folder; returns the exit code."""
    import train

    root = Path(train.__file__).parent
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", [str(root / "train.py"), *arguments])
        try:
            train.main()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                import sys

                print(stop.code, file=sys.stderr)
                return 1
            return int(stop.code or 0)
        return 0

    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Hugging Face hub on this machine, which huggingface_hub talks to in this test: a HubServer."""
    from tests.helpers.hub_server import connect_hub

    with connect_hub(tmp_path, monkeypatch) as server:
        yield server
