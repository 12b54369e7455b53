"""Codegrid: tokenizers and priors for discrete image models.

python train.py stage=vqgan quantizer.K=512
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine.aliases import rename_words
from engine.cli import explain_error
from engine.errors import InputError
from engine.sweep import INTERRUPTED, TERMINATED, run_point


def run(config: DictConfig) -> dict[str, Any] | None:
    """Call the function that conf/stage names and print its result."""
    if "run" not in config:
        raise InputError(
            "no stage is chosen; say stage=vqgan, extract, prior, sample, evaluate, report or pipeline, or see --help"
        )
    if not isinstance(config.seed, int) or not 0 <= config.seed < 2**32:
        raise InputError(f"seed={config.seed} must be a whole number from 0 to 4294967295")
    result: dict[str, Any] | None = hydra.utils.get_method(config.run)(config)
    if result is not None:  # of several processes the first one reports
        print(json.dumps(result), flush=True)
    return result


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(config: DictConfig) -> float | None:
    """A run, or one of a sweep's; what a person got wrong is one sentence."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_point(run, config)
    try:
        run(config)
    except SystemExit as stop:  # Lightning's answer to SIGTERM has no code
        raise SystemExit(TERMINATED if stop.code is None else stop.code) from stop
    except Exception as error:
        sentence = explain_error(error)
        if sentence is None:
            raise
        from engine.distributed import (
            report_mistake,  # here, for it imports torch, which a command that only asks for help can do without
        )

        report_mistake(sentence)
        sys.exit(2)
    return None


def settings() -> list[str]:
    """All that this command's stage can be told: groups and keys, for a suggestion; none where its choices don't go together."""
    conf = Path(__file__).parent / "conf"
    words = [word for word in sys.argv[1:] if "=" in word and "," not in word]
    chosen = [word for word in words if (conf / word.split("=")[0]).is_dir()]
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            config = OmegaConf.to_container(hydra.compose("config", chosen))
    except ConfigCompositionException:
        return []

    def keys(node: object, prefix: str = "") -> list[str]:
        items = node.items() if isinstance(node, dict) else []
        return [
            found
            for name, value in items
            for found in (f"{prefix}{name}", *keys(value, f"{prefix}{name}."))
        ]

    return keys(config)


def main() -> None:
    """The command: mistakes of the person get one sentence and exit code 2, mistakes of ours their traceback."""
    sys.argv[1:], renamed = rename_words(sys.argv[1:])
    for sentence in renamed:
        print(sentence, file=sys.stderr)
    os.environ.setdefault(
        "HYDRA_FULL_ERROR", "1"
    )  # exceptions arrive here whole, not printed by Hydra
    try:
        job()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        sentence = explain_error(error, settings)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
