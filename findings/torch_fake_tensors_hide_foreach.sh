#!/usr/bin/env bash
# Expected: AdamW under FakeTensorMode on device "cuda" issues the operations that it issues on a GPU, where foreach is the default, so
#   that kernels, and the temporary memory of foreach, can be counted without a GPU.
# Happens: for fake parameters the default is the loop over single tensors: the optimizer asks whether every parameter's type is Tensor or
#   Parameter itself, and a fake parameter's is FakeTensor. Without a warning a count shows tens of small operations for four parameters
#   and none of foreach's temporaries; foreach=True has to be asked for.
# Versions: torch 2.15.0, Python 3.11, no GPU.
# Seen by: the operations of one step, by a dispatch mode, with foreach left to the default and asked for.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cat > steps.py <<'E2'
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations(foreach):
    with FakeTensorMode():
        weights = [nn.Parameter(torch.zeros(8, 8, device="cuda")) for _ in range(4)]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer = torch.optim.AdamW(weights, foreach=foreach)
        with Names() as step:
            optimizer.step()
    return step.names


grouped = [name for name in operations(True) if "_foreach_" in name]
assert grouped, "this has changed: foreach=True groups nothing"
assert not [name for name in operations(None) if "_foreach_" in name], "this has changed: the default is foreach"
print(f"confirmed: {len(grouped)} grouped operations if asked for, none by default")
E2
env/bin/python steps.py 2> err || { tail -n 5 err; exit 1; }
