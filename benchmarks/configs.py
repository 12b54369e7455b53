"""Hydra's configs for benchmarks that build parts of the program in their own process."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

CONF = Path(__file__).parents[1] / "conf"


def compose_config(*words: str) -> Any:
    """The config of `python train.py <words>`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(words))
