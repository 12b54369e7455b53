"""stage=export: a tokenizer, or a prior with its tokenizer, as a folder for other programs, and on the hub."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from codegrid.engine.checkpoint import read_checkpoint
from codegrid.engine.errors import InputError
from codegrid.engine.run import Run
from prior.export.joined import join_prior, read_prior_origin
from prior.load import load_prior, refuse_decoder
from vqgan.export.discover import choose_exporters
from vqgan.export.push import Destination, Push, read_export
from vqgan.stages.export import export_tokenizer, write_folder

EXPORTED = "the tokenizer to export; add ckpt=<run folder of stage=vqgan, or of stage=prior>"


def export_model(config: DictConfig) -> dict[str, Any]:
    """Write a model in one or several formats, each read back and compared; the folder is there whole or not at all.

    Then it is pushed to the hub, if the command names a repository. With resume=<folder> an export that is there is pushed.
    """
    with Run.open(config, ckpt=EXPORTED, repeats=bool(config.resume)) as run:
        config = run.config
        destination = Destination.read(config.hub, config.private, config.replace)
        if run.resume and destination is None:
            raise InputError(
                f"resume={run.resume} is a whole export; add hub=<owner/name> to push it, or leave resume out"
            )
        result = read_export(run.resume, config.ckpt) if run.resume else write_model(run)
        if destination is not None and not run.is_dry:
            result["hub"] = Push(Path(result["run"]), destination).run()
        return result


def write_model(run: Run) -> dict[str, Any]:
    """The folder of what `ckpt` names: a tokenizer, or a prior with its tokenizer; the figures of the export."""
    config = run.config
    exporters = choose_exporters(config.format)
    if read_checkpoint(config.ckpt, "vqgan", "prior")["codegrid"]["stage"] == "vqgan":
        refuse_decoder(config.ckpt, config.decoder)
        return export_tokenizer(run)
    trained = load_prior(config.ckpt, config.decoder)
    origin = read_prior_origin(config.ckpt, trained)
    return write_folder(run, join_prior(exporters, trained), trained.tokenizer, origin)
