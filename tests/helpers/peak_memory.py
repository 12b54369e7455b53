"""The memory that commands of a training stage take beyond the imports, as a line of JSON each.

python -m tests.helpers.peak_memory stage=vqgan loss=vqvae data.batch_size=64 -- stage=vqgan data.batch_size=8

Each command, as `--` divides them, runs in a fork of a process that has the imports.

Anonymous memory alone: pages of files, such as a cache of images, can leave at any time. glibc keeps freed memory for itself unless
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are set.
"""

import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from hydra.utils import get_method

from tests.helpers.configs import compose_config

EVERY = 0.002  # seconds between two looks
STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """The anonymous memory of this process."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


class Peak(threading.Thread):
    """Notes the most memory since it was started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = anonymous_bytes()

    def run(self) -> None:
        while True:
            self.most = max(self.most, anonymous_bytes())
            time.sleep(EVERY)


def measure(words: list[str]) -> None:
    """Run a command and print how much more memory this process had at most."""
    torch.set_num_threads(1)  # a fork must not use its parent's thread pool
    config = compose_config(*words)
    stage = get_method(config.run)
    peak = Peak()
    peak.start()
    stage(config)
    print(json.dumps({"gib": (peak.most - peak.before) / 2**30}), flush=True)


def main() -> None:
    get_method(compose_config("stage=vqgan").run)  # which imports the program
    for is_end, group in itertools.groupby(sys.argv[1:], lambda word: word == "--"):
        words = [*group]
        if is_end:
            continue
        if (child := os.fork()) == 0:
            measure(words)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{words} ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
