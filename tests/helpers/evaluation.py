"""The settings of stage=evaluate for tests that build a judge themselves."""

from functools import cache
from typing import Any

import torch
from omegaconf import OmegaConf

from codegrid.evaluation.settings import EvaluationSettings
from tests.helpers.configs import ROOT

# Whatever takes long, or needs files that a machine may lack, is off.
SMALL_EVALUATION = {
    "ckpt": "runs/x", "id": None, "seed": 0, "inception": False, "proxy": 0, "lpips": None, "fetch": False,
    "ratios": False, "samples": 0, "neighbours": False, "validity": 0, "show": 3,
    "batch_size": 5,
    "perturb": 0, "probe": 0,
}  # fmt: skip


@cache
def read_defaults() -> dict[str, Any]:
    """The settings as conf/stage/evaluate.yaml has them."""
    plain: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "stage" / "evaluate.yaml"))
    return dict(plain)


def choose_settings(**changed: Any) -> EvaluationSettings:
    """The settings of a small evaluation on the CPU, and what is `changed` of them."""
    return EvaluationSettings.read(
        {**read_defaults(), **SMALL_EVALUATION, **changed}, torch.device("cpu")
    )
