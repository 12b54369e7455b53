#!/usr/bin/env bash
# Expected: timm.create_model(name, pretrained=True) refuses a file of weights that lacks one of the network's, whatever the head is: it
#   loads strictly, and says which weight is missing.
# Happens: so it does with the file's own number of classes. With num_classes=0, as features are taken, or with any other number of
#   classes, loading is not strict for the whole network, and not for the head alone. A file without the attention of a block then loads
#   without a warning, that layer stays as it was initialised at random, and each process computes other features from the same file.
# Versions: timm 1.0.31, torch 2.15.0, torchvision 0.29.2, numpy 2.4.6, Python 3.11, CPU.
# Seen by: a file of vit_tiny_patch16_224 without one weight, loaded with its head and without it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check timm==1.0.31 torch==2.15.0 torchvision==0.29.2 numpy==2.4.6
cat > load.py <<'E2'
import logging

import timm
import torch

torch.manual_seed(0)
NAME = "vit_tiny_patch16_224"
LOST = "blocks.3.attn.qkv.weight"
weights = timm.create_model(NAME).state_dict()
whole = dict(weights)
del weights[LOST]
torch.save(weights, "incomplete.pth")
torch.save(whole, "whole.pth")


def load(file, **settings):
    overlay = {"file": file, "hf_hub_id": None, "url": ""}
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **settings).eval()


warnings = []


class Listener(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.WARNING:
            warnings.append(record.getMessage())


logging.getLogger().addHandler(Listener())
try:
    load("incomplete.pth")
except RuntimeError as error:
    assert LOST in str(error), error
else:
    raise SystemExit("this has changed: with its head, an incomplete file loads")
image = torch.randn(2, 3, 224, 224)
with torch.no_grad():
    right = load("whole.pth", num_classes=0)(image)
    assert torch.equal(right, load("whole.pth", num_classes=0)(image))
    one, other = (load("incomplete.pth", num_classes=0)(image) for _ in range(2))
assert not torch.allclose(one, other, atol=0.01) and not torch.allclose(one, right, atol=0.01), (
    "this has changed: without a head, an incomplete file gives the features of the whole one"
)
assert not warnings, f"this has changed: {warnings}"
print("confirmed: without a head, a file that lacks a weight gives random features and no warning")
E2
env/bin/python load.py 2> err || { tail -n 5 err; exit 1; }
