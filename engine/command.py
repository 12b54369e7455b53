"""The command of every stage: composes the config, calls the function that conf/stage names, prints its result."""

from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from codegrid.engine.cli import check_seed, import_stage, run_command, run_single
from codegrid.engine.figures import format_figures
from codegrid.engine.sweep import run_point
from codegrid.engine.words import CONF


def run_stage(config: DictConfig) -> dict[str, Any] | None:
    """Call the function that conf/stage names; its result, which only the main process returns."""
    check_seed(config.seed)
    stage = import_stage(config.get("run"))
    result: dict[str, Any] | None = stage(config)
    return result


def print_stage(config: DictConfig) -> dict[str, Any] | None:
    """Run a stage and print its result as a line of JSON."""
    result = run_stage(config)
    if result is not None:
        print(format_figures(result), flush=True)
    return result


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run_job(config: DictConfig) -> float | None:
    """A single run, or one point of a sweep."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_point(print_stage, config)
    return run_single(print_stage, config)


def main() -> None:
    """`python train.py ...` and `codegrid ...`."""
    run_command(run_job)
