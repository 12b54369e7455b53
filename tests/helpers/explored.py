"""Pages of stage=explore of small models, with the real onnxruntime-web."""

from pathlib import Path

import pytest

from codegrid.engine.errors import InputError
from prior.exploring.runtime import load_runtime
from prior.stages.explore import PAGE, explore_model
from tests.helpers.configs import ROOT, compose_config

CACHE = ROOT / "cache"  # kept between runs of the tests: the runtime is downloaded once


def require_runtime() -> None:
    """Skips the test where onnxruntime-web is neither cached nor to be had."""
    try:
        load_runtime(None, CACHE)
    except InputError as error:
        pytest.skip(str(error))


def explore_run(run: Path, folder: Path, *words: str) -> Path:
    """The page of a run, written to `folder` by the stage itself."""
    require_runtime()
    settings = [f"ckpt={run}", f"run_dir={folder}", f"cache_dir={CACHE}", "accelerator=cpu"]
    explore_model(compose_config("stage=explore", *settings, "pictures=4", "shown=8", *words))
    return folder / PAGE
