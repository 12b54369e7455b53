"""Configs as Hydra composes them."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parents[2]


def compose_config(*overrides: str) -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


SMALL = [
    "stage=vqgan",
    "data.image_size=16",
    "model.grid=4",
    "model.width=8",
    "quantizer.K=16",
    "quantizer.dim=8",
]
