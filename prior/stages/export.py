"""stage=export: a prior with its tokenizer, or a tokenizer by itself, as a folder for other programs, and on the hub."""

from typing import Any

from omegaconf import DictConfig

from codegrid.engine.checkpoint import read_checkpoint
from prior.export.joined import join_prior, read_prior_origin
from prior.load import load_prior
from vqgan.export.discover import choose_exporters
from vqgan.stages.export import export_tokenizer, write_folder, write_tokenizer


def export_model(config: DictConfig) -> dict[str, Any]:
    """Write the model that `ckpt` names in one or several formats, as export_tokenizer does, which pushes it too."""
    return export_tokenizer(config, write_model)


def write_model(config: DictConfig) -> dict[str, Any]:
    """The folder of a tokenizer, or of a prior with its tokenizer; the figures of the export."""
    exporters = choose_exporters(config.format)
    if read_checkpoint(config.ckpt, "vqgan", "prior")["codegrid"]["stage"] == "vqgan":
        return write_tokenizer(config)
    trained = load_prior(config.ckpt)
    origin = read_prior_origin(config.ckpt, trained)
    return write_folder(config, join_prior(exporters, trained), trained.tokenizer, origin)
