#!/usr/bin/env bash
# Expected: what torch.export exports, torch.onnx.export translates, as far as ONNX has the operations: matrix products and a softmax.
#   scaled_dot_product_attention is documented for (N, ..., L, E), any number of leading axes.
# Happens: with one leading axis, (N, L, E), as single-head attention over pixels has it, torch.export works and torch.onnx.export
#   raises a ConversionError, since its translation takes four axes alone. With an axis of one head the same values are exported,
#   and onnxruntime agrees with torch.
# Versions: torch 2.15.0, onnx 1.23.0, onnxscript 0.7.2, onnxruntime 1.32.0, Python 3.11.
# Seen by: the export of a decoder whose attention has no heads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 numpy==2.4.6 onnx==1.23.0 onnxscript==0.7.2 onnxruntime==1.32.0
cat > attention.py <<'P'
import warnings

import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

warnings.filterwarnings("ignore")


class Attention(nn.Module):
    def forward(self, rows):
        return F.scaled_dot_product_attention(rows, rows, rows)


def translate(shape):
    """The largest difference between torch and onnxruntime."""
    rows, attention = torch.randn(shape), Attention().eval()
    torch.export.export(attention, (rows,))
    program = torch.onnx.export(attention, (rows,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    [result] = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
    return abs(result - attention(rows).numpy()).max()


difference = translate((2, 1, 5, 8))
assert difference < 1e-5, difference
print(f"with an axis of heads: exported, difference {difference:.1e}")
try:
    translate((2, 5, 8))
except torch.onnx.errors.OnnxExporterError as error:
    print(f"without: {type(error).__name__}")
else:
    raise SystemExit("attention without an axis of heads is exported now")
P
env/bin/python attention.py
echo "confirmed: attention without an axis of heads is exported by torch.export alone"
