"""A prior as one graph that torch.export traces for any number of samples: a step with its cache, or all logits of a grid."""

import warnings
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from codegrid.engine.errors import InputError, summarize_error
from prior.models.base import Autoregressive, PriorModel
from prior.models.counted import Counted
from prior.models.gpt import GPT
from prior.models.masked import Masked
from prior.models.transformer import Block, rotary_directions, rotate_pairs
from prior.models.var import VAR

OWN_MODELS = "prior.models."
TRACED = 2  # samples: torch.export takes 1 for a constant; and len(codes) too, so the priors ask for codes.shape[0]


class StepGraph(nn.Module):
    """One position of a transformer in raster order; the keys and values of the positions before are its cache."""

    places: Tensor
    directions: Tensor

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model
        places, angles = model.places()
        self.register_buffer("places", places.detach().clone())
        self.register_buffer("directions", rotary_directions(angles))

    def forward(
        self, codes: Tensor, position: Tensor, cache: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The codes (B,) of the position before, not read at the first; position () int64 from 0; cache (blocks, 2, B, heads, T,
        size) float32, zeros at the first position -> logits (B, K) of the codes here, and the cache for the next position."""
        before = self.model.read(codes)
        x = torch.where(position == 0, self.model.begin(codes.shape[0], labels), before)
        at = position.view(1)
        x = x + self.places.index_select(0, at)
        directions = self.directions.index_select(0, at)[0]
        filled = []
        for block, past in zip(self.model.blocks, cache.unbind(0), strict=True):
            assert isinstance(block, Block)
            x, past = step_block(block, x, past, position, directions)
            filled.append(past)
        return self.model.logits(x), torch.stack(filled)


def step_block(
    block: Block, x: Tensor, past: Tensor, position: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """A causal block at one position: x (B, width), keys and values past (2, B, heads, T, size), directions (1 or 2, 1, size / 2,
    2) of this position -> x and past with this position's keys and values."""
    qkv = block.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1))
    turned = rotate_pairs(qkv[:, :2], directions)
    entry = torch.stack([turned[:, 1], qkv[:, 2]])[:, :, :, None]
    steps = torch.arange(past.shape[3], device=x.device)
    past = torch.where((steps == position)[:, None], entry, past)
    keys, values = past.unbind(0)
    q = turned[:, 0, :, None] * qkv.shape[-1] ** -0.5
    scores = (q @ keys.mT).masked_fill(steps > position, -torch.inf)
    x = x + block.proj((scores.softmax(-1) @ values).flatten(1))
    gate, up = block.gate_up(block.norm2(x)).chunk(2, -1)
    return x + block.down(F.silu(gate) * up), past


class GridGraph(nn.Module):
    """All logits of a prior that predicts code by code or scale by scale: those of a position depend on codes before it only."""

    def __init__(self, model: Autoregressive | VAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """codes (B, h, w), (B, h, w, num_codebooks) or (B, 1, L) int64 -> logits (..., K)."""
        logits: Tensor = self.model(codes.flatten(1), labels)
        return logits.view(*codes.shape, self.model.K)


class MaskedGraph(nn.Module):
    """All logits of a prior that fills in masked codes."""

    def __init__(self, model: Masked) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor, masked: Tensor, labels: Tensor | None = None) -> Tensor:
        """codes (B, h, w) int64, of which those `masked` (B, h, w) bool are not read -> logits (B, h, w, K)."""
        logits: Tensor = self.model(codes.flatten(1), masked.flatten(1), labels)
        return logits.view(*codes.shape, self.model.K)


@dataclass(frozen=True)
class Signature:
    """What a prior's graph takes and returns, in order, with the axis of each that counts samples; None: none does."""

    kind: str  # "step", "grid" or "masked"
    inputs: dict[str, int | None]
    outputs: tuple[str, ...]


def describe_graph(model: PriorModel) -> Signature:
    """The graph that a prior has. Raises InputError for one that has none."""
    labels: dict[str, int | None] = {"labels": 0} if model.is_conditional else {}
    if isinstance(model, GPT):
        inputs = {"codes": 0, "position": None, "cache": 2}
        return Signature("step", {**inputs, **labels}, ("logits", "next_cache"))
    if isinstance(model, Masked):
        return Signature("masked", {"codes": 0, "masked": 0, **labels}, ("logits",))
    if isinstance(model, Autoregressive | VAR) and not isinstance(model, Counted):
        return Signature("grid", {"codes": 0, **labels}, ("logits",))
    raise InputError(
        f"{type(model).__name__} has no network that predicts code by code or fills in masked codes; use format=safetensors for "
        "this prior"
    )


def cache_shape(model: GPT, n: int) -> tuple[int, ...]:
    """Of the cache of n samples: blocks, keys and values, n, heads, T, size."""
    heads = next(part for part in model.blocks if isinstance(part, Block)).heads
    return (len(model.blocks), 2, n, heads, model.T, model.place.shape[1] // heads)


def start_inputs(model: PriorModel, n: int) -> dict[str, Tensor]:
    """Inputs of a graph for n samples at the first position: zeros, and labels that differ."""
    h, w, num_codebooks = model.code_shape
    books = (num_codebooks,) if num_codebooks > 1 else ()
    codes = torch.zeros(n, h, w, *books, dtype=torch.int64)
    if isinstance(model, GPT):
        codes, cache = codes[:, 0, 0], torch.zeros(cache_shape(model, n))
        inputs = {"codes": codes, "position": torch.tensor(0), "cache": cache}
    elif isinstance(model, Masked):
        inputs = {"codes": codes, "masked": torch.zeros_like(codes, dtype=torch.bool)}
    else:
        inputs = {"codes": codes}
    if model.classes:
        inputs["labels"] = torch.arange(n) % (model.classes + 1) - 1  # -1, no class, is one
    if model.vector_size:
        vectors = torch.linspace(-2, 2, n * model.vector_size).view(n, model.vector_size)
        vectors[0] = torch.nan  # no vector is one
        inputs["labels"] = vectors
    return inputs


def trace_prior(model: PriorModel) -> ExportedProgram:
    """The graph of a prior, for any number of samples. Raises InputError for one that has none."""
    signature = describe_graph(model)
    still = deepcopy(model).cpu().eval().requires_grad_(False)
    if isinstance(still, GPT):
        graph: nn.Module = StepGraph(still)
    else:
        graph = MaskedGraph(still) if isinstance(still, Masked) else GridGraph(still)  # type: ignore[arg-type]
    batch = Dim("batch")
    shapes = {
        name: {} if axis is None else {axis: batch} for name, axis in signature.inputs.items()
    }
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # nn.LSTM has its weights in a list too, which torch.export restores.
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
            return export(graph, (), start_inputs(still, TRACED), dynamic_shapes=shapes)
    except Exception as error:  # a prior of the user's own may do what can't be traced
        if type(model).__module__.startswith(OWN_MODELS):
            raise
        raise InputError(
            f"{type(model).__name__} can't be traced by torch.export ({summarize_error(error)}); use format=safetensors, or see "
            "docs/extending/prior.md"
        ) from error
