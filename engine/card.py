"""The run card: a page of Markdown on what was run, on what, how fast and how good, and the command to run it again."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from codegrid.engine.aliases import upgrade_config
from codegrid.engine.folder import CARD, CONFIG, DOCTOR, PICTURES, RECORD
from codegrid.engine.templates import render_template
from codegrid.engine.trust import format_trust

CARD_TEMPLATE = Path(__file__).with_name("card.md.j2")

CARD_SETTINGS = (  # the settings on a card, as far as a run has them; config.yaml has all
    "ckpt", "decoder", "init", "learn", "lora", "codes", "seed", "data._target_", "data.root", "data.image_size", "data.crop",
    "data.flip", "model.grid", "model.tokens", "model.nested", "model.width", "model.start", "quantizer._target_", "quantizer.K",
    "quantizer.num_codebooks", "quantizer.nested", "quantizer.dim", "loss.discriminator._target_", "loss.perceptual._target_",
    "loss.gate.start", "loss.freeze_codes", "prior._target_", "prior.width", "prior.depth", "prior.inputs",
    "prior.head._target_", "conditional", "condition", "flip", "crops", "sampler.temperature", "sampler.top_k", "sampler.top_p",
    "sampler.min_p", "sampler.guidance", "sampler.steps", "sampler.order", "sampler.corrector", "sampler.remask", "split", "n",
    "optimizer._target_", "optimizer.lr", "optimizer.matrix_lr", "data.batch_size", "batch_size", "trainer.accumulate",
    "trainer.compile",
    "trainer.checkpoint_activations", "sampler.compile", "sampler.parallel", "trainer.max_steps", "trainer.max_minutes",
    "callbacks.average.decay",
)  # fmt: skip

CARD_VERSIONS = (
    "codegrid",
    "python",
    "torch",
    "torchvision",
    "lightning",
    "hydra-core",
    "wandb",
    "torchmetrics",
)

# Figures that say how fast and how large a run was, with their units. All other numbers, except MACHINE_FIGURES, are scores.
SPEED_UNITS = {
    "seconds": "s of training",
    "steps": "updates",
    "images_per_second": "images a second",
    "memory_gib": "GiB at most",
    "parameters": "weights that are trained and used",
}

# Figures that say what a run stands on, or what it has read.
ORIGIN = (
    "tokenizer_of", "of", "of_stage", "format", "origin", "sha256", "licence", "code_grid", "left_out",
)  # fmt: skip

MACHINE_FIGURES = ("device", "devices", "precision")


def write_card(folder: Path, figures: Mapping[str, Any], outcome: str) -> Path:
    """Write card.md of a run folder from its config.yaml, record.jsonl, doctor.txt and pictures.

    `figures` are those known so far, `outcome` is how the run ended.
    """
    written = OmegaConf.to_container(OmegaConf.load(folder / CONFIG), resolve=True)
    config: dict[str, Any] = upgrade_config(written)
    starts = [json.loads(line) for line in (folder / RECORD).read_text().splitlines()]
    revision = starts[0].get("git") or ""
    origin = {name: figures[name] for name in ORIGIN if figures.get(name)}
    text = render_template(
        CARD_TEMPLATE,
        escape=False,
        title=folder.name,
        stage=config["stage"],
        id=config.get("id"),
        outcome=outcome,
        starts=[
            {"time": format_start_time(start), "command": display_command(start["command"])}
            for start in starts
        ],
        revision=revision.removesuffix("-dirty"),
        uncommitted=revision.endswith("-dirty"),
        sweep=starts[0].get("sweep"),
        settings=main_settings(config) | origin | own_classes(config) | describe_images(starts[0]),
        machine=describe_machine(starts[-1], figures),
        speed={
            name: f"{format_value(figures[name])} {unit}"
            for name, unit in SPEED_UNITS.items()
            if name in figures
        },
        scores={
            name: format_value(value)
            for name, value in figures.items()
            if is_score(name, value) and config.get(name) != value
        },
        absent=figures.get("absent") or {},
        odd=(starts[0].get("data") or {}).get("odd", []),
        remarks=figures.get("remarks") or [],
        alarms=figures["alarms"] if "alarms" in figures else read_alarms(folder),
        pictures=link_pictures(folder, figures),
        series=[
            file.relative_to(folder).as_posix()
            for file in sorted((folder / "csv").glob("version_*/metrics.csv"))
        ],
    )
    file = folder / CARD
    file.write_text(text)
    return file


def read_alarms(folder: Path) -> list[str]:
    """The alarms that the doctor wrote to the run folder."""
    file = folder / DOCTOR
    return file.read_text().splitlines() if file.exists() else []


def display_command(command: str) -> str:
    """A recorded command as a user types it, without the path of the program."""
    program = re.match(r"""('[^']*'|"[^"]*"|\S)+""", command)
    assert program
    name = Path(shlex.split(program[0])[0]).name
    start = ["python", name] if name.endswith(".py") else [name]
    return f"{shlex.join(start)}{command[program.end() :]}"


