"""Codegrid: tokenizers and priors for discrete image models.

python train.py stage=vqgan quantizer.K=512
"""

from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from codegrid.engine.cli import check_seed, import_stage, run_command, run_single
from codegrid.engine.figures import format_figures
from codegrid.engine.sweep import run_point


def run(config: DictConfig) -> dict[str, Any] | None:
    """Call the function that conf/stage names and print its result, which only the main process returns."""
    check_seed(config.seed)
    stage = import_stage(config.get("run"))
    result: dict[str, Any] | None = stage(config)
    if result is not None:
        print(format_figures(result), flush=True)
    return result


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(config: DictConfig) -> float | None:
    """A single run, or one point of a sweep."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_point(run, config)
    return run_single(run, config)


def main() -> None:
    run_command(job)


if __name__ == "__main__":
    main()
