"""stage=export of a tokenizer; prior/stages/export.py has the command, since `ckpt` may be a prior too."""

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from codegrid.engine.console import log_line
from codegrid.engine.run import Run
from codegrid.engine.version import stamp_config
from vqgan.export.base import Exporter
from vqgan.export.card import format_check
from vqgan.export.discover import choose_exporters
from vqgan.export.folder import choose_target
from vqgan.export.origin import Origin
from vqgan.export.writing import write_export
from vqgan.load import load_tokenizer, require_codes
from vqgan.tokenizer import Tokenizer

WITHOUT_CODES = "and an export turns images into codes and back"


def export_tokenizer(run: Run) -> dict[str, Any]:
    """Write a tokenizer in one or several formats; the figures of the export."""
    config = run.config
    exporters = choose_exporters(config.format)
    tokenizer, described = load_tokenizer(config.ckpt)
    require_codes(tokenizer, f"ckpt={config.ckpt} is continuous, {WITHOUT_CODES}")
    return write_folder(run, exporters, tokenizer, Origin.read(config.ckpt, described))


def write_folder(
    run: Run, exporters: Sequence[Exporter], tokenizer: Tokenizer, origin: Origin
) -> dict[str, Any]:
    """The folder of a tokenizer, with what these exporters add to it, whole or not at all; the figures of the export.

    Each format is read back and compared with the tokenizer before the folder has its name.
    """
    config = run.config
    for exporter in exporters:
        exporter.check(tokenizer)
    target = choose_target(config.stage, config.name or origin.name, config.run_dir)
    if run.is_dry:
        formats = " and ".join(exporter.name for exporter in exporters)
        return run.preview(origin.name, f"write {origin.name} as {formats} to")
    text = stamp_config(OmegaConf.to_yaml(config, resolve=True))
    result = write_export(tokenizer, origin, exporters, config.licence, target, text, config.hub)
    for name, figures in result["checks"].items():
        log_line(f"{name}: read back, {format_check(figures)}")
    return result
