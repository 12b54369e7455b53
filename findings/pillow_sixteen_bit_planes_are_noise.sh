#!/usr/bin/env bash
# Expected: Pillow opens a TIFF of 16-bit RGB stored in planes (PlanarConfiguration=2, as GDAL and microscopes write) as it opens the
#   same image interleaved, with the upper 8 bits of each value, or refuses it. 8-bit planes work, and so do compressed 16-bit ones.
# Happens: without compression the pixels are noise, and no warning is given. Each plane is read as one of 8 bits: upper and lower
#   bytes alternate, and only the first half of the rows is used. RGBA is the same.
# Versions: pillow 13.0.0, tifffile 2026.3.3, numpy 2.4.6, Python 3.11.
# Seen by: comparing the pixels with the upper bytes of what tifffile reads from the same file.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cat > planes.py <<'P'
import numpy as np
import tifffile
from PIL import Image

rows, columns = np.mgrid[:32, :32]
smooth = np.stack([rows, columns, rows + columns]).astype(np.uint16) * 1000 + 77  # (3, 32, 32)


def mean_error(name, planes, **settings):
    tifffile.imwrite(name, planes, photometric="rgb", planarconfig="separate", **settings)
    assert np.array_equal(tifffile.imread(name), planes), "the file is sound"
    upper = planes >> 8 if planes.dtype == np.uint16 else planes
    pixels = np.asarray(Image.open(name)).astype(int)
    return float(np.abs(pixels - upper.transpose(1, 2, 0)).mean())


assert mean_error("eight.tif", (smooth >> 8).astype(np.uint8)) == 0
assert mean_error("packed.tif", smooth, compression="zlib") == 0
error = mean_error("plain.tif", smooth)
assert error > 20, error

tifffile.imwrite("interleaved.tif", smooth.transpose(1, 2, 0), photometric="rgb")
pixels = np.asarray(Image.open("interleaved.tif"))
assert np.array_equal(pixels, (smooth >> 8).transpose(1, 2, 0))
print(f"as described: 16-bit planes are off by {error:.0f} of 255 on average")
P
env/bin/python -W error planes.py
