"""stage=sample, from a prior to pictures that never were."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data.datamodule import ImageDataModule, prepare
from data.decode import Unreadable, decode
from data.errors import InputError
from data.images import picture, save_picture, to_uint8
from data.terminal import counted
from prior.drawing import batches, ready
from prior.models.base import Model
from prior.neighbours import neighbours
from prior.sampling import Sampler
from prior.stages import load_prior
from vqgan.checkpoint import described_images, find, load_tokenizer, read
from vqgan.quantizers.base import whole
from vqgan.run import autocast, device, open_folder, write_result
from vqgan.tokenizer import Tokenizer

KINDS = ("grid", "png", "npz", "neighbours")  # what samples are saved as


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
        ready(model, sampler, where.type)
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
