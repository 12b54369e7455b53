"""format=safetensors: a prior's weights and settings, from which Prior.from_pretrained builds it again."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from codegrid.engine.errors import InputError
from codegrid.engine.version import FORMAT, STAMP, VERSION
from prior.export.base import PriorFormat
from prior.prior import Prior
from vqgan.export.base import to_json

PRIOR_FACTS = "prior/config.json"
PRIOR_CLASS = "CodegridPrior"  # in prior/config.json
PRIOR_WEIGHTS = "prior/model.safetensors"


class SafetensorsPrior(PriorFormat):
    name = "safetensors"

    def check(self, trained: Prior) -> None:
        """Every prior is weights and settings."""

    def encode_files(self, trained: Prior) -> dict[str, bytes]:
        tensors = {
            name: value.cpu().contiguous().clone()
            for name, value in trained.model.state_dict().items()
        }
        return {
            PRIOR_WEIGHTS: save(tensors, {"format": "pt"}),
            PRIOR_FACTS: to_json(describe_prior(trained)),
        }

    def verify(self, trained: Prior, folder: Path) -> dict[str, Any]:
        weights, expected = load_file(folder / PRIOR_WEIGHTS), trained.model.state_dict()
        different = [
            name
            for name, value in expected.items()
            if name not in weights or not torch.equal(weights[name], value.cpu())
        ]
        if different or len(weights) != len(expected):
            names = ", ".join(different[:10])
            raise InputError(
                f"{folder / PRIOR_WEIGHTS} was written and read back with other weights: {names}; leave safetensors out of format"
            )
        return {"equal_weights": len(expected)}

    def describe_use(self, trained: Prior) -> str:
        return f"`{PRIOR_WEIGHTS}` has the weights of the prior, and `{PRIOR_FACTS}` its settings."


def describe_prior(trained: Prior) -> dict[str, Any]:
    """What a prior is built from besides its weights and its tokenizer."""
    return {
        "_class_name": PRIOR_CLASS,
        STAMP: {"version": VERSION, "format": FORMAT},
        "id": trained.config.get("id"),
        "tokenizer": trained.tokenizer.fingerprint(),
        "tokenizer_of": trained.tokenizer_of,
        "classes": len(trained.classes),
        "class_names": trained.classes.names,
        "class_labels": trained.classes.labels,
        **({} if trained.condition is None else {"condition": trained.condition.describe()}),
        "prior": trained.config["prior"],
    }
