"""stage=prior and stage=extract, from a tokenizer to a prior on its codes."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from hydra.utils import instantiate
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, EarlyStopping
from omegaconf import DictConfig, OmegaConf

from data.datamodule import ImageDataModule
from data.errors import InputError
from data.loading import Samples as Grids
from data.terminal import tell
from data.tokens import FORMATS, CodeDataModule, export
from prior.baselines import baselines
from prior.callbacks import Doctor, LossMap, Samples
from prior.extract import extract
from prior.models.base import Model
from prior.models.counted import Counted
from prior.module import Prior
from vqgan.callbacks.progress import Progress
from vqgan.checkpoint import (
    AVERAGE,
    Best,
    Checkpoints,
    build,
    described_images,
    find,
    header,
    load_tokenizer,
    part,
    read,
    save_whole,
)
from vqgan.compiling import compiled
from vqgan.quantizers.base import whole
from vqgan.ranks import first, launch
from vqgan.run import budget, device, fit, loggers, open_folder, settled, tags, write_result
from vqgan.tokenizer import Tokenizer

TOKENIZER = "tokenizer.ckpt"  # a prior's run folder keeps its own copy: the pair can be moved together


def train(config: DictConfig) -> dict[str, Any] | None:
    """Encode the data once, train a prior on the codes; the final figures and where everything lies. Of several processes,
    which share the encoding too, the first one reports."""
    config = settled(config, shards=True)
    if not config.ckpt:
        raise InputError("stage=prior needs the tokenizer whose codes it learns; add ckpt=<run folder of stage=vqgan>")
    for size in {"width", "depth", "heads", "book_depth"} & config.prior.keys():
        whole(f"prior.{size}", config.prior[size], 1)
    L.seed_everything(config.seed, verbose=False)
    tokenizer, described = load_tokenizer(config.ckpt)
    if tokenizer.K is None:
        raise InputError(f"ckpt={config.ckpt} has no codes to learn; train a tokenizer with quantizer=ema")
    images = described_images(described["data"], config)
    fabric = launch(config.trainer, device(config.trainer.accelerator).type)
    train_codes = extract(tokenizer, images, "train", config.flip, config.crops, fabric=fabric)
    val_codes = extract(tokenizer, images, "val", fabric=fabric)
    data = CodeDataModule(train_codes, val_codes, config.batch_size, config.seed)
    classes = class_count(images, train_codes) if config.conditional else 0
    model: Model = instantiate(config.prior, codebook=tokenizer.quantizer.vectors(), grid=tokenizer.grid, classes=classes)
    seen, unseen = (codes.values.reshape(len(codes), -1) for codes in (train_codes, val_codes))
    if isinstance(model, Counted):
        model.count(seen, unseen)
    module = Prior(
        model,
        optimizer=instantiate(config.optimizer),
        budget=budget(config),
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
        compiled(module.blocks)
    around: dict[str, Callback] = {name: made for name, made in instantiate(config.callbacks).items() if made is not None}
    data.enough(fabric.world_size)
    folder = open_folder(config, images.title, images.facts())
    if first():
        keep_tokenizer(tokenizer, described, folder)
    about = header("prior", config) | of_prior(tokenizer, classes)
    best = Best(folder, about, "val/nats_per_token")
    callbacks = [
        best,  # before the average is taken out again
        *around.values(),
        Checkpoints(folder, about, config.trainer.save_every),  # after all whose state it keeps
        Progress({"train/loss": "loss", "val/nats_per_token": "validation" if model.exact else "validation at most"}),
        Samples(folder / "pictures", tokenizer),
        LossMap(folder / "pictures"),
    ]
    words = [*tags(config, images.title, tokenizer), type(model).__name__.lower()]
    with loggers(config, folder, words) as to:
        figures = fit(config, folder, module, data, callbacks, to)
        if not first():
            return None
        for made in around.values():
            if isinstance(made, EarlyStopping) and made.stopping_reason_message:
                tell(f"stopped at step {module.step}: {made.stopping_reason_message}")
        result = {
            **figures,
            **best.figures,
            "tokenizer_of": described.get("id"),
            "exact": model.exact,  # else all nats and bits are upper bounds
            "best_step": best.step,
            "last_nats_per_token": figures["nats_per_token"],
            **{name: round(value, 4) for name, value in baselines(seen, unseen, tokenizer.K, tokenizer.books).items()},
            "K": tokenizer.K,
            "grid": list(tokenizer.grid),
            "alarms": [sentence for made in around.values() if isinstance(made, Doctor) for sentence in made.said],
            "pictures": [str(folder / "pictures" / f"{name}-{best.step:06d}.png") for name in ("samples", "loss-map")],
        }
        return write_result(folder, result, to)


def class_count(images: ImageDataModule, codes: Grids) -> int:
    """How many classes the labels of the images are of: as many as have names, or as were seen."""
    n = max(len(images.classes), int(np.max(codes.labels)) + 1)
    if n < 2:
        raise InputError(f"conditional=true needs images of at least two classes, and {images.title} has {n}; leave it out")
    return n


def encode(config: DictConfig) -> dict[str, Any] | None:
    """Encode both splits of a tokenizer's data into the code cache, and write them to files where `export` says so.

    Every process of a run over several devices takes its share; the first one reports.
    """
    if not config.ckpt:
        raise InputError("stage=extract needs the tokenizer to encode with; add ckpt=<run folder of stage=vqgan>")
    if config.resume:
        raise InputError(f"stage=extract goes on by itself where it was; leave resume={config.resume} out")
    if config.export not in (None, *FORMATS):
        raise InputError(f"export={config.export} must be one of {', '.join(FORMATS)}")
    whole("batch_size", config.batch_size, 1, "image")
    fabric = Fabric(accelerator=device(config.accelerator).type, devices=config.devices, num_nodes=config.num_nodes)
    fabric.launch()
    tokenizer, described = load_tokenizer(config.ckpt)
    images = described_images(described["data"], config)
    began = time.monotonic()
    codes = {
        "train": extract(tokenizer, images, "train", config.flip, config.crops, config.batch_size, fabric=fabric),
        "val": extract(tokenizer, images, "val", batch_size=config.batch_size, fabric=fabric),
    }
    seconds = time.monotonic() - began
    folder = open_folder(config, images.title)
    if not first():
        return None
    meta = {"K": tokenizer.K, "grid": list(tokenizer.grid), "tokenizer": tokenizer.fingerprint()}
    files = []
    if config.export:
        for split, samples in codes.items():
            about = {**meta, "views": len(samples) // images.size(split), "n": images.size(split)}
            files.append(str(export(samples, about, folder / f"codes-{split}.{config.export}")))
    sizes = {split: len(samples) for split, samples in codes.items()}
    result = {"run": str(folder), **sizes, **meta, "seconds": round(seconds, 1), "files": files}
    return write_result(folder, result)


def of_prior(tokenizer: Tokenizer, classes: int) -> dict[str, Any]:
    """What a prior's checkpoint says beside its config: whose codes it learned, and of how many classes."""
    return {"tokenizer": tokenizer.fingerprint(), "classes": classes}


