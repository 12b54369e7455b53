"""Commands as processes of their own that need no imports: forks of a server that has imported the program once.

As a program this file is the server. Each line on its standard input is a JSON object (program, words, folder, environment,
input, output, errors); it answers with the process id of the run, and with its exit code when it ends. One run at a time.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TextIO

ROOT = Path(__file__).parents[2]
PRELOADED = (  # what the default configs name
    "codegrid.data.shapes", "prior.models.gpt", "prior.redrawing", "prior.stages.train", "vqgan.callbacks.doctor",
    "vqgan.discriminators.grain", "vqgan.networks.decoder", "vqgan.networks.encoder", "vqgan.quantizers.ema", "vqgan.stages.train",
)  # fmt: skip


class ForkServer:
    """Starts `python train.py <words>`, one at a time, as forks of one process. Importing takes most of a tiny run's time."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )
        self.running: int | None = None  # the process id of the run that has not ended
        atexit.register(self.close)

    def close(self) -> None:
        """End the server, which its closed input asks for."""
        self.end_run()
        with self._process:
            pass

    def end_run(self) -> None:
        """Kill a run that a failed test has left."""
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running, signal.SIGKILL)
            self.answer(60)
            self.running = None

    def request(self, described: Mapping[str, Any]) -> None:
        self.end_run()
        assert self._process.stdin
        self._process.stdin.write(json.dumps(described) + "\n")

    def answer(self, seconds: float) -> int | None:
        """The next number that the server prints; None if there is none within this time."""
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        return int(self._process.stdout.readline())


@cache
def fork_server() -> ForkServer:
    """The server of this test process, started on first use."""
    return ForkServer()


class ForkedRun:
    """A running command, with the methods of subprocess.Popen that tests need.

    `program` is another file than train.py; `terminal` is the name of the one that the run reads and prints to.
    """

    stdin = stdout = stderr = None  # a run writes to files

    def __init__(
        self,
        words: tuple[str, ...],
        folder: Path,
        environment: Mapping[str, str],
        logs: Path,
        program: Path = ROOT / "train.py",
        terminal: str | None = None,
    ) -> None:
        self.words = words
        self.output, self.errors = logs / "stdout.txt", logs / "stderr.txt"
        self.returncode: int | None = None
        self.output.touch()
        self.errors.touch()
        self._server = fork_server()
        self._server.request(
            {
                "program": str(program),
                "words": words,
                "folder": str(folder),
                "environment": dict(environment),
                "input": terminal or os.devnull,
                "output": terminal or str(self.output),
                "errors": terminal or str(self.errors),
            }
        )
        pid = self._server.answer(240)  # a busy machine needs minutes to import all
        assert pid is not None, "the server did not start the run within four minutes"
        self.pid = self._server.running = pid

    def poll(self, seconds: float = 0) -> int | None:
        """The exit code; None while the run goes on after this time."""
        if self.returncode is None:
            self.returncode = self._server.answer(seconds)
            if self.returncode is not None:
                self._server.running = None
        return self.returncode

    def wait(self, seconds: float = 240) -> int:
        """Wait for the run to end and return its exit code, negative for a signal's number."""
        code = self.poll(seconds)
        if code is None:
            self.send_signal(9)
            self.poll(60)
            raise AssertionError(f"{self.words} did not end in {seconds} s: {self.log[-3000:]}")
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def log(self) -> str:
        """What it has printed on standard error."""
        return self.errors.read_text()


class ForkedRank:
    """The second process of a run on two devices, with the methods of subprocess.Popen that Lightning needs.

    It has been forked before the run began, with nothing but imports, and waits until Lightning starts it.
    """

    def __init__(self, pid: int, pipe: TextIO) -> None:
        self.pid, self._pipe = pid, pipe
        self.returncode: int | None = None

    def start(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str | None = None
    ) -> "ForkedRank":
        """Stand in for subprocess.Popen."""
        described = {"argv": command[1:], "environment": dict(env), "folder": cwd or os.getcwd()}
        self._pipe.write(json.dumps(described) + "\n")
        self._pipe.close()
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _reserve_rank() -> None:
    """Fork the process that becomes the second rank when Lightning starts one; it ends with this one if Lightning does not.

    It returns in both: in the second when it is to run the command.
    """
    from lightning.fabric.strategies.launchers import subprocess_script as of_fabric
    from lightning.pytorch.strategies.launchers import subprocess_script as of_trainer

    reading, writing = os.pipe()
    if child := os.fork():
        os.close(reading)
        rank = ForkedRank(child, os.fdopen(writing, "w"))
        for launcher in (of_fabric, of_trainer):  # whichever comes first launches
            vars(launcher)["subprocess"] = SimpleNamespace(Popen=rank.start)
        return
    os.close(writing)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    line = os.fdopen(reading).readline()
    if not line:
        os._exit(0)
    signal.signal(signal.SIGINT, interrupt)
    described = json.loads(line)
    os.chdir(described["folder"])
    os.environ.clear()
    os.environ.update(described["environment"])
    sys.argv = described["argv"]


def _run_here(described: dict[str, Any]) -> None:
    """Become the run: a process group of its own, in its folder, with its environment and output."""
    os.setpgrp()
    os.chdir(described["folder"])
    os.environ.clear()
    os.environ.update(described["environment"])
    for number, name in ((0, "input"), (1, "output"), (2, "errors")):
        mode = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        file = os.open(described[name], mode | os.O_NOCTTY, 0o644)
        os.dup2(file, number)
        os.close(file)
    # A fork must not use its parent's thread pool; torch replaces it at the first use, but not safely when two threads come first.
    torch.set_num_threads(1)
    program, words = described["program"], described["words"]
    sys.argv = [program, *words]
    if program != str(ROOT / "train.py"):
        runpy.run_path(program, run_name="__main__")
        return
    if any(word.startswith(("trainer.devices=", "resume=")) for word in words):
        _reserve_rank()
    train.main()


def _prepare() -> None:
    """Do once what every command begins with: parse all files of the default configs, and import what they name."""
    for stage in ("vqgan", "prior"):
        compose_config(f"stage={stage}")
    gc.collect()
    gc.freeze()  # forks would copy what the collector touches


def end_with(run: Callable[[], object]) -> NoReturn:
    """Run this and end the process as Python does, but without freeing all modules, which takes longer than a tiny run."""
    code = 0
    try:
        run()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    for name in PRELOADED:
        importlib.import_module(name)
    import pytest
    import torch

    import train
    from tests.helpers.configs import compose_config
    from tests.helpers.quick_hydra import shorten_composition

    torch.set_num_threads(1)
    shorten_composition(pytest.MonkeyPatch())
    _prepare()
    for line in sys.stdin:
        if child := os.fork():
            # It does the same, but whoever reads its id may ask for its group at once.
            with contextlib.suppress(OSError):
                os.setpgid(child, child)
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            end_with(partial(_run_here, json.loads(line)))
    os._exit(0)
