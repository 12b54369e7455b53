"""Public tokenizers of tests/fixtures/public, and tokenizers as a format plans them, without the command that imports."""

import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.load import build_tokenizer
from vqgan.tokenizer import Tokenizer

PUBLIC = Path(__file__).parents[1] / "fixtures" / "public"


def read_plain_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds nothing but tensors and plain containers, flat or under state_dict."""
    content = torch.load(file, weights_only=True)
    weights: dict[str, Tensor] = content.get("state_dict", content)
    return weights


def read_arrays(file: Path) -> dict[str, Tensor]:
    """What a project's own code makes of its fixture."""
    with np.load(file) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def published_shapes(model: str) -> dict[str, torch.Size]:
    """The names and shapes of a published model's weights."""
    return {name: torch.Size(shape) for name, shape in read_published()[model].items()}


@cache
def read_published() -> dict[str, dict[str, list[int]]]:
    """The names and shapes of the weights of all published models, by model."""
    with gzip.open(PUBLIC / "published-names.json.gz") as stream:
        shapes: dict[str, dict[str, list[int]]] = json.load(stream)
    return shapes


def empty_file(shapes: Mapping[str, torch.Size], **details: Any) -> PublicFile:
    """A public file whose weights have shapes alone."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return PublicFile("published", tensors, **details)


def build_planned(plan: Plan, tensors: Mapping[str, Tensor]) -> Tokenizer:
    """The tokenizer that a plan describes, with every public weight in its place, taken exactly once."""
    tokenizer = build_tokenizer(plan.model, plan.quantizer)
    state = tokenizer.state_dict()
    parameters = {name for name, _ in tokenizer.named_parameters()}
    assert parameters <= set(plan.names) <= set(state)
    assert sorted([*plan.names.values(), *plan.statistics]) == sorted(tensors)
    for name, public in plan.names.items():
        transform = plan.transforms.get(name, lambda value: value)
        value = transform(tensors[public])
        assert [n for n in value.shape if n != 1] == [n for n in state[name].shape if n != 1], name
        state[name] = value.to(torch.float32).reshape(state[name].shape)
    tokenizer.load_state_dict(state)
    return tokenizer.eval()


def import_file(kind: Format, file: PublicFile, image_size: int, channels: int = 3) -> Tokenizer:
    """A public file as a tokenizer for images of this size."""
    assert kind.recognises(file)
    return build_planned(kind.plan(file, Choices((image_size, image_size), channels)), file.tensors)


@torch.no_grad()
def assert_parity(
    tokenizer: Tokenizer, reference: Mapping[str, Tensor], unit_range: bool = False
) -> None:
    """Latents and images within 1e-5 of a project's own code, indices equal; `unit_range`: its images are in [0, 1]."""

    def center(x: Tensor) -> Tensor:
        return 2 * x - 1 if unit_range else x

    def assert_same_images(x_hat: Tensor, expected: Tensor) -> None:
        own_range = (x_hat + 1) / 2 if unit_range else x_hat
        torch.testing.assert_close(own_range, expected, atol=1e-5, rtol=0)

    q = tokenizer.encode(center(reference["images"]))
    torch.testing.assert_close(q.z_e, reference["z_e"], atol=1e-5, rtol=0)
    assert q.indices is not None
    assert torch.equal(q.indices, reference["indices"])
    assert_same_images(tokenizer.decode_indices(q.indices), reference["reconstruction"])
    chosen = tokenizer.decode_indices(reference["chosen_indices"])
    assert_same_images(chosen, reference["chosen_decoded"])
