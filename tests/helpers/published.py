"""Published models without their weights: names and shapes alone."""

from collections.abc import Mapping
from typing import Any

import torch

from tests.helpers.public import empty_file, published_shapes
from vqgan.formats.base import Choices, Format
from vqgan.load import build_tokenizer


def check_published(kind: Format, model: str, settings: Mapping[str, Any], target: str) -> None:
    """Fail unless the format plans a place of the right shape for every weight of a published model, and for no other."""
    file = empty_file(published_shapes(model), settings=settings, target=target)
    assert kind.recognises(file)
    plan = kind.plan(file, Choices(image_size=(256, 256), channels=3))
    with torch.device("meta"):
        tokenizer = build_tokenizer(plan.model, plan.quantizer)
    places = tokenizer.state_dict()
    assert {name for name, _ in tokenizer.named_parameters()} <= plan.names.keys() <= places.keys()
    assert sorted([*plan.names.values(), *plan.statistics]) == sorted(file.tensors)
    for name, public in plan.names.items():
        shape = [length for length in file.tensors[public].shape if length != 1]
        assert shape == [length for length in places[name].shape if length != 1], name
