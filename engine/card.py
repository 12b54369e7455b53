"""The run card: what was run, on what, how fast and how good, beside its pictures, and the command to run it again."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from engine.aliases import upgrade_config

CARD = "card.md"

CHOICES = (  # the settings that a card names, where a run has them; config.yaml has all
    "ckpt", "seed", "data._target_", "data.root", "data.image_size", "data.crop", "data.flip", "model.grid", "model.width",
    "model.start", "quantizer._target_", "quantizer.K", "quantizer.num_codebooks", "quantizer.dim", "loss.discriminator._target_",
    "loss.perceptual._target_", "loss.gate.start", "loss.freeze_codes", "prior._target_", "prior.width", "prior.depth",
    "prior.inputs", "conditional", "flip", "crops", "sampler.temperature", "sampler.top_k", "sampler.top_p", "sampler.min_p",
    "sampler.guidance", "split", "n", "optimizer._target_", "optimizer.lr", "data.batch_size", "batch_size",
    "trainer.accumulate", "trainer.compile", "sampler.compile", "trainer.max_steps", "trainer.max_minutes",
    "callbacks.average.decay",
)  # fmt: skip

VERSIONS = ("python", "torch", "torchvision", "lightning", "hydra-core", "wandb", "torchmetrics")

SPEED = {  # what says how fast a run was, and its unit; what else is a number says how good
    "seconds": "s of training",
    "steps": "updates",
    "images_per_second": "images a second",
    "memory_gib": "GiB at most",
    "parameters": "weights that are trained and used",
}

MACHINE = ("device", "devices", "precision")


def write_card(folder: Path, figures: Mapping[str, Any], outcome: str) -> Path:
    """card.md of a run folder, from its config.yaml, record.jsonl, doctor.txt and pictures, and from the `figures` that are
    known by now; `outcome` is how the run ended."""
    config = upgrade_config(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, DictConfig)
    starts = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    told = folder / "doctor.txt"
    alarms = (
        figures["alarms"]
        if "alarms" in figures
        else told.read_text().splitlines()
        if told.exists()
        else []
    )
    named = f", run `{config.id}`" if config.get("id") else ""
    of = {name: figures[name] for name in ("tokenizer_of", "of", "of_stage") if figures.get(name)}
    scores = {
        name: format_value(value)
        for name, value in figures.items()
        if is_score(name, value) and config.get(name) != value
    }
    parts = [
        f"# {folder.name}",
        f"stage={config.stage}{named}, started {format_start_time(starts[0])}: **{outcome}**.",
        "## Run it again\n\n" + rerun_commands(starts),
        "## What\n\n" + markdown_table(main_settings(config) | of | describe_images(starts[0])),
        "## On what\n\n" + markdown_table(describe_machine(starts[-1], figures)),
        "## How fast\n\n"
        + markdown_table(
            {
                name: f"{format_value(figures[name])} {unit}"
                for name, unit in SPEED.items()
                if name in figures
            }
        ),
        "## How good\n\n" + markdown_table(scores),
        absent_scores(figures),
        "\n".join(f"* doctor: {alarm}" for alarm in alarms),
        "## Pictures\n\n"
        + "\n\n".join(
            f"**{name}**\n\n![{name}]({link})"
            for name, link in link_pictures(folder, figures).items()
        ),
        f"All settings are in [config.yaml](config.yaml), all starts in [record.jsonl](record.jsonl){link_series(folder)}.",
    ]
    file = folder / CARD
    full = [part for part in parts if part and not part.endswith("\n\n")]  # no heading over nothing
    file.write_text("\n\n".join(full) + "\n")
    return file


def rerun_commands(starts: list[dict[str, Any]]) -> str:
    """The commands that repeat a run: its revision and its first start; then how it was resumed, and the sweep it is of."""
    first, git = starts[0], starts[0].get("git") or ""
    lines = [f"git checkout {git.removesuffix('-dirty')}"] if git else []
    words = ["```\n" + "\n".join([*lines, as_typed(first["command"])]) + "\n```"]
    if git.endswith("-dirty"):
        words.append("The revision had changes that were not committed.")
    if first.get("sweep"):
        words.append(f"It is a point of the sweep `{first['sweep']}`.")
    words += [
        f"Resumed {format_start_time(start)} with `{as_typed(start['command'])}`."
        for start in starts[1:]
    ]
    return "\n\n".join(words)


def as_typed(command: str) -> str:
    """A command as a person types it, wherever the program lies."""
    found = re.match(r"'([^']*)'|\S+", command)
    assert found
    name = Path(found[1] or found[0]).name
    return f"{'python ' if name.endswith('.py') else ''}{name}{command[found.end() :]}"


def format_start_time(start: dict[str, Any]) -> str:
    return str(start["time"]).replace("T", " ")


def main_settings(config: DictConfig) -> dict[str, str]:
    """The main settings, a class by its name."""
    found = {key: OmegaConf.select(config, key) for key in CHOICES}
    return {
        key.removesuffix("._target_"): str(value).rpartition(".")[2]
        if key.endswith("_target_")
        else str(value)
        for key, value in found.items()
        if value is not None
    }


def describe_images(start: dict[str, Any]) -> dict[str, str]:
    """What the record says of the images."""
    data = start.get("data")
    if not data:
        return {}
    return {
        "images": f"{data['title']}, {data['train']:,} to train on and {data['val']:,} to validate, hash {data['hash']}"
    }


def describe_machine(start: dict[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
    """The hardware that was used, and the versions."""
    cpu = start.get("processor") or start["device"]
    processor = f"{cpu}, {start['cores']} cores, {start['threads']} threads"
    memory = f", {start['memory_gib']} GiB" if "memory_gib" in start else ""
    found = {"processor": processor + memory}
    if start["device"] != cpu and figures.get("device") != "cpu":
        found["GPU"] = start["device"]
    found |= {name: format_value(figures[name]) for name in MACHINE if name in figures}
    return found | {
        "versions": ", ".join(f"{name} {start[name]}" for name in VERSIONS if name in start)
    }


def is_score(name: str, value: Any) -> bool:
    """Whether a figure says how good a run is."""
    return isinstance(value, int | float) and name not in (*SPEED, *MACHINE)


def absent_scores(figures: Mapping[str, Any]) -> str:
    """Why a score is missing."""
    return "\n".join(
        f"* {name} is absent: {reason}" for name, reason in (figures.get("absent") or {}).items()
    )


def link_pictures(folder: Path, figures: Mapping[str, Any]) -> dict[str, str]:
    """Name -> link of the pictures that the figures name, or else of the last of each kind that there is."""
    files = [
        Path(file) for file in figures.get("pictures", sorted((folder / "pictures").glob("*.png")))
    ]
    return {
        re.sub(r"-\d+$", "", file.stem): Path(os.path.relpath(file, folder)).as_posix()
        for file in files
        if file.exists()
    }


def link_series(folder: Path) -> str:
    """The sentence's end that says where the series are."""
    files = sorted((folder / "csv").glob("version_*/metrics.csv"))
    links = [
        f"[{file.relative_to(folder).as_posix()}]({file.relative_to(folder).as_posix()})"
        for file in files
    ]
    return f", the series in {', '.join(links)}" if links else ""


def markdown_table(rows: Mapping[str, str]) -> str:
    """Two columns of Markdown; nothing where there are no rows."""
    lines = [
        f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()
    ]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def format_value(value: Any) -> str:
    """A figure as a person reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
