"""This program's own export: format=safetensors of stage=export."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from codegrid.engine.aliases import upgrade_names
from codegrid.engine.errors import InputError
from codegrid.engine.sizes import check_size, divides, write_size
from codegrid.engine.version import STAMP, Stamp, check_format
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.networks.base import scale_settings
from vqgan.quantizers.scales import resize_scales

CLASS_NAME = "CodegridTokenizer"  # in config.json, by which it is told from other configs
FACTS = "config.json"
READING = "reading"  # in it, how images of more than 8 bits or with transparency were read
TABLE = "codes"  # all codes as vectors, for programs without this one's quantizers
SIZED = ("image_size", "grid", "attention")  # settings that count pixels or codes a side


class CodegridFormat(Format):
    title = "Codegrid's own export (format=safetensors)"

    def recognises(self, file: PublicFile) -> bool:
        return file.settings.get("_class_name") == CLASS_NAME

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        facts = file.settings
        stamp = Stamp.read(facts[STAMP])
        check_format(file.source, stamp)
        check_fit(file.source, facts, choices)
        model = deepcopy(dict(facts["model"]))
        before = check_size("image_size", facts["image_size"], "pixel")
        for settings in (model, model["encoder"], model["decoder"]):
            scale_settings(settings, SIZED, choices.image_size, before)
        quantizer = upgrade_names({"quantizer": dict(facts["quantizer"])}, stamp)["quantizer"]
        if f := facts["f"]:
            grid, grid_before = (
                (size[0] // f, size[1] // f) for size in (choices.image_size, before)
            )
            resize_scales(quantizer, grid, grid_before)
        weights = {name for name, value in file.tensors.items() if value.is_floating_point()}
        counters = file.tensors.keys() - weights
        return Plan(
            model,
            quantizer,
            {name: name for name in weights - {TABLE}},
            statistics=frozenset({TABLE, *counters}),
        )


def check_fit(source: str, facts: Mapping[str, Any], choices: Choices) -> None:
    """Raise InputError for images that an exported tokenizer doesn't take, and for choices that it leaves nobody."""
    f = facts["f"]
    size = check_size("image_size", facts["image_size"], "pixel")
    wanted = choices.image_size
    if wanted != size and not (facts["any_size"] and divides(f, wanted)):
        sizes = f"a multiple of {f}" if facts["any_size"] else write_size(size)
        raise InputError(
            f"data.image_size={write_size(wanted)}, and {source} takes {sizes}; use data.image_size={write_size(size)}"
        )
    chosen = {
        "pixels": choices.pixels,
        "quantizer.cosine": choices.cosine,
        "quantizer.score": choices.score,
        "quantizer.scales": choices.scales,
        "head_width": choices.head_width,
    }
    for name, value in chosen.items():
        if value is not None:
            raise InputError(
                f"{name}={value} can't be chosen: {source} has its settings; leave it out"
            )
