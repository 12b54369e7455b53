"""What stage=sample draws from, a prior or a tokenizer by itself, and how its samples become files."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.images import to_uint8
from engine.checkpoint import find_checkpoint, read_checkpoint
from engine.console import progress_bar
from engine.environment import autocast
from engine.errors import InputError
from prior.decoding.generate import check_compile_sampler, generate
from prior.decoding.sampling import Sampler
from prior.load import load_prior
from prior.samples import choose_labels, encode_init_image
from vqgan.load import load_tokenizer, read_rules
from vqgan.tokenizer import Tokenizer

Drawn = Iterator[
    tuple[Tensor | None, Tensor]
]  # codes, if there are any, and what the decoder takes


@dataclass
class SampleSource:
    """A model to draw from, on its device.

    `data` is the config of the images it was trained on, `flip` whether it also learned them mirrored; `labels` (n,) are
    the samples' classes, if it has any; `head` are pictures to show before the samples.
    """

    tokenizer: Tokenizer
    drawn: Drawn
    name: str
    data: Mapping[str, Any]
    flip: bool
    labels: Tensor | None = None
    head: list[Tensor] = field(default_factory=list)


def open_source(
    ckpt: str,
    sampler: Sampler,
    n: int,
    seed: int,
    batch_size: int,
    label: Any,
    device: torch.device,
) -> SampleSource:
    """Load what `ckpt` names, and prepare to draw n samples from it in batches. Raises InputError for what can't be drawn."""
    stage = read_checkpoint(ckpt, "prior", "vqgan")["codegrid"]["stage"]
    if stage == "prior":
        return prior_source(ckpt, sampler, n, seed, batch_size, label, device)
    return tokenizer_source(ckpt, sampler, n, seed, batch_size, device)


def prior_source(
    ckpt: str,
    sampler: Sampler,
    n: int,
    seed: int,
    batch_size: int,
    label: Any,
    device: torch.device,
) -> SampleSource:
    """Codes from a prior; `label` is what choose_labels takes."""
    trained = load_prior(ckpt)
    model = trained.model.to(device)
    tokenizer = trained.tokenizer.to(device)
    labels = choose_labels(trained.classes, label, n)
    if labels is None and sampler.guidance != 1:
        raise InputError(
            f"sampler.guidance={sampler.guidance} needs a prior of classes; "
            "train one with conditional=true"
        )
    check_compile_sampler(model, sampler, device.type)
    known = sampler.known(sampler.size(model.grid))
    init_codes: Tensor | None = None
    head: list[Tensor] = []
    if sampler.init_image is not None:
        init_codes, head = encode_init_image(
            sampler.init_image, tokenizer, known, read_rules(trained.data)
        )
    batches = generate(model, sampler, n, seed, batch_size, labels, init_codes)
    drawn = ((codes, tokenizer.quantizer.lookup(codes)) for codes in batches)
    flip = trained.config["flip"]
    return SampleSource(tokenizer, drawn, trained.name, trained.data, flip, labels, head)


def tokenizer_source(
    ckpt: str, sampler: Sampler, n: int, seed: int, batch_size: int, device: torch.device
) -> SampleSource:
    """Latents of a tokenizer by itself, from the distribution that its bottleneck was trained towards."""
    tokenizer, described = load_tokenizer(ckpt)
    if sampler.init_image is not None:
        raise InputError(
            f"sampler.init_image={sampler.init_image} needs a prior, and ckpt={ckpt} is a tokenizer"
        )
    tokenizer = tokenizer.to(device)
    latents = tokenizer.quantizer.sample_latents(n, sampler.size(tokenizer.grid), seed)
    drawn = ((None, part) for part in latents.split(batch_size))
    name = find_checkpoint(ckpt).parent.parent.name
    return SampleSource(tokenizer, drawn, name, described["data"], described["data"]["flip"])


@torch.no_grad()
def decode_all(source: SampleSource, n: int, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """All samples (n, C, H, W) uint8 and their codes, if there are any, on the CPU."""
    tokenizer = source.tokenizer
    device = next(tokenizer.parameters()).device
    images: list[Tensor] = []
    codes: list[Tensor] = []
    with autocast(device), progress_bar(n, "samples") as bar:
        for indices, latents in source.drawn:
            # As many pixels at once as a batch of the tokenizer's own size has, however large the grid is.
            pixels = batch_size * math.prod(tokenizer.grid)
            at_once = max(1, pixels // math.prod(latents.shape[2:]))
            images += [to_uint8(tokenizer.decode(part)).cpu() for part in latents.split(at_once)]
            if indices is not None:
                codes.append(indices.cpu())
            bar.update(len(latents))
    return torch.cat(images), torch.cat(codes) if codes else None


def save_codes(codes: Tensor, labels: Tensor | None, folder: Path) -> None:
    """Write codes.pt with the codes, and the labels if there are any."""
    content = {"codes": codes} if labels is None else {"codes": codes, "labels": labels}
    torch.save(content, folder / "codes.pt")
