"""Commands as processes of their own that need no imports: forks of a server that has imported the program once.

As a program this file is the server. Each line on its standard input is a JSON object (words, folder, environment, output,
errors); it answers with the process id of the run, and with its exit code when it ends. One run at a time.
"""

import atexit
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


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
        atexit.register(self.close)

    def close(self) -> None:
        """End the server, which its closed input asks for."""
        with self._process:
            pass

    def request(self, described: Mapping[str, Any]) -> None:
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
    """A running command, with the methods of subprocess.Popen that tests need."""

    def __init__(
        self, words: tuple[str, ...], folder: Path, environment: Mapping[str, str], logs: Path
    ) -> None:
        self.words = words
        self.output, self.errors = logs / "stdout.txt", logs / "stderr.txt"
        self.returncode: int | None = None
        self._server = fork_server()
        self._server.request(
            {
                "words": words,
                "folder": str(folder),
                "environment": dict(environment),
                "output": str(self.output),
                "errors": str(self.errors),
            }
        )
        pid = self._server.answer(60)
        assert pid is not None, "the server did not start the run within a minute"
        self.pid = pid

    def poll(self, seconds: float = 0) -> int | None:
        """The exit code; None while the run goes on after this time."""
        if self.returncode is None:
            self.returncode = self._server.answer(seconds)
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

    @property
    def log(self) -> str:
        """What it has printed on standard error."""
        return self.errors.read_text()


def _run_here(described: dict[str, Any]) -> None:
    """Become the run: a process group of its own, in its folder, with its environment and output."""
    os.setpgrp()
    os.chdir(described["folder"])
    os.environ.clear()
    os.environ.update(described["environment"])
    for number, name in ((1, "output"), (2, "errors")):
        file = os.open(described[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    # A fork must not use its parent's thread pool; torch replaces it at the first use, but not safely when two threads come first.
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / "train.py"), *described["words"]]
    train.main()


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import torch

    import prior.stages.train  # noqa: F401
    import train
    import vqgan.stages.train  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            _run_here(json.loads(line))
            break
