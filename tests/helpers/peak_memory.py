"""The memory that a command of a training stage takes beyond the imports, as one line of JSON.

python -m tests.helpers.peak_memory stage=vqgan loss=vqvae data.batch_size=64

Anonymous memory alone: pages of files, such as a cache of images, can leave at any time. glibc keeps freed memory for itself unless
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are set.
"""

import json
import sys
import threading
import time
from pathlib import Path

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


def main() -> None:
    config = compose_config(*sys.argv[1:])
    stage = get_method(config.run)  # which imports the program
    peak = Peak()
    peak.start()
    stage(config)
    print(json.dumps({"gib": (peak.most - peak.before) / 2**30}))


if __name__ == "__main__":
    main()
