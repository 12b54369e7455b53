"""Fork server: runs `python train.py <words>` for each JSON list of words on standard input, in a fork that has the imports.

Prints the process id of each run, then its exit code."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

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
            continue
        os.setpgrp()
        os.dup2(2, 1)  # standard output is for the ids and exit codes
        sys.argv = [str(ROOT / "train.py"), *json.loads(line)]
        train.main()
        break
