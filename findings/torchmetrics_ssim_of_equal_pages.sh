#!/usr/bin/env bash
# Expected: the SSIM of an image and itself is 1, as its formula gives for any image.
# Happens: bright, even images of 0 to 255 in float32 have less: 0.99920 for a white page, 0.99813 at grey 185. A real change of one
#   level in one pixel of a white page takes 0.000001. A variance is E[x^2] - E[x]^2, a difference of numbers up to 65,025, whose
#   rounding error is not small beside c2 = 58.5. The variances are clamped at 0 and the covariance is not, so below 0 they differ.
#   In float64 it is 1.
# Versions: torchmetrics 1.9.0, torch 2.15.0, Python 3.11, one CPU process.
# Seen by: structural_similarity_index_measure(x, x, data_range=255) at every grey level.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 torchmetrics==1.9.0 numpy==2.4.6
cat > equal.py <<'E'
import torch
from torchmetrics.functional.image import structural_similarity_index_measure as ssim


def of_itself(grey, dtype):
    x = torch.full((1, 1, 64, 64), float(grey), dtype=dtype)
    return float(ssim(x, x, data_range=255.0))


single = {grey: of_itself(grey, torch.float32) for grey in range(256)}
double = {grey: of_itself(grey, torch.float64) for grey in range(256)}
lowest = min(single, key=single.get)
print(f"float32: white {single[255]:.5f}, lowest {single[lowest]:.5f} at grey {lowest}")
print(f"float64: lowest {min(double.values()):.5f}")
assert single[lowest] < 0.9995
assert min(double.values()) > 0.999999
E
env/bin/python equal.py
