"""Of each line of words on standard input makes `python train.py ...`, in a fork that has all imports behind it; tells its
process's id, and then its exit code."""

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
        os.dup2(2, 1)  # what a run says is not for its parent's reader
        sys.argv = [str(ROOT / "train.py"), *json.loads(line)]
        train.main()
        break
