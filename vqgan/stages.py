"""stage=vqgan, from a config to a trained tokenizer."""

from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from data.datamodule import ImageDataModule
from vqgan.callbacks.codes import Codes
from vqgan.callbacks.doctor import Doctor
from vqgan.callbacks.pictures import Reconstructions
from vqgan.callbacks.progress import Progress
from vqgan.checkpoint import Checkpoints, header, tokenizer_from
from vqgan.compiling import compiled
from vqgan.module import VQGAN
from vqgan.ranks import first, launch
from vqgan.run import budget, device, fit, loggers, open_folder, settled, tags, write_result

START_IMAGES = 2_000  # enough patches for principal components and k-means


def train(config: DictConfig) -> dict[str, Any] | None:
    """Train a tokenizer; the final figures on the validation set, and where everything lies. Of several processes the first
    one reports."""
    config = settled(config)
    L.seed_everything(config.seed, verbose=False)
    data: ImageDataModule = instantiate(config.data)
    module = module_from(config)
    data.prepare_data()
    if not config.resume:
        module.tokenizer.start(start_images(data))
    if config.trainer.compile:
        compiled(module.costly)
    around: dict[str, Callback] = {name: made for name, made in instantiate(config.callbacks).items() if made is not None}
    fabric = launch(config.trainer, device(config.trainer.accelerator).type)
    data.enough(fabric.world_size)
    folder = open_folder(config, data.title, data.facts())
    pictures, codes = Reconstructions(folder / "pictures"), Codes(folder / "pictures")
    callbacks = [
        *around.values(),
        Checkpoints(folder, header("vqgan", config), config.trainer.save_every),
        Progress({"train/rec": "rec", "val/psnr": "PSNR", "val/perplexity": "perplexity"}),
        pictures,
        codes,
    ]
    with loggers(config, folder, tags(config, data.title, module.tokenizer)) as to:
        figures = fit(config, folder, module, data, callbacks, to)
        if not first():
            return None
        shape = {"K": module.tokenizer.K, "grid": list(module.tokenizer.grid)}
        alarms = [sentence for made in around.values() if isinstance(made, Doctor) for sentence in made.said]
        files = [str(file) for file in (pictures.file, *codes.files)]
        return write_result(folder, {**figures, **shape, "alarms": alarms, "pictures": files}, to)


def module_from(config: DictConfig) -> VQGAN:
    """The whole of stage 1, untrained, that a config describes."""
    loss = instantiate(config.loss)
    module = VQGAN(
        tokenizer_from(config),
        optimizer=instantiate(config.optimizer),
        budget=budget(config),
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
