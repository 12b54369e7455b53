"""This program's own export: format=safetensors of stage=export."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from codegrid.engine.errors import InputError
from codegrid.engine.version import STAMP, Stamp, check_format
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.networks.base import scale_settings

CLASS_NAME = "CodegridTokenizer"  # in config.json, by which it is told from other configs
TABLE = "codes"  # all codes as vectors, for programs without this one's quantizers
SIZED = ("image_size", "grid", "attention")  # settings that count pixels or codes a side


class CodegridFormat(Format):
    title = "Codegrid's own export (format=safetensors)"

    def recognises(self, file: PublicFile) -> bool:
        return file.settings.get("_class_name") == CLASS_NAME

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        facts = file.settings
        check_format(file.source, Stamp.read(facts[STAMP]))
        check_fit(file.source, facts, choices)
        model = deepcopy(dict(facts["model"]))
        for settings in (model, model["encoder"], model["decoder"]):
            scale_settings(settings, SIZED, choices.image_size, facts["image_size"])
        weights = {name for name, value in file.tensors.items() if value.is_floating_point()}
        counters = file.tensors.keys() - weights
        return Plan(
            model,
            deepcopy(dict(facts["quantizer"])),
            {name: name for name in weights - {TABLE}},
            statistics=frozenset({TABLE, *counters}),
        )


def check_fit(source: str, facts: Mapping[str, Any], choices: Choices) -> None:
    """Raise InputError for images that an exported tokenizer doesn't take, and for choices that it leaves nobody."""
    channels, size, f = facts["channels"], facts["image_size"], facts["f"]
    if choices.channels != channels:
        raise InputError(
            f"data.channels={choices.channels}, and {source} is for images of {channels}; use data.channels={channels}"
        )
    if choices.image_size % f or (choices.image_size != size and not facts["any_size"]):
        sizes = f"a multiple of {f}" if facts["any_size"] else f"{size}"
        raise InputError(
            f"data.image_size={choices.image_size}, and {source} takes {sizes}; use data.image_size={size}"
        )
    chosen = {
        "pixels": choices.pixels,
        "quantizer.cosine": choices.cosine,
        "quantizer.score": choices.score,
    }
    for name, value in chosen.items():
        if value is not None:
            raise InputError(
                f"{name}={value} can't be chosen: {source} has its settings; leave it out"
            )
