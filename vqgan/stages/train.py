"""stage=vqgan, from a config to a trained tokenizer."""

from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from data.datamodule import ImageDataModule
from engine.callbacks.checkpointing import Checkpoints
from engine.callbacks.progress import Progress
from engine.checkpoint import make_header
from engine.compile import compile_parts
from engine.distributed import is_main, launch
from engine.environment import find_device
from engine.loggers import open_loggers
from engine.run import fit, make_budget, open_folder, resolve_config, write_result
from vqgan.callbacks.codes import CodebookPictures
from vqgan.callbacks.doctor import TokenizerDoctor
from vqgan.callbacks.reconstructions import Reconstructions
from vqgan.load import build_tokenizer, make_tags
from vqgan.module import VQGAN

START_IMAGES = 2_000  # enough patches for principal components and k-means


def train_tokenizer(config: DictConfig) -> dict[str, Any] | None:
    """Train a tokenizer; the final figures on the validation set, and where everything lies. Of several processes the first
    one reports."""
    config = resolve_config(config)
    L.seed_everything(config.seed, verbose=False)
    data: ImageDataModule = instantiate(config.data)
    module = module_from(config)
    data.prepare_data()
    if not config.resume:
        module.tokenizer.initialise(start_images(data))
    if config.trainer.compile:
        compile_parts(module.costly)
    around: dict[str, Callback] = {
        name: made for name, made in instantiate(config.callbacks).items() if made is not None
    }
    fabric = launch(config.trainer, find_device(config.trainer.accelerator).type)
    data.enough(fabric.world_size)
    folder = open_folder(config, data.title, data.facts())
    pictures, codes = Reconstructions(folder / "pictures"), CodebookPictures(folder / "pictures")
    callbacks = [
        *around.values(),
        Checkpoints(folder, make_header("vqgan", config), config.trainer.save_every),
        Progress({"train/rec": "rec", "val/psnr": "PSNR", "val/perplexity": "perplexity"}),
        pictures,
        codes,
    ]
    with open_loggers(config, folder, make_tags(config.stage, data.title, module.tokenizer)) as to:
        figures = fit(config, folder, module, data, callbacks, to)
        if not is_main():
            return None
        shape = {"K": module.tokenizer.K, "grid": list(module.tokenizer.grid)}
        alarms = [
            sentence
            for made in around.values()
            if isinstance(made, TokenizerDoctor)
            for sentence in made.said
        ]
        files = [str(file) for file in (pictures.file, *codes.files)]
        return write_result(folder, {**figures, **shape, "alarms": alarms, "pictures": files}, to)


def module_from(config: DictConfig) -> VQGAN:
    """The whole of stage 1, untrained, that a config describes."""
    loss = instantiate(config.loss)
    module = VQGAN(
        build_tokenizer(config.model, config.quantizer),
        optimizer=instantiate(config.optimizer),
        budget=make_budget(config),
        schedule=instantiate(config.schedule),
        clip=config.trainer.clip,
        accumulate=config.trainer.accumulate,
        **loss,
    )
    return module.to(memory_format=torch.channels_last)


def start_images(data: ImageDataModule) -> torch.Tensor:
    """Training images from all over the set, (n, C, H, W) in [-1, 1]."""
    images, _ = data.some("train", START_IMAGES)
    return data.view(images)
