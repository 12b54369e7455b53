"""The model card of an exported tokenizer: README.md with the metadata of the Hugging Face hub, filled from the run."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codegrid.engine.card import describe_images, display_command, format_value, is_score
from codegrid.engine.templates import render_template
from codegrid.engine.version import Stamp
from vqgan.export.base import Exporter
from vqgan.export.origin import Origin
from vqgan.tokenizer import Tokenizer

README = "README.md"
PICTURES_FOLDER = "pictures"
TEMPLATE = Path(__file__).with_name("readme.md.j2")
UNKNOWN = "unknown"  # of the hub's licences the one for weights of which nobody says more
IMPORTED = ("origin", "sha256", "licence", "remarks")  # what stage=import records of public weights
NOT_SHOWN = ("K", "grid", "updates")  # figures that the card has elsewhere


def write_readme(
    tokenizer: Tokenizer,
    origin: Origin,
    exporters: Sequence[Exporter],
    checks: Mapping[str, Mapping[str, Any]],
    licence: str | None,
    title: str,
) -> str:
    """The text of README.md. `checks` are the figures of each format's verification."""
    start = origin.start
    revision = start.get("git") or ""
    return render_template(
        TEMPLATE,
        escape=False,
        filters={"yaml": quote_yaml, "cell": format_cell},
        metadata=describe_licence(licence or origin.licence)
        | {"library_name": "codegrid", "tags": list_hub_tags(tokenizer)},
        title=title,
        tokenizer=tokenizer,
        quantizer=type(tokenizer.quantizer).__name__,
        image_size=tokenizer.encoder.image_size,
        channels=tokenizer.encoder.channels,
        bits=round(tokenizer.quantizer.bits * tokenizer.grid[0] * tokenizer.grid[1]),
        usages=[exporter.usage for exporter in exporters],
        checks={name: format_check(each) for name, each in checks.items()},
        images=describe_images(start),
        imported={key: origin.figures[key] for key in IMPORTED if origin.figures.get(key)},
        scores={
            name: format_value(value)
            for name, value in origin.figures.items()
            if is_score(name, value) and name not in NOT_SHOWN
        },
        pictures={name: f"{PICTURES_FOLDER}/{file.name}" for name, file in origin.pictures.items()},
        command=display_command(start["command"]) if start.get("command") else None,
        revision=revision.removesuffix("-dirty"),
        uncommitted=revision.endswith("-dirty"),
        run_id=origin.config.get("id"),
        writer=str(Stamp(start.get("codegrid"))) if start else "Codegrid",
    )


def describe_licence(licence: str | None) -> dict[str, str]:
    """The hub's metadata of a licence: its identifier, or "other" with the licence's own name."""
    if licence is None or re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", licence):
        return {"license": licence or UNKNOWN}
    return {"license": "other", "license_name": licence}


def list_hub_tags(tokenizer: Tokenizer) -> list[str]:
    """By which the hub finds a tokenizer."""
    return ["vqgan", "image-tokenizer", "discrete", type(tokenizer.quantizer).__name__.lower()]


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
