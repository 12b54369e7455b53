"""All files of an export, in the order in which they can be written: weights, facts, checks, the card, the command's record."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codegrid.data.pixels import RULE_SETTINGS, PixelRules
from codegrid.engine.folder import CONFIG, METRICS, write_config, write_metrics
from codegrid.engine.sizes import check_size, to_setting
from codegrid.engine.version import FORMAT, STAMP, VERSION
from vqgan.export.base import Exporter, make_examples, serves_any_size, to_json
from vqgan.export.card import PICTURES_FOLDER, README, write_readme
from vqgan.export.folder import explain_refusal, hide_folder, publish, write_files
from vqgan.export.origin import Origin
from vqgan.formats.codegrid import CLASS_NAME, FACTS, READING
from vqgan.tokenizer import Tokenizer

PREPROCESSOR = "preprocessor_config.json"
UNLISTED = (README, CONFIG, METRICS)  # a card is edited; the others are this command's own record


def write_export(
    tokenizer: Tokenizer,
    origin: Origin,
    exporters: Sequence[Exporter],
    licence: str | None,
    target: Path,
    config: str,
    hub: str | None = None,
) -> dict[str, Any]:
    """Write a tokenizer as `target`, whole or not at all; the figures of the export. `config` is the text of its config.yaml, `hub`
    the repository to which it will be pushed."""
    settings = {group: origin.config[group] for group in ("model", "quantizer")}
    examples = make_examples(tokenizer)
    with hide_folder(target) as hidden:
        for exporter in exporters:
            write_files(hidden, target, exporter.encode_files(tokenizer))
        facts = describe_tokenizer(tokenizer, origin, settings)
        for exporter in exporters:
            facts |= exporter.describe(tokenizer)
        preprocessor = describe_images_for(tokenizer, origin.config["data"])
        write_files(hidden, target, {FACTS: to_json(facts), PREPROCESSOR: to_json(preprocessor)})
        checks = {each.name: each.verify(tokenizer, hidden, examples) for each in exporters}
        readme = write_readme(tokenizer, origin, exporters, checks, licence, target.name, hub)
        pictures = {
            f"{PICTURES_FOLDER}/{file.name}": file.read_bytes() for file in origin.pictures.values()
        }
        write_files(hidden, target, {README: readme.encode(), **pictures})
        result = {
            "run": str(target),
            "of": origin.config.get("id"),
            "of_stage": origin.stage,
            "formats": [exporter.name for exporter in exporters],
            "checks": checks,
            "bytes": sum(file.stat().st_size for file in hidden.rglob("*") if file.is_file()),
        }
        with explain_refusal(target):
            write_config(hidden, config)
            write_metrics(hidden, result)
        publish(hidden, target, UNLISTED)
    return result


def describe_tokenizer(
    tokenizer: Tokenizer, origin: Origin, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a program has to know of a tokenizer, and the settings from which this one builds it again."""
    return {
        "_class_name": CLASS_NAME,
        STAMP: {"version": VERSION, "format": FORMAT},
        "id": origin.config.get("id"),
        "image_size": to_setting(tokenizer.encoder.image_size),
        "channels": tokenizer.encoder.channels,
        "any_size": serves_any_size(tokenizer),
        "grid": list(tokenizer.grid),
        "f": tokenizer.f if tokenizer.is_spatial else None,
        "K": tokenizer.K,
        "num_codebooks": tokenizer.num_codebooks,
        "dim": tokenizer.dim,
        READING: {name: origin.config["data"].get(name) for name in (*RULE_SETTINGS, "fit")},
        **settings,
    }


def describe_images_for(tokenizer: Tokenizer, data: Mapping[str, Any]) -> dict[str, Any]:
    """How a picture becomes the tokenizer's input, in the words of the hub's image processors.

    These have none for the middle of a rectangle: `fit` says how images of other proportions get the size.
    """
    (height, width), channels = tokenizer.encoder.image_size, tokenizer.encoder.channels
    crops = tokenizer.fit == "crop" and height == width
    is_random = data.get("crop") == "random"  # the centre of a somewhat larger picture then
    stored = data.get("resize") or (round(height * 9 / 8) if is_random else height)
    edge = min(check_size("data.resize", stored, "pixel"))
    return {
        "size": {"shortest_edge": edge} if crops else {"height": height, "width": width},
        "fit": tokenizer.fit,
        "crop_size": {"height": height, "width": width},
        "channels": channels,
        "range": [-1, 1],
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "resample": 3,  # bicubic, as Pillow numbers it
        "do_center_crop": crops,
        **describe_units(tokenizer.rules, channels),
    }


def describe_units(rules: PixelRules, channels: int) -> dict[str, Any]:
    """How values in the units of the data become [-1, 1]: 8-bit pixels by way of [0, 1], others at once."""
    if rules.is_plain:
        mean, std = [0.5] * channels, [0.5] * channels
    else:
        ranges = rules.ranges * channels if len(rules.ranges) == 1 else rules.ranges
        mean = [(low + high) / 2 for low, high in ranges]
        std = [(high - low) / 2 for low, high in ranges]
    return {
        "do_rescale": rules.is_plain,
        "rescale_factor": 1 / 255 if rules.is_plain else 1,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
