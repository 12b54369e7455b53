"""Image datasets for tests: a test names the settings that it is about, and conf/ gives the others.

data = make_images(Shapes, n_train=64, n_val=16, cache_dir=str(tmp_path))
"""

import inspect
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any, TypeVar

from omegaconf import OmegaConf

from codegrid.data.datamodule import ImageDataModule
from tests.helpers.configs import ROOT
from tests.helpers.parts import defaults_by_target

Images = TypeVar("Images", bound=ImageDataModule)


def image_settings(**settings: Any) -> dict[str, Any]:
    """The settings of ImageDataModule: those of conf/images/default.yaml, unless they are passed."""
    return {**deepcopy(_read_defaults()), **settings}


def make_images(kind: Callable[..., Images], *args: Any, **settings: Any) -> Images:
    """`kind(*args, **settings)` with the settings of its file in conf/data for those that are not passed."""
    passed = inspect.signature(kind).bind_partial(*args).arguments
    name = f"{kind.__module__}.{kind.__qualname__}"
    defaults = {k: v for k, v in defaults_by_target()[name].items() if k not in passed}
    return kind(*args, **image_settings(**{**defaults, **settings}))


@cache
def _read_defaults() -> dict[str, Any]:
    """Both files are read once per process: hundreds of tests make images."""
    config = OmegaConf.load(ROOT / "conf" / "config.yaml")
    shared = OmegaConf.load(ROOT / "conf" / "images" / "default.yaml")
    shared.update(seed=config.seed, cache_dir=config.cache_dir)
    defaults: Any = OmegaConf.to_container(shared)
    return dict(defaults)