def format_start_time(start: Mapping[str, Any]) -> str:
    return str(start["time"]).replace("T", " ")


def main_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The main settings; a class is shown by its name."""
    settings = {}
    for key in CARD_SETTINGS:
        value = select(config, key)
        if value is not None:
            text = str(value).rpartition(".")[2] if key.endswith("_target_") else str(value)
            settings[key.removesuffix("._target_")] = text
    if "model.tokens" in settings:  # which replace the grid
        settings.pop("model.grid", None)
    return settings


def own_classes(config: Mapping[str, Any]) -> dict[str, str]:
    """The classes of other packages that later stages have to be told to trust."""
    names = config.get("trust")
    return {"own classes": f"later stages need {format_trust(names)}"} if names else {}


def select(config: Any, key: str) -> Any:
    """The value at a dotted key; None if the config doesn't have it."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def describe_images(start: Mapping[str, Any]) -> dict[str, str]:
    """What the record says about the images."""
    data = start.get("data")
    if not data:
        return {}
    images = f"{data['title']}, {data['train']:,} to train on and {data['val']:,} to validate, hash {data['hash']}"
    return {"images": images, **data.get("summary", {})}


def format_summary(data: Mapping[str, Any]) -> str:
    """What a run's data are, as lines for the terminal: their summary and what is odd about them."""
    lines = [
        f"{data['title']}: {data['train']:,} images to train on and {data['val']:,} to validate",
        *(f"  {name:10}{text}" for name, text in data["summary"].items()),
        *(f"  odd: {sentence}" for sentence in data["odd"]),
    ]
    return "\n".join(lines)


def describe_machine(start: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
    """The hardware that was used, and the versions of libraries."""
    cpu = start.get("processor") or start["device"]
    counts = (("cores", "cores"), ("threads", "threads"), ("memory_gib", "GiB"))
    known = [f"{start[name]} {unit}" for name, unit in counts if start.get(name) is not None]
    rows = {"processor": ", ".join([cpu, *known])}
    if start["device"] != cpu and figures.get("device") != "cpu":
        rows["GPU"] = start["device"]
    rows |= {name: format_value(figures[name]) for name in MACHINE_FIGURES if name in figures}
    versions = [f"{name} {start[name]}" for name in CARD_VERSIONS if start.get(name)]
    return rows | {"versions": ", ".join(versions)}


def is_score(name: str, value: Any) -> bool:
    """Whether a figure says how good a run is."""
    return isinstance(value, int | float) and name not in (*SPEED_UNITS, *MACHINE_FIGURES)


def link_pictures(folder: Path, figures: Mapping[str, Any]) -> dict[str, str]:
    """Name -> link of the pictures that the figures name, or else of the last one of each kind in the folder."""
    files = [
        Path(file) for file in figures.get("pictures", sorted((folder / PICTURES).glob("*.png")))
    ]
    return {
        re.sub(r"-\d+$", "", file.stem): Path(os.path.relpath(file, folder)).as_posix()
        for file in files
        if file.exists()
    }


def format_value(value: Any) -> str:
    """A figure with four significant digits, or as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
