"""The dry runs of stage=prior, and of a pipeline's two trainings."""

from pathlib import Path
from typing import Any

from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.run import Run
from prior.conditioning.images import ConditionSetting, add_columns, open_labels
from prior.extract import check_crops
from prior.pipeline import name_group
from prior.stages.building import build_parts
from vqgan.tokenizer import Tokenizer


def rehearse_prior(run: Run, tokenizer: Tokenizer, images: ImageDataModule) -> dict[str, Any]:
    """The dry run of a prior, on random codes."""
    config = run.config
    check_crops(images, config.crops)
    labels = open_labels(config, images, run.resume)
    module, data, _, around = build_parts(run, tokenizer, images, labels)
    codes = len(images.source("train")) * config.crops * (1 + bool(config.flip))
    return run.rehearse(images.title, module, data, around, codes)


def rehearse_parts(
    run: Run, data: ImageDataModule, parts: dict[str, DictConfig], tokenizer: Tokenizer
) -> dict[str, Any]:
    """The dry runs of both trainings, that of the prior on random codes."""
    figures = run.preview(data.title, "train and evaluate a tokenizer and a prior in")
    for name in ("tokenizer", "prior"):
        if not (folder := Path(figures["would_write"], name)).exists():  # as of a resumed pipeline
            parts[name].run_dir = str(folder)
    with name_group(parts["tokenizer"].stage):
        figures["tokenizer"] = get_method(parts["tokenizer"].run)(parts["tokenizer"])
    with name_group(parts["prior"].stage), Run.open(parts["prior"]) as part:
        if columns := ConditionSetting.of_run(part.config).columns:
            described: Any = OmegaConf.to_container(parts["tokenizer"].data, resolve=True)
            data = instantiate(add_columns(described, columns))
        figures["prior"] = rehearse_prior(part, tokenizer, data)
    return figures
