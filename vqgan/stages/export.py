"""stage=export: a tokenizer as a folder for other programs, and on the hub."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.run import Run
from codegrid.engine.version import stamp_config
from vqgan.export.base import Exporter
from vqgan.export.card import format_check
from vqgan.export.discover import choose_exporters
from vqgan.export.folder import choose_target
from vqgan.export.origin import Origin
from vqgan.export.push import Destination, Push, read_export
from vqgan.export.writing import write_export
from vqgan.load import load_tokenizer, require_codes
from vqgan.tokenizer import Tokenizer

WriteFolder = Callable[[DictConfig], dict[str, Any]]

EXPORTED = "the tokenizer to export; add ckpt=<run folder of stage=vqgan, or of stage=prior>"

WITHOUT_CODES = "and an export turns images into codes and back"


def export_tokenizer(config: DictConfig, write: WriteFolder | None = None) -> dict[str, Any]:
    """Write a tokenizer in one or several formats, each read back and compared; the folder is there whole or not at all.

    Then it is pushed to the hub, if the command names a repository. With resume=<folder> an export that is there is pushed.
    `write` writes the folder of another model.
    """
    with Run.open(config, ckpt=EXPORTED, repeats=bool(config.resume)) as run:
        config = run.config
        destination = Destination.read(config.hub, config.private, config.replace)
        if run.resume and destination is None:
            raise InputError(
                f"resume={run.resume} is a whole export; add hub=<owner/name> to push it, or leave resume out"
            )
        write = write or write_tokenizer
        result = read_export(run.resume, config.ckpt) if run.resume else write(config)
        if destination is not None:
            result["hub"] = Push(Path(result["run"]), destination).run()
        return result


def write_tokenizer(config: DictConfig) -> dict[str, Any]:
    """The export itself; its figures."""
    exporters = choose_exporters(config.format)
    tokenizer, described = load_tokenizer(config.ckpt)
    require_codes(tokenizer, f"ckpt={config.ckpt} is continuous, {WITHOUT_CODES}")
    return write_folder(config, exporters, tokenizer, Origin.read(config.ckpt, described))


def write_folder(
    config: DictConfig, exporters: Sequence[Exporter], tokenizer: Tokenizer, origin: Origin
) -> dict[str, Any]:
    """The folder of a tokenizer, or of what these exporters add to it, after all checks; the figures."""
    for exporter in exporters:
        exporter.check(tokenizer)
    target = choose_target(config.stage, config.name or origin.name, config.run_dir)
    text = stamp_config(OmegaConf.to_yaml(config, resolve=True))
    result = write_export(tokenizer, origin, exporters, config.licence, target, text, config.hub)
    for name, figures in result["checks"].items():
        log_line(f"{name}: read back, {format_check(figures)}")
    return result
