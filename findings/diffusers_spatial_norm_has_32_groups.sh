#!/usr/bin/env bash
# Expected: VQModel(norm_num_groups=8, norm_type="spatial") normalises in 8 groups of channels in encoder and decoder, as it does with
#   norm_type="group", so block_out_channels=[16] works with both.
# Happens: the decoder's normalisations (SpatialNorm) always have 32 groups. With [32] the model is built, its config says 8, and its
#   decoder has 32 without a word; with [16], which 8 divides, the constructor raises. Whoever rebuilds the decoder by the config's
#   norm_num_groups gets other pictures from the same codes.
# Versions: diffusers 0.42.1, torch 2.15.0, Python 3.11, CPU.
# Seen by: reading num_groups of every GroupNorm of both networks.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 diffusers==0.42.1 numpy==2.4.6
cat > groups.py <<'E2'
import warnings

warnings.filterwarnings("ignore")

from torch import nn

from diffusers import VQModel


def list_groups(network):
    return {m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)}


def build(kind, width):
    return VQModel(block_out_channels=(width,), norm_num_groups=8, norm_type=kind)


plain, spatial = build("group", 32), build("spatial", 32)
print("group:  ", list_groups(plain.encoder), list_groups(plain.decoder))
print("spatial:", list_groups(spatial.encoder), list_groups(spatial.decoder))
assert list_groups(plain.encoder) == list_groups(plain.decoder) == {8}
assert list_groups(spatial.encoder) == {8} and list_groups(spatial.decoder) == {32}
build("group", 16)
try:
    build("spatial", 16)
except ValueError as error:
    print("spatial, 16 channels:", error)
else:
    raise SystemExit("16 channels are accepted: fixed")
E2
env/bin/python groups.py
