"""format=onnx and format=pt2: a prior's graph for onnxruntime, and for torch alone."""

import io
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codegrid.data.labels import display_classes
from codegrid.engine.errors import InputError
from prior.export.base import PriorFormat
from prior.export.compare import RunGraph, compare_prior
from prior.export.graphs import cache_shape, describe_graph, trace_prior
from prior.models.base import PriorModel
from prior.models.gpt import GPT
from prior.prior import Prior
from vqgan.export.onnx import MAX_BYTES, ONNXGraph

CLASSES_LISTED = 10  # in the model card

MEANINGS = {
    "codes": "int64 {codes}",
    "position": "int64 (), from 0 to {last}",
    "cache": "float32 {cache}, zeros at the first position",
    "masked": "bool (B, h, w): codes that are not read",
    "labels": "{labels}",
}
KINDS_OF_GRAPH = {
    "step": "one position in raster order, with the keys and values of those before as its cache; codes are those of the position "
    "before, which are not read at the first",
    "grid": "all logits of a grid at once; those of a position depend on the codes before it only",
    "masked": "the logits of all positions, from the codes that are not masked",
}


LOOP = """

```python
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("prior.onnx")
n = 16
{labels}cache, codes, grid = numpy.zeros(({shape}), numpy.float32), numpy.zeros(n, numpy.int64), []
for position in range({T}):
    inputs = {{"codes": codes, "position": numpy.array(position), "cache": cache{also}}}
    logits, cache = session.run(None, inputs)
    codes = (logits + numpy.random.gumbel(size=logits.shape)).argmax(1)   # a draw from softmax(logits)
    grid.append(codes)
indices = numpy.stack(grid, 1).reshape(n, {h}, {w})   # for decoder.onnx
```"""


def describe_labels(trained: Prior) -> str:
    """What the labels of a prior's graph are, for the model card."""
    if trained.condition is not None:
        size = trained.model.vector_size
        return f"float32 (B, {size}), NaN for what is missing and for none: {trained.condition.summarize()}"
    classes = display_classes(trained.classes.names, CLASSES_LISTED)
    return f"int64 (B,): the number of a class, or -1 for none: {classes}"


class GraphFormat(PriorFormat):
    """A prior's graph in one file."""

    def check(self, trained: Prior) -> None:
        try:
            describe_graph(trained.model)
        except InputError as error:
            raise InputError(f"format={self.name}: {error}") from error

    @property
    def file(self) -> str:
        return f"prior.{self.name}"

    def verify(self, trained: Prior, folder: Path) -> dict[str, Any]:
        model = trained.model.cpu()
        return compare_prior(self.name, model, self.open_graph(folder / self.file))

    @abstractmethod
    def open_graph(self, file: Path) -> RunGraph:
        """The graph in a file, on the CPU."""

    def describe_use(self, trained: Prior) -> str:
        model = trained.model
        signature = describe_graph(model)
        h, w, num_codebooks = model.code_shape
        books = f", {num_codebooks}" if num_codebooks > 1 else ""
        shapes = {
            "codes": "(B,)" if signature.kind == "step" else f"(B, {h}, {w}{books})",
            "last": model.T - 1,
            "cache": "",
            "labels": describe_labels(trained).replace("|", r"\|"),
        }
        if isinstance(model, GPT):
            blocks, two, _, *rest = cache_shape(model, 1)
            shapes["cache"] = f"({blocks}, {two}, B, {', '.join(map(str, rest))})"
        lines = [f"| `{name}` | {MEANINGS[name].format(**shapes)} |" for name in signature.inputs]
        returned = " and ".join(f"`{name}`" for name in signature.outputs)
        table = "\n".join(["| input | |", "|---|---|", *lines])
        return (
            f"`{self.file}` is the prior: {KINDS_OF_GRAPH[signature.kind]}.\n\n{table}\n\n"
            f"It returns {returned}; logits are float32 (..., {model.K}), one of each code."
            f"{self.describe_loop(model)}"
        )

    def describe_loop(self, model: PriorModel) -> str:
        """An example of the graph's use, if there is one."""
        return ""


class PT2Prior(GraphFormat):
    name = "pt2"

    def encode_files(self, trained: Prior) -> dict[str, bytes]:
        content = io.BytesIO()
        torch.export.save(trace_prior(trained.model), content)
        return {self.file: content.getvalue()}

    def open_graph(self, file: Path) -> RunGraph:
        graph = torch.export.load(file).module()

        def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
            returned = graph(**inputs)
            return list(returned) if isinstance(returned, tuple) else [returned]

        return run


class ONNXPrior(GraphFormat):
    name = "onnx"

    def check(self, trained: Prior) -> None:
        super().check(trained)
        tensors = trained.model.state_dict().values()
        size = sum(value.numel() * value.element_size() for value in tensors)
        if size > MAX_BYTES:
            raise InputError(
                f"format=onnx holds 2 GiB in a file at most, and the prior's weights are {size / 2**30:.1f}; use format=pt2"
            )

    def encode_files(self, trained: Prior) -> dict[str, bytes]:
        signature = describe_graph(trained.model)
        converted = torch.onnx.export(
            trace_prior(trained.model),
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            dynamo=True,
            verbose=False,
        )
        assert converted is not None
        return {self.file: converted.model_proto.SerializeToString()}

    def open_graph(self, file: Path) -> RunGraph:
        return ONNXGraph(file)

    def describe_loop(self, model: PriorModel) -> str:
        if not isinstance(model, GPT):
            return ""
        shape = ", ".join(
            "n" if axis == 2 else str(size) for axis, size in enumerate(cache_shape(model, 1))
        )
        labels = ""
        if model.classes:
            labels = "labels = numpy.zeros(n, numpy.int64)   # all of class 0\n"
        elif model.vector_size:
            shape_of = f"(n, {model.vector_size}), numpy.nan, numpy.float32"
            labels = f"labels = numpy.full({shape_of})   # no condition\n"
        return LOOP.format(
            T=model.T,
            h=model.grid[0],
            w=model.grid[1],
            shape=shape,
            labels=labels,
            also=', "labels": labels' if labels else "",
        )
