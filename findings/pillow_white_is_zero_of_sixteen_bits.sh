#!/usr/bin/env bash
# Expected: Pillow shows a grey TIFF whose PhotometricInterpretation is 0, WhiteIsZero, with 0 as white, whatever its bits: it does so
#   for 8 bits, whose values v it returns as 255 - v. Scanners and X-ray films write such files.
# Happens: 16-bit and floating-point files are returned as they are, so the same picture is a negative, and no warning is given.
# Versions: pillow 13.0.0, tifffile 2026.3.3, numpy 2.4.6, Python 3.11.
# Seen by: comparing the pixels of one picture that was saved with 8 and with 16 bits.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cat > white.py <<'P'
import numpy as np
import tifffile
from PIL import Image

ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)


def read(name, values):
    tifffile.imwrite(name, values, photometric="miniswhite")
    return np.asarray(Image.open(name))


assert np.array_equal(read("eight.tif", ramp), 255 - ramp), "8 bits are turned"
deep = read("sixteen.tif", ramp.astype(np.uint16) * 257)
assert np.array_equal(deep, ramp.astype(np.uint16) * 257), "16 bits are not"
assert np.array_equal(read("float.tif", ramp / np.float32(255)), ramp / np.float32(255)), "nor are floats"
print("as described: the first pixel, which is white, is 255 of 255, but 0 of 65535 and 0.0 of 1.0")
P
env/bin/python -W error white.py
