#!/usr/bin/env bash
# Expected: tifffile says which package is missing when it can't unpack a page, as it does for LZW: "<COMPRESSION.LZW: 5> requires the
#   'imagecodecs' package", a ValueError.
# Happens: for zstd, which GDAL writes, it raises ModuleNotFoundError: No module named 'compression', the name of a package of Python
#   3.14 that can't be installed for others. Code that catches the ValueError to name the way out does not see it.
# Versions: tifffile 2026.3.3 without imagecodecs, numpy 2.4.6, Python 3.11; imagecodecs 2026.3.6 writes the files.
# Seen by: reading compressed TIFFs in an environment that has tifffile alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -c 'import sys; sys.exit(sys.version_info >= (3, 14))' || { echo "Python 3.14 has the package: nothing to show"; exit 0; }
python3 -m venv writer
writer/bin/pip install --quiet --disable-pip-version-check tifffile==2026.3.3 numpy==2.4.6 imagecodecs==2026.3.6
python3 -m venv reader
reader/bin/pip install --quiet --disable-pip-version-check tifffile==2026.3.3 numpy==2.4.6
writer/bin/python - <<'P'
import numpy as np
import tifffile

for compression in ("lzw", "zstd"):
    tifffile.imwrite(f"{compression}.tif", np.zeros((32, 32), np.uint16), compression=compression)
    assert tifffile.imread(f"{compression}.tif").shape == (32, 32), "the file is sound"
P
cat > read.py <<'P'
import tifffile


def failure(name):
    try:
        tifffile.imread(name)
    except Exception as error:
        return type(error).__name__, str(error)


kind, message = failure("lzw.tif")
assert kind == "ValueError" and "imagecodecs" in message, (kind, message)
kind, message = failure("zstd.tif")
assert kind == "ModuleNotFoundError" and "imagecodecs" not in message, (kind, message)
print(f"as described: {kind}: {message}")
P
reader/bin/python -W error read.py
