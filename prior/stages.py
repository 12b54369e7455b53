"""stage=prior and stage=sample, from a tokenizer to pictures that never were."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf

from data.datamodule import ImageDataModule
from data.errors import InputError
from data.images import picture, save_picture, to_uint8
from data.loading import Samples as Grids
from data.terminal import counted
from data.tokens import FORMATS, CodeDataModule, export, sequences
from prior.callbacks import Samples
from prior.drawing import batches
from prior.extract import extract
from prior.models.base import Model
from prior.models.bigram import bigram_nats
from prior.module import Prior
from prior.sampling import Sampler
from vqgan.callbacks.progress import Progress
from vqgan.checkpoint import Checkpoints, build, find, header, load_tokenizer, part, read, save_whole
from vqgan.quantizers.base import whole
from vqgan.run import autocast, budget, device, fit, open_folder, settled, write_result
from vqgan.tokenizer import Tokenizer

KINDS = ("grid", "png", "npz")  # what samples are saved as
TOKENIZER = "tokenizer.ckpt"  # a prior's run folder keeps its own copy: the pair can be moved together


def train(config: DictConfig) -> dict[str, Any]:
    """Encode the data once, train a prior on the codes; the final figures and where everything lies."""
    config = settled(config)
    if not config.ckpt:
        raise InputError("stage=prior needs the tokenizer whose codes it learns; add ckpt=<run folder of stage=vqgan>")
    L.seed_everything(config.seed, verbose=False)
    tokenizer, described = load_tokenizer(config.ckpt)
    if tokenizer.K is None:
        raise InputError(f"ckpt={config.ckpt} has no codes to learn; train a tokenizer with quantizer=ema")
    images = described_images(described["data"], config)
    fabric = Fabric(accelerator=device(config.trainer.accelerator).type, devices=1)
    train_codes = extract(tokenizer, images, "train", config.flip, config.crops, fabric=fabric)
    val_codes = extract(tokenizer, images, "val", fabric=fabric)
    data = CodeDataModule(train_codes, val_codes, config.batch_size, config.seed)
    classes = class_count(images, train_codes) if config.conditional else 0
    model: Model = instantiate(config.prior, codebook=tokenizer.quantizer.vectors(), grid=tokenizer.grid, classes=classes)
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
    folder = open_folder(config, images.title)
    keep_tokenizer(tokenizer, described, folder)
    pictures = Samples(folder / "pictures", tokenizer)
    callbacks = [
        Checkpoints(folder, header("prior", config) | of_prior(tokenizer, classes), config.trainer.save_every),
        Progress({"train/loss": "loss", "val/nats_per_token": "validation"}),
        pictures,
    ]
    figures = fit(config, folder, module, data, callbacks)
    bigram = bigram_nats(sequences(train_codes), sequences(val_codes), tokenizer.K)
    shape = {"K": tokenizer.K, "grid": list(tokenizer.grid)}
    result = {**figures, "bigram_nats_per_token": round(bigram, 4), **shape, "pictures": [str(pictures.file)]}
    return write_result(folder, result)


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
    if not fabric.is_global_zero:
        return None
    folder = open_folder(config, images.title)
    meta = {"K": tokenizer.K, "grid": list(tokenizer.grid), "tokenizer": tokenizer.fingerprint()}
    files = []
    if config.export:
        for split, samples in codes.items():
            about = {**meta, "views": len(samples) // images.size(split), "n": images.size(split)}
            files.append(str(export(samples, about, folder / f"codes-{split}.{config.export}")))
    sizes = {split: len(samples) for split, samples in codes.items()}
    result = {"run": str(folder), **sizes, **meta, "seconds": round(seconds, 1), "files": files}
    return write_result(folder, result)


def draw(config: DictConfig) -> dict[str, Any]:
    """Sample codes from a prior, or of a KL-VAE latents from N(0, 1), and decode them: to a picture, and to what `save` names."""
    if not config.ckpt:
        raise InputError("stage=sample needs a prior to draw from; add ckpt=<run folder of stage=prior, or of a KL-VAE>")
    if config.resume:
        raise InputError(f"stage=sample has nothing to resume; leave resume={config.resume} out")
    for name in ("n", "columns", "rows", "batch_size"):
        whole(name, config[name], 1)
    save = [config.save] if isinstance(config.save, str) else list(config.save)
    if strange := [kind for kind in save if kind not in KINDS]:
        raise InputError(f"save={strange[0]} must be one of {', '.join(KINDS)}, or several, as save=[grid,npz]")
    where = device(config.accelerator)
    sampler: Sampler = instantiate(config.sampler)
    found: Iterator[tuple[torch.Tensor | None, torch.Tensor]]  # codes, where there are any, and what the decoder takes
    labels: torch.Tensor | None = None
    if read(config.ckpt, "prior", "vqgan")["codegrid"]["stage"] == "prior":
        model, tokenizer, name = load_prior(config.ckpt)
        model, tokenizer = model.to(where), tokenizer.to(where)
        labels = labels_for(model, config.label, config.n)
        if labels is None and sampler.guidance != 1:
            raise InputError(f"sampler.guidance={sampler.guidance} needs a prior of classes; train one with conditional=true")
        drawn = batches(model, sampler, config.n, config.seed, config.batch_size, labels=labels)
        found = ((codes, tokenizer.quantizer.lookup(codes)) for codes in drawn)
    else:  # a tokenizer by itself: from the distribution that its bottleneck was trained towards
        tokenizer, name = load_tokenizer(config.ckpt)[0].to(where), find(config.ckpt).parent.parent.name
        z_q = tokenizer.quantizer.draw(config.n, tokenizer.grid, config.seed)
        found = ((None, part) for part in z_q.split(config.batch_size))
    folder = open_folder(config, name)  # before what may take hours
    images, codes = [], []
    with torch.no_grad(), autocast(where), counted(config.n, "samples") as bar:
        for indices, latent in found:
            images.append(to_uint8(tokenizer.decode(latent)).cpu())
            codes += [] if indices is None else [indices.cpu()]
            bar.update(len(latent))
    files = save_samples(torch.cat(images), folder, save, config.columns, config.rows)
    if codes:
        content = {"codes": torch.cat(codes), **({} if labels is None else {"labels": labels})}
        torch.save(content, folder / "codes.pt")
    return write_result(folder, {"run": str(folder), "n": config.n, "seed": config.seed, **files})


def labels_for(model: Model, label: Any, n: int) -> torch.Tensor | None:
    """The labels (n,) of n samples: the classes that `label` names in turn, by default all; None of a prior without classes."""
    if not model.classes:
        if label is not None:
            raise InputError(f"label={label} needs a prior of classes; train one with conditional=true")
        return None
    chosen = list(range(model.classes)) if label is None else list(label) if OmegaConf.is_list(label) else [label]
    if not chosen or any(not isinstance(number, int) or not -1 <= number < model.classes for number in chosen):
        raise InputError(f"label={label} must be classes, 0 to {model.classes - 1}, or -1 for none in particular")
    return torch.tensor([chosen[i % len(chosen)] for i in range(n)])


def save_samples(images: torch.Tensor, folder: Path, kinds: list[str], columns: int, rows: int) -> dict[str, Any]:
    """Images (n, C, H, W) uint8 as a picture of the first `rows` rows, as files of their own, and as the .npz that
    evaluators of FID read: arr_0 (n, H, W, 3). Where they are."""
    files: dict[str, Any] = {}
    if "grid" in kinds:
        columns = min(columns, len(images))
        shown = list(images[: rows * columns].split(columns))
        shown[-1] = torch.cat([shown[-1], images.new_full((columns - len(shown[-1]), *images.shape[1:]), 255)])
        files["pictures"] = [str(save_picture(picture(shown, scale=2), folder / "samples.png"))]
    if "png" in kinds:
        for i, image in enumerate(images):
            save_picture(picture([image[None]]), folder / "samples" / f"{i:06d}.png")
        files["png"] = str(folder / "samples")
    if "npz" in kinds:
        np.savez(folder / "samples.npz", arr_0=images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
        files["npz"] = str(folder / "samples.npz")
    return files


def described_images(described: dict[str, Any], config: DictConfig) -> ImageDataModule:
    """The images that a tokenizer was trained on, by its `described` config, with what this run's config says of them."""
    mine = {name: value for name, value in config.data.items() if value is not None}
    if strange := set(mine) - set(described):
        raise InputError(f"data.{strange.pop()} is no setting of the tokenizer's data, which is {described['_target_']}")
    images: ImageDataModule = build({**described, **mine, "cache_dir": config.cache_dir})
    return images


