#!/usr/bin/env bash
# Expected: torch.load(weights_only=True) reads a class once torch.serialization.safe_globals allows it, as its error message
#   advises and as get_unsafe_globals_in_checkpoint lists it: counts in a defaultdict, say, which trainers save beside weights.
# Happens: an empty defaultdict is read. With one entry the same call, with the same two names allowed, raises UnpicklingError:
#   entries are put only into objects whose type is exactly dict, OrderedDict or Counter, so allowing any other subclass of dict
#   helps only where it is empty. What does help is a function under the class's name that returns a plain dict.
# Versions: torch 2.15.0, Python 3.11, CPU.
# Seen by: reading checkpoints of other programs, which keep settings and counters in such containers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cat > allowed.py <<'E'
from collections import defaultdict

import torch


def read(content, *allowed):
    torch.save(content, "saved.pt")
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load("saved.pt", weights_only=True)


def plain(*_):
    return {}


full = defaultdict(int, {"words": 3})
torch.save(full, "saved.pt")
names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint("saved.pt"))
assert names == ["builtins.int", "collections.defaultdict"], names
assert read(defaultdict(int), defaultdict, int) == {}
print("empty: read")
try:
    read(full, defaultdict, int)
except Exception as error:
    reason = next(line for line in str(error).splitlines() if line.startswith("Can only SETITEM"))
    print(f"with an entry: {type(error).__name__}: {reason}")
else:
    raise SystemExit("an allowed defaultdict is read now")
assert read(full, (plain, "collections.defaultdict"), int) == {"words": 3}
print("with a function of that name: read")
E
env/bin/python allowed.py
echo "confirmed: an allowed defaultdict is refused as soon as it has an entry"