def keep_tokenizer(tokenizer: Tokenizer, described: dict[str, Any], folder: Path) -> None:
    """Put a copy of the tokenizer beside its prior, as a checkpoint of stage=vqgan without the training state."""
    state = {f"tokenizer.{name}": value.cpu() for name, value in tokenizer.state_dict().items()}
    if not (folder / TOKENIZER).exists():
        content = {"codegrid": header("vqgan", OmegaConf.create(described)), "state_dict": state}
        save_whole(content, folder / TOKENIZER)


@dataclass
class Trained:
    """A trained prior and its tokenizer, both in eval mode, the name and the config of its run, that of the tokenizer's
    images, and the id of the tokenizer's run."""

    model: Model
    tokenizer: Tokenizer
    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    tokenizer_of: str | None


def load_prior(ckpt: str | Path) -> Trained:
    """The trained prior of a stage=prior run."""
    checkpoint = read(ckpt, "prior")
    folder = find(ckpt).parent.parent
    if not (folder / TOKENIZER).is_file():
        raise InputError(f"{folder / TOKENIZER} is missing: the prior needs the tokenizer that its run folder keeps")
    tokenizer, described = load_tokenizer(folder / TOKENIZER)
    told = checkpoint["codegrid"]
    if told["tokenizer"] != tokenizer.fingerprint():
        raise InputError(f"{folder / TOKENIZER} is not the tokenizer that this prior was trained on; restore the run folder")
    found = {"codebook": tokenizer.quantizer.vectors(), "grid": tokenizer.grid, "classes": told["classes"]}
    model = build({**told["config"]["prior"], **found}, Model)  # type: ignore[type-abstract]
    model.load_state_dict(checkpoint.get(AVERAGE) or part(checkpoint["state_dict"], "model"))
    return Trained(model.eval(), tokenizer, folder.name, told["config"], described["data"], described.get("id"))
