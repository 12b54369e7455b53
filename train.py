"""Codegrid: tokenizers and priors for discrete image models.

python train.py stage=vqgan quantizer.K=512
"""

import json
import os
import re
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from data.errors import InputError, explain

_failed: list[Exception] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(config: DictConfig) -> None:
    """Call the function that conf/stage names and print its result; in a sweep one job's mistake doesn't end the others."""
    try:
        if "run" not in config:
            raise InputError("no stage is chosen; say stage=vqgan, extract, prior, sample, evaluate or report, or see --help")
        result = hydra.utils.get_method(config.run)(config)
        if result is not None:  # of several processes the first one reports
            print(json.dumps(result), flush=True)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        _failed.append(error)


def swept(overrides: str) -> str:
    """What tells the points of a sweep apart, for their folders' names: "_key-value" of all keys given several values."""
    several = {word.split("=")[0] for word in sys.argv[1:] if re.search(r"=.*[,(]", word)}
    told = [pair for pair in overrides.split(",") if pair.split("=")[0] in several]
    return "".join("_" + re.sub(r"[^\w.+-]", "-", pair) for pair in told)[:120]


OmegaConf.register_new_resolver("swept", swept, replace=True)


def settings() -> list[str]:
    """All that this command's stage can be told: groups and keys, for a suggestion."""
    conf = Path(__file__).parent / "conf"
    stage = [word for word in sys.argv[1:] if word.startswith("stage=")]
    with hydra.initialize_config_dir(str(conf), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("config", stage))

    def keys(node: object, prefix: str = "") -> list[str]:
        items = node.items() if isinstance(node, dict) else []
        return [found for name, value in items for found in (f"{prefix}{name}", *keys(value, f"{prefix}{name}."))]

    return keys(config)


def main() -> None:
    """The command: mistakes of the person get one sentence and an exit code above 0, mistakes of ours their traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions arrive here whole, not printed by Hydra
    try:
        job()
    except Exception as error:
        sentence = explain(error, settings)
        if sentence is None:
            raise
        sys.exit(sentence)
    if _failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