def of_prior(tokenizer: Tokenizer, classes: int) -> dict[str, Any]:
    """What a prior's checkpoint says beside its config: whose codes it learned, and of how many classes."""
    return {"tokenizer": tokenizer.fingerprint(), "classes": classes}


def keep_tokenizer(tokenizer: Tokenizer, described: dict[str, Any], folder: Path) -> None:
    """Put a copy of the tokenizer beside its prior, as a checkpoint of stage=vqgan without the training state."""
    state = {f"tokenizer.{name}": value.cpu() for name, value in tokenizer.state_dict().items()}
    if not (folder / TOKENIZER).exists():
        content = {"codegrid": header("vqgan", OmegaConf.create(described)), "state_dict": state}
        save_whole(content, folder / TOKENIZER)


def load_prior(ckpt: str | Path) -> tuple[Model, Tokenizer, str]:
    """The trained prior of a stage=prior run, its tokenizer, both in eval mode, and the run's name."""
    checkpoint = read(ckpt, "prior")
    folder = find(ckpt).parent.parent
    if not (folder / TOKENIZER).is_file():
        raise InputError(f"{folder / TOKENIZER} is missing: the prior needs the tokenizer that its run folder keeps")
    tokenizer, _ = load_tokenizer(folder / TOKENIZER)
    told = checkpoint["codegrid"]
    if told["tokenizer"] != tokenizer.fingerprint():
        raise InputError(f"{folder / TOKENIZER} is not the tokenizer that this prior was trained on; restore the run folder")
    found = {"codebook": tokenizer.quantizer.vectors(), "grid": tokenizer.grid, "classes": told["classes"]}
    model: Model = build({**told["config"]["prior"], **found})
    model.load_state_dict(part(checkpoint["state_dict"], "model"))
    return model.eval(), tokenizer, folder.name
