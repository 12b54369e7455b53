"""What is known of the run that an exported tokenizer comes from: its settings, record, figures and pictures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from codegrid.engine.card import link_pictures
from codegrid.engine.checkpoint import find_checkpoint
from codegrid.engine.folder import CONFIG, METRICS, RECORD
from codegrid.engine.sweep import read_metrics


@dataclass(frozen=True)
class Origin:
    """A run of stage=vqgan.

    name        of its folder
    config      from the checkpoint
    start       the first line of its record.jsonl: command, revision, machine, data; empty without a run folder
    figures     of metrics.json; empty for a run that is not finished
    pictures    name -> file
    """

    name: str
    config: Mapping[str, Any]
    start: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, ckpt: str | Path, config: Mapping[str, Any]) -> "Origin":
        """The run of a checkpoint with this config; without the files of its folder where the checkpoint lies elsewhere."""
        file = find_checkpoint(ckpt)
        folder = file.parent.parent
        if not is_folder_of(folder, config.get("id")):
            return cls(
                file.parent.name if Path(ckpt).is_file() else Path(ckpt).resolve().name, config
            )
        lines = (folder / RECORD).read_text(errors="replace").splitlines()
        figures = read_metrics(folder) if (folder / METRICS).is_file() else {}
        pictures = {name: folder / link for name, link in link_pictures(folder, figures).items()}
        return cls(folder.resolve().name, config, json.loads(lines[0]), figures, pictures)

    @property
    def licence(self) -> str | None:
        """The licence of imported weights, as far as their file or model card names one."""
        licence = self.figures.get("licence")
        return None if licence is None else str(licence)


def is_folder_of(folder: Path, run_id: Any) -> bool:
    """Whether a folder is that of the run with this id, and not merely above a checkpoint that was copied."""
    config, record = folder / CONFIG, folder / RECORD
    if not (config.is_file() and record.is_file() and record.stat().st_size):
        return False
    return bool(OmegaConf.select(OmegaConf.load(config), "id") == run_id)
