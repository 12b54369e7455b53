"""The model card of an exported tokenizer: README.md with the metadata of the Hugging Face hub, filled from the run."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codegrid.data.ranges import format_ranges
from codegrid.data.shown import choose_shown
from codegrid.engine.card import describe_images, display_command, format_value, is_score
from codegrid.engine.templates import render_template
from codegrid.engine.version import Stamp
from vqgan.export.base import Exporter
from vqgan.export.licences import describe_licence
from vqgan.export.origin import Origin
from vqgan.tokenizer import Tokenizer

README = "README.md"
PICTURES_FOLDER = "pictures"
TEMPLATE = Path(__file__).with_name("readme.md.j2")
IMPORTED = ("origin", "sha256", "licence", "remarks")  # what stage=import records of public weights
NOT_SHOWN = ("K", "grid", "updates")  # figures that the card has elsewhere


def write_readme(
    tokenizer: Tokenizer,
    origin: Origin,
    exporters: Sequence[Exporter],
    checks: Mapping[str, Mapping[str, Any]],
    licence: str | None,
    title: str,
    hub: str | None,
) -> str:
    """The text of README.md. `checks` are the figures of each format's verification; `hub` is the repository to which the folder
    is pushed, if that is known."""
    start = origin.start
    licence = licence or origin.licence
    metadata = describe_licence(licence)
    revision = start.get("git") or ""
    return render_template(
        TEMPLATE,
        escape=False,
        filters={"yaml": quote_yaml, "cell": format_cell},
        metadata=metadata
        | {"library_name": "codegrid", "tags": list_hub_tags(tokenizer, origin.stage)},
        own_licence=licence if "license_name" in metadata else None,
        title=title,
        summary=origin.summary,
        is_read_back=any(exporter.is_read_back for exporter in exporters),
        has_prior=origin.stage == "prior" and any(each.name == "safetensors" for each in exporters),
        hub=hub,
        tokenizer=tokenizer,
        quantizer=type(tokenizer.quantizer).__name__,
        image_size=tokenizer.encoder.image_size,
        kind=name_image_kind(tokenizer.encoder.channels),
        units=describe_values(tokenizer),
        example="a.jpg"
        if tokenizer.encoder.channels in (1, 3) and tokenizer.rules.is_plain
        else "a.tif",
        bits=round(tokenizer.quantizer.bits * tokenizer.grid[0] * tokenizer.grid[1]),
        usages=[name_hub(exporter.usage, hub) for exporter in exporters],
        checks={name: format_check(each) for name, each in checks.items()},
        images=describe_images(start),
        imported={
            key: hide_home(origin.figures[key]) for key in IMPORTED if origin.figures.get(key)
        },
        scores={
            name: format_value(value)
            for name, value in origin.figures.items()
            if is_score(name, value) and name not in NOT_SHOWN
        },
        pictures={name: f"{PICTURES_FOLDER}/{file.name}" for name, file in origin.pictures.items()},
        command=hide_home(display_command(start["command"])) if start.get("command") else None,
        revision=revision.removesuffix("-dirty"),
        uncommitted=revision.endswith("-dirty"),
        run_id=origin.config.get("id"),
        writer=str(Stamp(start.get("codegrid"))) if start else "Codegrid",
    )


def name_image_kind(channels: int) -> str:
    """What images of so many channels are called."""
    return {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")


def describe_values(tokenizer: Tokenizer) -> str:
    """How the numbers in [-1, 1] are related to the values of the images, and which channels pictures show, as sentences."""
    rules, channels = tokenizer.rules, tokenizer.encoder.channels
    text = "Images are numbers in [-1, 1]: 0 to 255, divided by 127.5, minus 1."
    if not rules.is_plain:
        text = (
            f"Images are numbers in [-1, 1]: {format_ranges(rules.ranges)} in the units of the data ({rules.unit_type}), which "
            '`decode_codes(codes, output="array")` gives back.'
        )
    shown = choose_shown(channels, rules.show)
    if len(shown) == channels:
        return text
    numbers = f"channel{'s' if len(shown) > 1 else ''} {', '.join(map(str, shown))}"
    return f"{text} Pictures show {numbers} of {channels}."


def name_hub(usage: str, hub: str | None) -> str:
    """How a format is read, by the name of the repository if that is known."""
    return usage.replace('from_pretrained(".", ', f'from_pretrained("{hub or "."}", ')


def hide_home(value: Any) -> Any:
    """A text with ~ for the user's home folder, whose name is nobody's business on a hub; other values as they are."""
    home = os.path.expanduser("~")
    return value.replace(f"{home}/", "~/") if isinstance(value, str) else value


def list_hub_tags(tokenizer: Tokenizer, stage: str) -> list[str]:
    """By which the hub finds a tokenizer, or a prior with its tokenizer."""
    more = ["image-generation"] if stage == "prior" else []
    return [
        *more,
        "vqgan",
        "image-tokenizer",
        "discrete",
        type(tokenizer.quantizer).__name__.lower(),
    ]


def format_check(figures: Mapping[str, Any]) -> str:
    """What the check of one format measured, as a text."""
    return ", ".join(f"{key.replace('_', ' ')} {format_value(v)}" for key, v in figures.items())


def quote_yaml(value: Any) -> str:
    """A text, or a list of them, as a value of YAML, which JSON is."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def format_cell(value: Any) -> str:
    """A value in a cell of a Markdown table."""
    text = "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
