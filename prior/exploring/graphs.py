"""The networks of a page: the graphs of stage=export with smaller weights, as small as the checks allow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.errors import InputError, summarize_error
from prior.exploring.subject import Subject
from prior.exploring.survey import CodeSurvey
from prior.export.compare import RunGraph
from prior.export.graphs import describe_graph, start_inputs
from prior.export.programs import ONNXPrior
from prior.likelihood import judge_codes
from prior.models.base import PriorModel
from prior.models.gpt import GPT
from prior.models.masked import Masked
from prior.prior import Prior
from vqgan.export.onnx import LIBRARIES, NAMES, ONNXExporter, ONNXGraph
from vqgan.tokenizer import Tokenizer

JUDGED = 32  # grids
MIN_WEIGHTS = 256  # smaller tensors stay as they are
MAX_PIXEL_DIFFERENCE = 1 / 255  # of a pixel in [0, 1]
MARGIN = (
    0.5  # of a limit, that weights in float16 may take: the browser's arithmetic takes some too
)
MIN_EQUAL = 0.99
MAX_NATS = 2e-3  # per token, between the means
MAX_CODE_NATS = 2e-2  # of a code, in the mean: errors of both signs cancel in the figure above
WEIGHT_NAMES = ("tokenizer.", "model.")  # names of a module's own tensors


@dataclass(frozen=True)
class Graph:
    """A network as the content of an ONNX file; it computes in float32, whatever the precision of its weights."""

    content: bytes
    precision: str
    inputs: Sequence[str]
    outputs: Sequence[str]


@dataclass(frozen=True)
class Examples:
    """What the graphs are compared on: images (n, C, H, W) in [-1, 1], and their codes and decoded pictures by the tokenizer."""

    images: Tensor
    codes: Tensor
    decoded: Tensor

    @classmethod
    @torch.no_grad()
    def compute(cls, tokenizer: Tokenizer, images: Tensor) -> "Examples":
        """The images' own codes, and as many random ones: a user paints what no image has."""
        codes = torch.cat([tokenizer.indices(part) for part in images.split(16)])
        generator = torch.Generator().manual_seed(0)
        random = torch.randint(tokenizer.K or 0, codes.shape, generator=generator)
        decoded = [
            tokenizer.decode_indices(part).clamp(-1, 1)
            for part in torch.cat([codes, random]).split(16)
        ]
        return cls(images, torch.cat([codes, random]), torch.cat(decoded))


@dataclass(frozen=True)
class PageNetworks:
    """The graphs of a page, and how they compare with the model; `checks` are as the manifest has them."""

    encoder: Graph | None
    decoder: Graph
    prior: Graph | None
    checks: dict[str, Any]


def make_networks(subject: Subject, survey: CodeSurvey) -> PageNetworks:
    """The graphs of a page, each compared with its network. Raises InputError if one differs, and if a library is missing."""
    tokenizer, trained = subject.tokenizer, subject.prior
    examples = Examples.compute(tokenizer, survey.x)
    files = trace_tokenizer(tokenizer)
    decoder, difference = make_decoder(files["decoder.onnx"], examples)
    encoder, equal = None, None
    if subject.refusal is None:
        encoder, equal = make_encoder(files["encoder.onnx"], examples)
    graph, own_nats, nats = None, None, None
    if trained is not None and subject.refuse_prior(is_served=False) is None:
        n = min(JUDGED, len(survey.codes))
        labels = number_prior_labels(trained, survey.labels[:n])
        graph, own_nats, nats = make_prior(trained, survey.codes[:n], labels)
    checks = {
        "pictures": len(survey.x),
        "largest_difference": difference,
        "equal_codes": equal,
        "nats": own_nats,
        "nats_of_graph": nats,
    }
    return PageNetworks(encoder, decoder, graph, checks)


