"""Where the defaults are: conf/, their one home."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

CONF = Path(__file__).parents[1] / "conf"


@cache
def read_defaults(name: str) -> Mapping[str, Any]:
    """The settings in a file of conf/, such as sampler/default, without those of the files that it names; Hydra is not needed."""
    settings = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=False)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}
