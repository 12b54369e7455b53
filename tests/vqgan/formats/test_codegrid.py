"""The round trip: what stage=export wrote is read back to the bit."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load

from codegrid.engine.errors import InputError
from tests.helpers.configs import list_options
from tests.helpers.exports import PYRAMID, compose_small, make_trained
from vqgan.export.base import to_json
from vqgan.export.origin import Origin
from vqgan.export.safetensors import MODEL_WEIGHTS, SafetensorsExporter
from vqgan.export.writing import describe_tokenizer
from vqgan.formats.base import Choices, PublicFile
from vqgan.formats.load import choose_format, load_public
from vqgan.tokenizer import Tokenizer

DISCRETE = [name for name in list_options("quantizer") if name not in ("kl", "none")]
ALL = [
    *([f"quantizer={name}"] for name in DISCRETE),
    ["model.start=random", "data.channels=1"],
    [*PYRAMID, "model.attention=[8]"],
    ["+model.pixels=[0,1]", "quantizer.cosine=true"],
]


def export(tokenizer: Tokenizer, *words: str) -> PublicFile:
    """The weights and config.json of an export, read as an import reads them."""
    config = compose_small(*words)
    files = SafetensorsExporter().encode_files(tokenizer)
    settings = {group: config[group] for group in ("model", "quantizer")}
    facts = describe_tokenizer(tokenizer, Origin("run", config), settings)
    facts |= SafetensorsExporter().describe(tokenizer)
    settings = json.loads(to_json(facts))
    return PublicFile("exported", load(files[MODEL_WEIGHTS]), settings)


@pytest.mark.parametrize("words", ALL, ids=" ".join)
@torch.no_grad()
def test_codes_and_pictures_come_back_to_the_bit(words: list[str]) -> None:
    tokenizer = make_trained(*words)
    file = export(tokenizer, *words)
    assert type(choose_format(file)).__name__ == "CodegridFormat"
    channels = tokenizer.encoder.channels
    again = load_public(file, Choices((16, 16), channels)).tokenizer
    x = torch.rand(2, channels, 16, 16) * 2 - 1
    q, other = tokenizer.encode(x), again.encode(x)
    assert torch.equal(other.z_e, q.z_e)
    assert torch.equal(other.indices, q.indices)
    assert torch.equal(again.decode(other.z_q), tokenizer.decode(q.z_q))
    weights = {k: v for k, v in tokenizer.state_dict().items() if v.is_floating_point()}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in weights.items())


@torch.no_grad()
def test_images_of_another_size_have_the_same_codes() -> None:
    words = [*PYRAMID, "model.attention=[8]"]
    tokenizer = make_trained(*words)
    again = load_public(export(tokenizer, *words), Choices((32, 32), 3)).tokenizer
    assert (again.grid, again.encoder.image_size) == ((8, 8), (32, 32))
    x = torch.rand(1, 3, 16, 24) * 2 - 1
    assert torch.equal(again.indices(x), tokenizer.indices(x))


@pytest.mark.parametrize(
    ("choices", "changes", "sentence"),
    [
        ({"image_size": (18, 18)}, {}, "data.image_size=18, and exported takes a multiple of 4"),
        (
            {"image_size": (32, 32)},
            {"any_size": False},
            "and exported takes 16; use data.image_size=16",
        ),
        ({"pixels": (0, 1)}, {}, r"pixels=\(0, 1\) can't be chosen"),
        ({"cosine": True}, {}, "quantizer.cosine=True can't be chosen"),
        (
            {},
            {"codegrid": {"version": "9", "format": 99}},
            "was written by Codegrid 9 and has format",
        ),
    ],
)
def test_what_does_not_fit_is_a_sentence(
    choices: dict[str, Any], changes: dict[str, Any], sentence: str
) -> None:
    file = export(make_trained())
    file = replace(file, settings={**file.settings, **changes})
    with pytest.raises(InputError, match=sentence):
        load_public(file, Choices(**{"image_size": (16, 16), "channels": 3, **choices}))


def test_a_file_that_names_a_class_of_somebody_elses_is_refused() -> None:
    file = export(make_trained())
    quantizer = {**file.settings["quantizer"], "_target_": "os.system"}
    with pytest.raises(InputError, match=r"os\.system"):
        load_public(
            replace(file, settings={**file.settings, "quantizer": quantizer}), Choices((16, 16), 3)
        )
