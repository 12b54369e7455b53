#!/usr/bin/env bash
# Expected: a process that another W&B-using process starts (a command of a notebook, say) logs offline to the `dir` it names,
#   read from its own working directory, and a killed run's id can be taken up again by resume="allow".
# Happens: it shares the parent's wandb-core through WANDB_SERVICE. wandb makes the run folder in the child's working directory, but
#   the service resolves the relative `dir` from the parent's: no *.wandb file is written anywhere, and no error is raised. The id of
#   a killed child stays taken: the next wandb.init raises "run ID ... is in use" until the parent ends.
# Versions: wandb 0.31.0, Python 3.11.
# Seen by: listing all *.wandb files below both working directories.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check wandb==0.31.0
cat > parent.py <<'P'
import os
import subprocess
import sys
from pathlib import Path

import wandb

os.environ["WANDB_MODE"] = "offline"
LOG = "import wandb; run = wandb.init(id={id!r}, resume='allow', dir={dir!r}); run.log(dict(loss=1.0)); "
FINISH = "run.finish()"
KILL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def start(code, where, **values):
    Path(where, "logs").mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-c", code.format(**values)]
    return subprocess.run(line, cwd=where, capture_output=True, text=True)


def files():
    return sorted(str(file) for file in Path().rglob("*.wandb"))


# Without a parent that uses W&B the file is where the run says.
assert start(LOG + FINISH, "alone", id="alone", dir="logs").returncode == 0
assert len(files()) == 1 and files()[0].startswith("alone/logs/wandb/"), files()

wandb.init(id="parent", dir=".").finish()
before = files()
assert start(LOG + FINISH, "child", id="child", dir="logs").returncode == 0
assert list(Path("child/logs/wandb").glob("offline-run-*-child"))  # the folder is there,
assert files() == before, files()  # its file is nowhere

assert start(LOG + KILL, "child", id="killed", dir="logs").returncode == -9
again = start(LOG + FINISH, "child", id="killed", dir="logs")
assert again.returncode != 0 and "run ID killed is in use" in again.stderr, again.stderr
print("as described: the child's file is lost, and the killed run's id stays taken")
P
env/bin/python parent.py
