"""stage=prior: train a prior on a tokenizer's codes."""

from typing import Any

import lightning as L
import numpy as np
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, EarlyStopping
from omegaconf import DictConfig

from data.datamodule import ImageDataModule
from data.loading import ArraySamples as Grids
from data.tokens import CodeDataModule
from engine.callbacks.checkpointing import BestCheckpoint, Checkpoints
from engine.callbacks.progress import Progress
from engine.checkpoint import make_header
from engine.compile import compile_parts
from engine.console import log_line
from engine.distributed import is_main, launch
from engine.environment import find_device
from engine.errors import InputError, check_int
from engine.loggers import open_loggers
from engine.run import fit, make_budget, open_folder, resolve_config, write_result
from prior.baselines import baselines
from prior.callbacks import LossMapPictures, PriorDoctor, SamplePictures
from prior.extract import extract
from prior.load import copy_tokenizer, prior_header
from prior.models.base import PriorModel
from prior.models.counted import Counted
from prior.module import Prior
from vqgan.load import load_images, load_tokenizer, make_tags


def train_prior(config: DictConfig) -> dict[str, Any] | None:
    """Encode the data once, train a prior on the codes; the final figures and where everything lies. Of several processes,
    which share the encoding too, the first one reports."""
    config = resolve_config(config, shards=True)
    if not config.ckpt:
        raise InputError(
            "stage=prior needs the tokenizer whose codes it learns; add ckpt=<run folder of stage=vqgan>"
        )
    for size in {"width", "depth", "heads", "codebook_depth"} & config.prior.keys():
        check_int(f"prior.{size}", config.prior[size], 1)
    L.seed_everything(config.seed, verbose=False)
    tokenizer, described = load_tokenizer(config.ckpt)
    if tokenizer.K is None:
        raise InputError(
            f"ckpt={config.ckpt} has no codes to learn; train a tokenizer with quantizer=ema"
        )
    images = load_images(described["data"], config)
    fabric = launch(config.trainer, find_device(config.trainer.accelerator).type)
    train_codes = extract(tokenizer, images, "train", config.flip, config.crops, fabric=fabric)
    val_codes = extract(tokenizer, images, "val", fabric=fabric)
    data = CodeDataModule(train_codes, val_codes, config.batch_size, config.seed)
    classes = count_classes(images, train_codes) if config.conditional else 0
    model: PriorModel = instantiate(
        config.prior, codebook=tokenizer.quantizer.vectors(), grid=tokenizer.grid, classes=classes
    )
    seen, unseen = (codes.values.reshape(len(codes), -1) for codes in (train_codes, val_codes))
    if isinstance(model, Counted):
        model.count(seen, unseen)
    module = Prior(
        model,
        optimizer=instantiate(config.optimizer),
        budget=make_budget(config),
        schedule=instantiate(config.schedule),
        label_drop=config.label_drop,
        label_smoothing=config.label_smoothing,
        clip=config.trainer.clip,
        accumulate=config.trainer.accumulate,
    )
    if config.trainer.compile and not module.blocks:
        raise InputError(
            f"trainer.compile=true compiles transformer blocks, and {type(model).__name__} has none; use trainer.compile=false, or "
            "prior=gpt, rar, rq, maskgit or diffusion"
        )
    if config.trainer.compile:
        compile_parts(module.blocks)
    around: dict[str, Callback] = {
        name: made for name, made in instantiate(config.callbacks).items() if made is not None
    }
    data.enough(fabric.world_size)
    folder = open_folder(config, images.title, images.facts())
    if is_main():
        copy_tokenizer(tokenizer, described, folder)
    about = make_header("prior", config) | prior_header(tokenizer, classes)
    best = BestCheckpoint(folder, about, "val/nats_per_token")
    callbacks = [
        best,  # before the average is taken out again
        *around.values(),
        Checkpoints(folder, about, config.trainer.save_every),  # after all whose state it keeps
        Progress(
            {
                "train/loss": "loss",
                "val/nats_per_token": "validation" if model.exact else "validation at most",
            }
        ),
        SamplePictures(tokenizer),
        LossMapPictures(),
    ]
    words = [*make_tags(config, images.title, tokenizer), type(model).__name__.lower()]
    with open_loggers(config, folder, words) as to:
        figures = fit(config, folder, module, data, callbacks, to)
        if not is_main():
            return None
        for made in around.values():
            if isinstance(made, EarlyStopping) and made.stopping_reason_message:
                log_line(f"stopped at step {module.step}: {made.stopping_reason_message}")
        result = {
            **figures,
            **best.figures,
            "tokenizer_of": described.get("id"),
            "exact": model.exact,  # else all nats and bits are upper bounds
            "best_step": best.step,
            "last_nats_per_token": figures["nats_per_token"],
            **{
                name: round(value, 4)
                for name, value in baselines(
                    seen, unseen, tokenizer.K, tokenizer.num_codebooks
                ).items()
            },
            "K": tokenizer.K,
            "grid": list(tokenizer.grid),
            "alarms": [
                sentence
                for made in around.values()
                if isinstance(made, PriorDoctor)
                for sentence in made.said
            ],
            "pictures": [
                str(folder / "pictures" / f"{name}-{best.step:06d}.png")
                for name in ("samples", "loss-map")
            ],
        }
        return write_result(folder, result, to)


def count_classes(images: ImageDataModule, codes: Grids) -> int:
    """How many classes the labels of the images are of: as many as have names, or as were seen."""
    n = max(len(images.classes), int(np.max(codes.labels)) + 1)
    if n < 2:
        raise InputError(
            f"conditional=true needs images of at least two classes, and {images.title} has {n}; leave it out"
        )
    return n
