"""stage=vqgan: train a tokenizer."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.run import Run
from vqgan.stages.building import build_module
from vqgan.stages.fitting import fit_tokenizer
from vqgan.starting import choose_start

PROGRESS = {"train/rec": "rec", "val/psnr": "PSNR", "val/perplexity": "perplexity"}


def train_tokenizer(config: DictConfig) -> dict[str, Any] | None:
    """Train a tokenizer; the final validation figures and where everything lies, on the main rank."""
    with Run.open(config) as run:
        run.seed()
        data: ImageDataModule = instantiate(run.config.data)
        start = choose_start(run, data)
        module = build_module(run.config, run.training)
        start.check_changes(module.code_changes)
        return fit_tokenizer(run, module, data, start, PROGRESS)
