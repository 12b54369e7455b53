"""stage=sample: draw pictures from a prior."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from data.datamodule import ImageDataModule
from data.images import save_picture, to_uint8
from engine.checkpoint import find_checkpoint, read_checkpoint
from engine.console import progress_bar
from engine.environment import autocast, find_device
from engine.errors import InputError, check_int
from engine.run import open_folder, write_result
from prior.decoding.generate import check_compile_sampler, generate
from prior.decoding.sampling import Sampler
from prior.load import load_prior
from prior.neighbours import find_neighbours
from prior.samples import KINDS, choose_labels, encode_init_image, save_samples
from vqgan.load import load_images, load_tokenizer


def draw_samples(config: DictConfig) -> dict[str, Any]:
    """Sample codes from a prior, or of a KL-VAE latents from N(0, 1), and decode them: to a picture, and to what `save` names."""
    if not config.ckpt:
        raise InputError(
            "stage=sample needs a prior to draw from; add ckpt=<run folder of stage=prior, or of a KL-VAE>"
        )
    if config.resume:
        raise InputError(f"stage=sample has nothing to resume; leave resume={config.resume} out")
    for name in ("n", "columns", "rows", "batch_size"):
        check_int(name, config[name], 1)
    save = [config.save] if isinstance(config.save, str) else list(config.save)
    if strange := [kind for kind in save if kind not in KINDS]:
        raise InputError(
            f"save={strange[0]} must be one of {', '.join(KINDS)}, or several, as save=[grid,npz]"
        )
    where = find_device(config.accelerator)
    sampler: Sampler = instantiate(config.sampler)
    found: Iterator[
        tuple[torch.Tensor | None, torch.Tensor]
    ]  # codes, where there are any, and what the decoder takes
    labels: torch.Tensor | None = None
    head: list[torch.Tensor] = []  # what the picture begins with
    if read_checkpoint(config.ckpt, "prior", "vqgan")["codegrid"]["stage"] == "prior":
        trained = load_prior(config.ckpt)
        model, tokenizer, name = trained.model.to(where), trained.tokenizer.to(where), trained.name
        described, flip = trained.data, trained.config["flip"]
        labels = choose_labels(model, config.label, config.n)
        if labels is None and sampler.guidance != 1:
            raise InputError(
                f"sampler.guidance={sampler.guidance} needs a prior of classes; train one with conditional=true"
            )
        check_compile_sampler(model, sampler, where.type)
        known, given = sampler.known(sampler.size(model.grid)), None
        if sampler.init_image is not None:
            given, head = encode_init_image(sampler.init_image, tokenizer, known)
        drawn = generate(model, sampler, config.n, config.seed, config.batch_size, labels, given)
        found = ((codes, tokenizer.quantizer.lookup(codes)) for codes in drawn)
    else:  # a tokenizer by itself: from the distribution that its bottleneck was trained towards
        tokenizer, told = load_tokenizer(config.ckpt)
        tokenizer, name = tokenizer.to(where), find_checkpoint(config.ckpt).parent.parent.name
        described, flip = told["data"], told["data"]["flip"]
        if sampler.init_image is not None:
            raise InputError(
                f"sampler.init_image={sampler.init_image} needs a prior, and ckpt={config.ckpt} is a tokenizer"
            )
        z_q = tokenizer.quantizer.sample_latents(
            config.n, sampler.size(tokenizer.grid), config.seed
        )
        found = ((None, part) for part in z_q.split(config.batch_size))
    data: ImageDataModule | None = None
    if "neighbours" in save:
        if sampler.size(tokenizer.grid) != tokenizer.grid:
            raise InputError(
                f"save=neighbours compares samples with training images, as large; leave sampler.grid={sampler.grid} out"
            )
        data = load_images(described, config.data, config.cache_dir)
        data.prepare_data()
    folder = open_folder(config, name)  # before what may take hours
    images, codes = [], []
    with torch.no_grad(), autocast(where), progress_bar(config.n, "samples") as bar:
        for indices, latent in found:
            # As many pixels at once as those of a batch of the tokenizer's own size, however large the grid is.
            at_once = max(
                1, config.batch_size * math.prod(tokenizer.grid) // math.prod(latent.shape[2:])
            )
            images += [to_uint8(tokenizer.decode(part)).cpu() for part in latent.split(at_once)]
            codes += [] if indices is None else [indices.cpu()]
            bar.update(len(latent))
    made = torch.cat(images)
    files = save_samples(made, folder, save, config.columns, config.rows, head)
    if data is not None:
        figures, sheet = find_neighbours(made, data, tokenizer, flip)
        files["pictures"] = [
            *files.get("pictures", []),
            str(save_picture(sheet, folder / "neighbours.png")),
        ]
        files |= figures
    if codes:
        content = {"codes": torch.cat(codes), **({} if labels is None else {"labels": labels})}
        torch.save(content, folder / "codes.pt")
    return write_result(folder, {"run": str(folder), "n": config.n, "seed": config.seed, **files})
