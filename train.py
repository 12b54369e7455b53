"""Codegrid: tokenizers and priors for discrete image models.

python train.py stage=vqgan quantizer.K=512
"""

import json
import os
import sys

import hydra
from omegaconf import DictConfig

from data.errors import InputError, explain

_failed: list[Exception] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(config: DictConfig) -> None:
    """Call the function that conf/stage names and print its result; in a sweep a job's mistake doesn't end the others."""
    try:
        if "run" not in config:
            raise InputError("no stage is chosen; say stage=vqgan, stage=prior or stage=sample, or see --help")
        print(json.dumps(hydra.utils.get_method(config.run)(config)), flush=True)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        _failed.append(error)


def main() -> None:
    """The command: mistakes of the person get one sentence and exit code 2, mistakes of ours their traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # exceptions arrive here whole, not printed by Hydra
    try:
        job()
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        sys.exit(sentence)
    if _failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
