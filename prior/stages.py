"""stage=prior and stage=sample, from a tokenizer to pictures that never were."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, EarlyStopping
from omegaconf import DictConfig, OmegaConf

from data.datamodule import ImageDataModule, prepare
from data.decode import Unreadable, decode
from data.errors import InputError
from data.images import picture, save_picture, to_uint8
from data.loading import Samples as Grids
from data.terminal import counted, tell
from data.tokens import FORMATS, CodeDataModule, export
from prior.baselines import baselines
from prior.callbacks import Doctor, LossMap, Samples
from prior.drawing import batches
from prior.extract import extract
from prior.models.base import Model
from prior.models.counted import Counted
from prior.module import Prior
from prior.neighbours import neighbours
from prior.sampling import Sampler
from vqgan.callbacks.progress import Progress
from vqgan.checkpoint import AVERAGE, Best, Checkpoints, build, find, header, load_tokenizer, part, read, save_whole
from vqgan.quantizers.base import whole
from vqgan.run import autocast, budget, device, fit, open_folder, settled, write_result
from vqgan.tokenizer import Tokenizer

KINDS = ("grid", "png", "npz", "neighbours")  # what samples are saved as
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
    folder = open_folder(config, images.title)
    keep_tokenizer(tokenizer, described, folder)
    about = header("prior", config) | of_prior(tokenizer, classes)
    best = Best(folder, about, "val/nats_per_token")
    around: dict[str, Callback] = {name: made for name, made in instantiate(config.callbacks).items() if made is not None}
    callbacks = [
        best,  # before the average is taken out again
        *around.values(),
        Checkpoints(folder, about, config.trainer.save_every),  # after all whose state it keeps
        Progress({"train/loss": "loss", "val/nats_per_token": "validation" if model.exact else "validation at most"}),
        Samples(folder / "pictures", tokenizer),
        LossMap(folder / "pictures"),
    ]
    figures = fit(config, folder, module, data, callbacks)
    for made in around.values():
        if isinstance(made, EarlyStopping) and made.stopping_reason_message:
            tell(f"stopped at step {module.step}: {made.stopping_reason_message}")
    result = {
        **figures,
        **best.figures,
        "exact": model.exact,  # else all nats and bits are upper bounds
        "best_step": best.step,
        "last_nats_per_token": figures["nats_per_token"],
        **{name: round(value, 4) for name, value in baselines(seen, unseen, tokenizer.K, tokenizer.books).items()},
        "K": tokenizer.K,
        "grid": list(tokenizer.grid),
        "alarms": [sentence for made in around.values() if isinstance(made, Doctor) for sentence in made.said],
        "pictures": [str(folder / "pictures" / f"{name}-{best.step:06d}.png") for name in ("samples", "loss-map")],
    }
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
    head: list[torch.Tensor] = []  # what the picture begins with
    if read(config.ckpt, "prior", "vqgan")["codegrid"]["stage"] == "prior":
        trained = load_prior(config.ckpt)
        model, tokenizer, name = trained.model.to(where), trained.tokenizer.to(where), trained.name
        described, flip = trained.data, trained.config["flip"]
        labels = labels_for(model, config.label, config.n)
        if labels is None and sampler.guidance != 1:
            raise InputError(f"sampler.guidance={sampler.guidance} needs a prior of classes; train one with conditional=true")
        known, given = sampler.known(sampler.size(model.grid)), None
        if sampler.given is not None:
            given, head = given_codes(sampler.given, tokenizer, known)
        drawn = batches(model, sampler, config.n, config.seed, config.batch_size, labels, given)
        found = ((codes, tokenizer.quantizer.lookup(codes)) for codes in drawn)
    else:  # a tokenizer by itself: from the distribution that its bottleneck was trained towards
        tokenizer, told = load_tokenizer(config.ckpt)
        tokenizer, name = tokenizer.to(where), find(config.ckpt).parent.parent.name
        described, flip = told["data"], told["data"]["flip"]
        if sampler.given is not None:
            raise InputError(f"sampler.given={sampler.given} needs a prior, and ckpt={config.ckpt} is a tokenizer")
        z_q = tokenizer.quantizer.draw(config.n, sampler.size(tokenizer.grid), config.seed)
        found = ((None, part) for part in z_q.split(config.batch_size))
    data: ImageDataModule | None = None
    if "neighbours" in save:
        if sampler.size(tokenizer.grid) != tokenizer.grid:
            raise InputError(
                f"save=neighbours compares samples with training images, as large; leave sampler.grid={sampler.grid} out"
            )
        data = described_images(described, config)
        data.prepare_data()
    folder = open_folder(config, name)  # before what may take hours
    images, codes = [], []
    with torch.no_grad(), autocast(where), counted(config.n, "samples") as bar:
        for indices, latent in found:
            # As many pixels at once as those of a batch of the tokenizer's own size, however large the grid is.
            at_once = max(1, config.batch_size * math.prod(tokenizer.grid) // math.prod(latent.shape[2:]))
            images += [to_uint8(tokenizer.decode(part)).cpu() for part in latent.split(at_once)]
            codes += [] if indices is None else [indices.cpu()]
            bar.update(len(latent))
    made = torch.cat(images)
    files = save_samples(made, folder, save, config.columns, config.rows, head)
    if data is not None:
        figures, sheet = neighbours(made, data, tokenizer, flip)
        files["pictures"] = [*files.get("pictures", []), str(save_picture(sheet, folder / "neighbours.png"))]
        files |= figures
    if codes:
        content = {"codes": torch.cat(codes), **({} if labels is None else {"labels": labels})}
        torch.save(content, folder / "codes.pt")
    return write_result(folder, {"run": str(folder), "n": config.n, "seed": config.seed, **files})


def given_codes(file: str, tokenizer: Tokenizer, known: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The codes (h, w) or (h, w, books) of an image file, whose middle is scaled to what the tokenizer sees, and pictures
    (1, C, H, W) uint8: the image, its reconstruction, and of that what is `known` (h, w), the rest grey."""
    path, encoder = Path(file).expanduser(), tokenizer.encoder
    if not path.is_file():
        raise InputError(f"sampler.given={file} is not there; give an image file")
    try:
        pixels = decode(path.read_bytes(), encoder.image_size, encoder.channels)
    except (OSError, Unreadable) as error:
        raise InputError(f"sampler.given={file} can't be read as an image ({error}); give another") from error
    image = torch.from_numpy(np.array(pixels))[None]  # a copy: it may be read-only or mirrored
    where = next(tokenizer.parameters()).device
    with torch.no_grad(), autocast(where):
        codes = tokenizer.indices(prepare(image).to(where))
        seen = to_uint8(tokenizer.decode_indices(codes)).cpu()
    pixelwise = known.repeat_interleave(tokenizer.f, 0).repeat_interleave(tokenizer.f, 1)
    return codes[0], [image, seen, seen.where(pixelwise, 128)]


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


def save_samples(
    images: torch.Tensor, folder: Path, kinds: list[str], columns: int, rows: int, head: Sequence[torch.Tensor] = ()
) -> dict[str, Any]:
    """Images (n, C, H, W) uint8 as a picture of the first `rows` rows, in which those of `head` come first, as files of
    their own, and as the .npz that evaluators of FID read: arr_0 (n, H, W, 3). Where they are."""
    files: dict[str, Any] = {}
    if "grid" in kinds:
        sheet = torch.cat([*head, images])
        columns = min(columns, len(sheet))
        shown = list(sheet[: rows * columns].split(columns))
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


@dataclass
class Trained:
    """A trained prior and its tokenizer, both in eval mode, the name and the config of its run, and that of the
    tokenizer's images."""

    model: Model
    tokenizer: Tokenizer
    name: str
    config: dict[str, Any]
    data: dict[str, Any]


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
    model: Model = build({**told["config"]["prior"], **found})
    model.load_state_dict(checkpoint.get(AVERAGE) or part(checkpoint["state_dict"], "model"))
    return Trained(model.eval(), tokenizer, folder.name, told["config"], described["data"])
