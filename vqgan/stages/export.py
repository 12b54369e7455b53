"""stage=export: a tokenizer as a folder for other programs."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from codegrid.engine.console import log_line
from codegrid.engine.run import Run
from codegrid.engine.version import stamp_config
from vqgan.export.card import format_check
from vqgan.export.discover import choose_exporters
from vqgan.export.folder import choose_target
from vqgan.export.origin import Origin
from vqgan.export.writing import write_export
from vqgan.load import load_tokenizer, require_codes

EXPORTED = "the tokenizer to export; add ckpt=<run folder of stage=vqgan>"


def export_tokenizer(config: DictConfig) -> dict[str, Any]:
    """Write a tokenizer in one or several formats, each read back and compared; the folder is there whole or not at all."""
    with Run.open(config, ckpt=EXPORTED, resumes="writes its folder whole or not at all") as run:
        config = run.config
        exporters = choose_exporters(config.format)
        tokenizer, described = load_tokenizer(config.ckpt)
        require_codes(
            tokenizer,
            f"ckpt={config.ckpt} is continuous, and an export turns images into codes and back",
        )
        for exporter in exporters:
            exporter.check(tokenizer)
        origin = Origin.read(config.ckpt, described)
        target = choose_target(config.stage, config.name or origin.name, config.run_dir)
        text = stamp_config(OmegaConf.to_yaml(config, resolve=True))
        result = write_export(tokenizer, origin, exporters, config.licence, target, text)
        for name, figures in result["checks"].items():
            log_line(f"{name}: read back, {format_check(figures)}")
        return result