def trace_tokenizer(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of format=onnx. Raises InputError for networks of the user's own that can't be traced."""
    try:
        return ONNXExporter().encode_files(tokenizer)
    except Exception as error:
        parts = (tokenizer.encoder, tokenizer.decoder, tokenizer.quantizer)
        strange = [type(part) for part in parts if not type(part).__module__.startswith("vqgan.")]
        if not strange:
            raise
        raise InputError(
            f"{' or '.join(kind.__name__ for kind in strange)} can't be traced by torch.export ({summarize_error(error)}); add "
            "serve=true, which runs the model itself"
        ) from error


def number_prior_labels(trained: Prior, labels: Tensor) -> Tensor | None:
    """What the prior is given for images with these labels: their classes, no class if it knows others, no vector, or nothing."""
    model = trained.model
    if model.classes:
        try:
            return torch.from_numpy(trained.classes.number(labels.numpy(), "the images"))
        except InputError:
            return torch.full((len(labels),), -1)
    if model.vector_size:
        return torch.full((len(labels), model.vector_size), torch.nan)
    return None


def check_libraries() -> None:
    """Raise InputError unless the libraries are there that write and run graphs."""
    missing = [library for library in LIBRARIES if find_spec(library) is None]
    if missing:
        raise InputError(
            f'stage=explore needs {" and ".join(missing)}; pip install "codegrid[explore]"'
        )


def make_decoder(content: bytes, examples: Examples) -> tuple[Graph, float]:
    """The decoder of this ONNX file for a page, and its largest difference of a pixel in [0, 1].

    Raises InputError if its pixels are not the tokenizer's.
    """

    def differ(run: RunGraph) -> float:
        pictures = [run({NAMES["decoder"][0]: codes})[0] for codes in examples.codes.split(16)]
        return float((torch.cat(pictures) - examples.decoded).abs().max()) / 2

    graph, difference = choose_precision(content, NAMES["decoder"], differ, MAX_PIXEL_DIFFERENCE)
    if graph is None:
        raise InputError(
            f"the page would show other pictures than the tokenizer: pixels differ by {difference * 255:.3g} of 255, where 1 is "
            "allowed; open an issue with the run's config.yaml"
        )
    return graph, difference


def make_encoder(content: bytes, examples: Examples) -> tuple[Graph, float]:
    """The encoder of this ONNX file for a page, and the share of positions with the tokenizer's codes.

    Raises InputError if its codes are not the tokenizer's.
    """
    n = len(examples.images)

    def differ(run: RunGraph) -> float:
        codes = [run({NAMES["encoder"][0]: part})[0] for part in examples.images.split(16)]
        return 1 - float((torch.cat(codes) == examples.codes[:n]).float().mean())

    graph, difference = choose_precision(content, NAMES["encoder"], differ, 1 - MIN_EQUAL)
    if graph is None:
        raise InputError(
            f"the page would make other codes than the tokenizer: only {1 - difference:.1%} are equal, where {MIN_EQUAL:.0%} "
            "must be; open an issue with the run's config.yaml"
        )
    return graph, 1 - difference


def make_prior(trained: Prior, codes: Tensor, labels: Tensor | None) -> tuple[Graph, float, float]:
    """The prior's graph for a page, and the nats per token of codes (n, *shape) with these labels, the prior's and the graph's.

    Raises InputError if its likelihood is not the prior's.
    """
    model = trained.model.cpu()
    signature = describe_graph(model)
    content = ONNXPrior().encode_files(trained)["prior.onnx"]
    expected = list_own_nats(model, codes, labels)

    def compare(run: RunGraph) -> Tensor:
        return list_graph_nats(model, run, codes, labels) - expected

    def differ(run: RunGraph) -> float:
        differences = compare(run)
        of_limits = [differences.mean().abs() / MAX_NATS, differences.abs().mean() / MAX_CODE_NATS]
        return float(torch.stack(of_limits).max())

    names = tuple(signature.inputs), signature.outputs
    graph, _ = choose_precision(content, names, differ, 1.0)
    if graph is None:
        differences = compare(ONNXGraph(content))
        raise InputError(
            f"the page would have another prior than ckpt: its nats per token differ by {differences.mean().abs():.2g} in the "
            f"mean, where {MAX_NATS:g} is allowed, and those of a code by {differences.abs().mean():.2g}, where "
            f"{MAX_CODE_NATS:g} is; open an issue with the run's config.yaml"
        )
    own = float(expected.mean())
    return graph, own, own + float(compare(ONNXGraph(graph.content)).mean())


def choose_precision(
    content: bytes, names: tuple[Any, Any], differ: Callable[[RunGraph], float], limit: float
) -> tuple[Graph | None, float]:
    """The graph with weights in float16 if its difference is within MARGIN of the limit, or else with those of the file, and the
    difference; None if that is beyond the limit too."""
    inputs, outputs = (each if isinstance(each, tuple) else (each,) for each in names)
    smaller = halve_weights(content)
    difference = differ(ONNXGraph(smaller))
    if difference <= MARGIN * limit:
        return Graph(smaller, "float16", inputs, outputs), difference
    difference = differ(ONNXGraph(content))
    if difference <= limit:
        return Graph(content, "float32", inputs, outputs), difference
    return None, difference


def halve_weights(content: bytes) -> bytes:
    """An ONNX file with its larger weights in float16, and the nodes that make float32 of them.

    Constants that the export has computed, such as the squares of all codes, stay as they are: distances to codes that are
    rounded apart from their squares have other minima.
    """
    import onnx  # an extra
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load_from_string(content)
    graph = model.graph
    nodes, tensors = [], []
    for tensor in graph.initializer:
        is_weight = tensor.name.startswith(WEIGHT_NAMES) and tensor.data_type == TensorProto.FLOAT
        if is_weight and np.prod(tensor.dims) >= MIN_WEIGHTS:
            values = numpy_helper.to_array(tensor)
            if np.abs(values).max() < np.finfo(np.float16).max:
                half = f"{tensor.name}.half"
                nodes.append(helper.make_node("Cast", [half], [tensor.name], to=TensorProto.FLOAT))
                tensor = numpy_helper.from_array(values.astype(np.float16), half)
        tensors.append(tensor)
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(tensors)
    graph.node.extend(nodes)
    smaller: bytes = model.SerializeToString()
    return smaller


@torch.no_grad()
def list_graph_nats(
    model: PriorModel, run: RunGraph, codes: Tensor, labels: Tensor | None
) -> Tensor:
    """-log p of codes (n, *shape) in nats, flat, by a graph of the prior: of all codes, each given those before it, or, of a
    prior that fills in masked codes, of those that `mask_half` masks."""
    flat = codes.flatten(1)
    inputs = start_inputs(model, len(codes))
    if labels is not None:
        inputs["labels"] = labels
    if isinstance(model, GPT):
        steps = []
        for t in range(model.T):
            logits, inputs["cache"] = run({**inputs, "position": torch.tensor(t)})
            steps.append(F.cross_entropy(logits, flat[:, t], reduction="none"))
            inputs["codes"] = flat[:, t].contiguous()
        return torch.stack(steps, 1).flatten()
    inputs["codes"] = codes
    if isinstance(model, Masked):
        inputs["masked"] = mask_half(codes)
    [logits] = run(inputs)
    return list_nats(logits, codes, inputs.get("masked"))


@torch.no_grad()
def list_own_nats(model: PriorModel, codes: Tensor, labels: Tensor | None) -> Tensor:
    """The same by the prior itself."""
    if not isinstance(model, Masked):
        return judge_codes(model, codes, labels).flatten()
    masked = mask_half(codes)
    logits = model(codes.flatten(1), masked.flatten(1), labels)
    return list_nats(logits, codes, masked)


def mask_half(codes: Tensor) -> Tensor:
    """A random half of the places of codes, bool; the same for the same shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(codes.shape, generator=generator) < 0.5


def list_nats(logits: Tensor, codes: Tensor, chosen: Tensor | None) -> Tensor:
    """-log p of the chosen codes, or of all, by logits (..., K)."""
    codes = codes.flatten()
    places = slice(None) if chosen is None else chosen.flatten()
    logits = logits.reshape(len(codes), -1)
    return F.cross_entropy(logits[places], codes[places], reduction="none")
