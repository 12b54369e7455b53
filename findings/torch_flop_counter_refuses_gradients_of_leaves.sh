#!/usr/bin/env bash
# Expected: FlopCounterMode counts whatever runs inside it, torch.autograd.grad included, wherever the gradient ends: at a leaf as the
#   gradient penalties R1 and WGAN-GP take it, or at a tensor computed from one.
# Happens: if the leaf is an argument of a module, torch.autograd.grad(loss, leaf) raises a RuntimeError about
#   _will_engine_execute_node, which names neither the counter nor the leaf. The counter follows modules by hooks that watch their
#   arguments' gradients. The same with `leaf * 1` as the argument works, and so does loss.backward().
# Versions: torch 2.15.0, Python 3.11, CPU.
# Seen by: the three ways side by side on one linear layer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6
cat > count.py <<'E2'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Judge(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


judge = Judge()


def count(penalise):
    leaf = torch.randn(2, 4, requires_grad=True)
    with FlopCounterMode(display=False) as flops:
        penalise(leaf)
    return flops.get_total_flops()


def of_the_leaf(leaf):
    torch.autograd.grad(judge(leaf).square().sum(), leaf)


def of_a_product(leaf):
    x = leaf * 1
    torch.autograd.grad(judge(x).square().sum(), x)


of_the_leaf(torch.randn(2, 4, requires_grad=True))  # without the counter it works
forward = 2 * 2 * 4 * 4
assert count(lambda leaf: judge(leaf).square().sum().backward()) == 3 * forward
assert count(of_a_product) == 2 * forward
try:
    count(of_the_leaf)
except RuntimeError as error:
    assert "_will_engine_execute_node" in str(error), error
else:
    raise SystemExit("this has changed: the gradient of a leaf is counted")
print("confirmed: a gradient of a leaf that a module was given can't be counted")
E2
env/bin/python count.py 2> err || { tail -n 5 err; exit 1; }
