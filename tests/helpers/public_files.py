"""Public tokenizers of tests/fixtures/public as formats get them, the arrays of their own code, and published names."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from vqgan.formats.base import PublicFile

PUBLIC = Path(__file__).parents[1] / "fixtures" / "public"
PREFIX = "first_stage_model."


class Inert:
    """Stands for a class that an old checkpoint names."""


def read_public(name: str, averaged: bool = False) -> PublicFile:
    """The tokenizer of a Lightning checkpoint, such as taming_vq/last, and what the YAML beside it says of it."""
    path = PUBLIC / f"{name}.ckpt"
    callback = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    with torch.serialization.safe_globals([(Inert, callback)]):
        state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    copies = {key.removeprefix("model_ema."): key for key in state if key.startswith("model_ema.")}
    if any(key.startswith(PREFIX) for key in state):
        state = {
            key.removeprefix(PREFIX): value
            for key, value in state.items()
            if key.startswith(PREFIX)
        }
    tensors = {
        key: value for key, value in state.items() if not key.startswith(("loss.", "model_ema."))
    }
    both = {key: copies[key.replace(".", "")] for key in tensors if key.replace(".", "") in copies}
    if averaged:
        tensors |= {key: state[copy] for key, copy in both.items()}
    described: Any = OmegaConf.to_container(OmegaConf.load(path.with_suffix(".yaml")))
    model = described["model"]
    params = model.get("params") or model["init_args"]
    model = params.get("first_stage_config", model)
    settings = model.get("params") or model["init_args"]
    target = model.get("target") or model["class_path"]
    return PublicFile(path.name, tensors, settings, target, frozenset(both))


def read_reference(name: str) -> dict[str, Tensor]:
    """The arrays that a fixture's own code made."""
    arrays = np.load(PUBLIC / f"{name}.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@cache
def published_names() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of the weights of published models, by model."""
    with gzip.open(PUBLIC / "published-names.json.gz") as file:
        names: dict[str, dict[str, list[int]]] = json.load(file)
    return names
