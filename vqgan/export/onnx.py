"""format=onnx: both directions for onnxruntime and whatever else reads ONNX."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.export.base import Example, Exporter, compare_graphs
from vqgan.export.graphs import export_graphs, select_examples
from vqgan.tokenizer import Tokenizer

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
NAMES = {
    "encoder": ("images", "indices"),
    "decoder": ("indices", "pictures"),
}  # graph -> input, output
MAX_BYTES = 2**31 - 2**24  # of a file, less some room for what is not weights


class ONNXExporter(Exporter):
    name = "onnx"
    usage = """\
`encoder.onnx` and `decoder.onnx` for onnxruntime:

```python
import onnxruntime

encoder = onnxruntime.InferenceSession("encoder.onnx")
decoder = onnxruntime.InferenceSession("decoder.onnx")
[indices] = encoder.run(None, {"images": images})      # float32 (B, C, H, W) in [-1, 1] -> int64 (B, h, w)
[pictures] = decoder.run(None, {"indices": indices})   # -> float32 (B, C, H, W) in [-1, 1]
```

With several codebooks indices are (B, h, w, num_codebooks)."""

    def check(self, tokenizer: Tokenizer) -> None:
        missing = [library for library in LIBRARIES if find_spec(library) is None]
        if missing:
            raise InputError(
                f'format=onnx needs {" and ".join(missing)}; pip install "codegrid[onnx]"'
            )
        size = sum(
            value.numel() * value.element_size() for value in tokenizer.state_dict().values()
        )
        if size > MAX_BYTES:
            raise InputError(
                f"format=onnx holds 2 GiB in a file at most, and these weights are {size / 2**30:.1f}; use format=pt2"
            )

    def encode_files(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        files = {}
        for name, program in export_graphs(tokenizer).items():
            entry, result = NAMES[name]
            converted = torch.onnx.export(
                program, input_names=[entry], output_names=[result], dynamo=True, verbose=False
            )
            assert converted is not None
            files[f"{name}.onnx"] = converted.model_proto.SerializeToString()
        return files

    def verify(self, tokenizer: Tokenizer, folder: Path, examples: list[Example]) -> dict[str, Any]:
        encode, decode = (open_session(folder / f"{name}.onnx") for name in NAMES)
        return compare_graphs(self.name, encode, decode, select_examples(tokenizer, examples))


def open_session(file: Path) -> Callable[[Tensor], Tensor]:
    """The function in a file with one input and one output, as onnxruntime computes it on the CPU."""
    run = ONNXGraph(file)
    [entry] = run.inputs

    def compute(value: Tensor) -> Tensor:
        [result] = run({entry: value})
        return result

    return compute


class ONNXGraph:
    """What a file, or its content, computes on the CPU: inputs by their names -> outputs in order."""

    def __init__(self, file: Path | bytes) -> None:
        import onnxruntime  # an extra

        content = file if isinstance(file, bytes) else str(file)
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def __call__(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        return [torch.from_numpy(array) for array in self.session.run(None, arrays)]
