"""Whether an exported prior computes what the prior does."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from prior.export.graphs import describe_graph, start_inputs
from prior.models.base import Autoregressive, PriorModel
from prior.models.gpt import GPT
from prior.models.masked import Masked
from prior.models.var import VAR

MAX_LOGIT_DIFFERENCE = 1e-4  # of logits up to 1, and relative to larger ones

# Inputs by their names -> outputs in order.
RunGraph = Callable[[Mapping[str, Tensor]], list[Tensor]]


@torch.no_grad()
def compare_prior(name: str, model: PriorModel, run: RunGraph) -> dict[str, float]:
    """How a graph of the format `name` compares with the prior itself, for two samples and for one. Raises InputError if it
    differs.

    Every step of a greedy decoding is compared with the cached decoding of stage=sample; a graph without steps is compared on
    random grids. `equal_codes` is the share of codes that are the most likely ones of both.
    """
    pairs = list_steps if describe_graph(model).kind == "step" else list_grids
    compared = [compare_logits(name, *pair) for n in (2, 1) for pair in pairs(model, run, n)]
    equal, differences = zip(*compared, strict=True)
    return {"equal_codes": sum(equal) / len(equal), "largest_logit_difference": max(differences)}


def list_steps(model: PriorModel, run: RunGraph, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The graph's logits (n, K) and the prior's own, at each position of n samples of the most likely codes."""
    assert isinstance(model, GPT)
    inputs = start_inputs(model, n)
    labels = inputs.get("labels")
    decode = model.decoder(n, labels)
    before: Tensor | None = None
    for t in range(model.T):
        expected = decode(before)
        logits, inputs["cache"] = run({**inputs, "position": torch.tensor(t)})
        yield logits, expected
        before = inputs["codes"] = expected.argmax(-1)


def list_grids(model: PriorModel, run: RunGraph, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The graph's logits of n random grids and the prior's own; half of the codes are masked where the prior masks."""
    generator = torch.Generator().manual_seed(0)
    inputs = start_inputs(model, n)
    codes = inputs["codes"] = torch.randint(model.K, inputs["codes"].shape, generator=generator)
    labels = inputs.get("labels")
    if isinstance(model, Masked):
        masked = inputs["masked"] = torch.rand(codes.shape, generator=generator) < 0.5
        expected = model(codes.flatten(1), masked.flatten(1), labels)
    else:
        assert isinstance(model, Autoregressive | VAR)
        expected = model(codes.flatten(1), labels)
    [logits] = run(inputs)
    yield logits, expected.view(*codes.shape, model.K)


def compare_logits(name: str, logits: Tensor, expected: Tensor) -> tuple[float, float]:
    """The share of equal most likely codes, and the largest difference of logits (..., K), divided by the largest if that is
    above 1. Raises InputError if the difference is more than MAX_LOGIT_DIFFERENCE."""
    scale = max(1.0, float(expected.abs().max()))
    same_shape = logits.shape == expected.shape
    difference = float((logits - expected).abs().max()) / scale if same_shape else float("inf")
    if not difference <= MAX_LOGIT_DIFFERENCE:  # not for NaN either
        raise InputError(
            f"format={name} was written and read back, and the prior's logits differ by {difference:.2g}, where "
            f"{MAX_LOGIT_DIFFERENCE:g} is allowed; leave {name} out of format"
        )
    return float((logits.argmax(-1) == expected.argmax(-1)).float().mean()), difference
