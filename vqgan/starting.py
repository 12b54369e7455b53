"""What a tokenizer starts with: images, or the tokenizer of another run (`init`) with its architecture and weights."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.checkpoint import describe_names, find_resumable
from codegrid.engine.console import log_line
from codegrid.engine.environment import keys_of_experiment, read_overrides
from codegrid.engine.errors import InputError
from codegrid.engine.folder import read_record
from codegrid.engine.loggers import MAX_TAG
from codegrid.engine.run import Run
from codegrid.engine.sizes import write_size
from codegrid.engine.sweep import ADOPTED_GROUPS
from codegrid.engine.words import clean_key
from vqgan.architecture import Adoption, adopt_architecture
from vqgan.channels import describe_new_layers, fold_image_layers
from vqgan.load import load_tokenizer, start_images
from vqgan.losses.code_changes import CodeChange
from vqgan.quantizers.search import flatten
from vqgan.tokenizer import RANDOM_START_IMAGES, Tokenizer

VECTORS_PER_CODE = (
    16  # encoder outputs by which the crowded codes are known before a codebook grows
)


class Start(ABC):
    """How a tokenizer gets its first weights.

    origin    what metrics.json and the card say of it
    tags      by which the loggers find the run
    """

    origin: Mapping[str, Any] = {}
    tags: tuple[str, ...] = ()

    @abstractmethod
    def fill(self, tokenizer: Tokenizer, data: ImageDataModule) -> None:
        """Set the weights of a tokenizer, in place, before its first update."""

    def read_codes(self) -> Tokenizer | None:
        """A tokenizer of the codes that the run starts with; None if they are new."""
        return None

    def check_changes(self, changes: Sequence[CodeChange]) -> None:
        """Raise InputError for changes of other codes than those that the run starts with."""
        if changes and (tokenizer := self.read_codes()) is not None:
            for change in changes:
                change.check_codes(tokenizer)


class ImageStart(Start):
    """Linear maps and codes are fitted to training images."""

    def fill(self, tokenizer: Tokenizer, data: ImageDataModule) -> None:
        tokenizer.initialise(start_images(data, tokenizer.start_images))


class ResumedStart(Start):
    """A checkpoint of this run, in `folder`, has all weights. `of` is the id of the run that `init` named at first, None without
    one."""

    def __init__(self, folder: Path, of: str | None) -> None:
        self.folder = folder
        self.origin, self.tags = describe_start(of)

    def read_codes(self) -> Tokenizer:
        tokenizer, _ = load_tokenizer(find_resumable(self.folder), setting="resume")
        return tokenizer

    def fill(self, tokenizer: Tokenizer, data: ImageDataModule) -> None:
        """Leave everything to the checkpoint."""


class RunStart(Start):
    """The weights are those of another run's tokenizer, as far as channels and codes are the same.

    groups    the `model` and `quantizer` of this run's config
    """

    def __init__(self, wanted: Adoption) -> None:
        self.wanted = wanted
        self.source, described = load_tokenizer(wanted.init, setting="init")
        self.groups = adopt_architecture(self.source, described, wanted)
        self.origin, self.tags = describe_start(described.get("id"))

    def fill(self, tokenizer: Tokenizer, data: ImageDataModule) -> None:
        source, expected = self.source, tokenizer.state_dict()
        grows = tokenizer.K != source.K
        weights = {
            name: value
            for name, value in fold_image_layers(source, tokenizer).items()
            if not (grows and name.startswith("quantizer."))
        }
        self.check_shapes(weights, expected)
        tokenizer.load_state_dict({**expected, **weights})
        if tokenizer.K is not None and grows:
            vectors = take_vectors(tokenizer, data, tokenizer.K)
            tokenizer.quantizer.grow_from(source.quantizer, vectors)
        for sentence in self.describe(tokenizer):
            log_line(sentence)
        del self.source  # the run does not need a second tokenizer

    def read_codes(self) -> Tokenizer:
        return self.source

    def check_shapes(self, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Raise InputError if a weight depends on the image in a way that its network's settings don't say."""
        others = describe_names(
            "other shapes",
            (
                f"{name} {list(weights[name].shape)} instead of {list(expected[name].shape)}"
                for name in weights
                if weights[name].shape != expected[name].shape
            ),
        )
        if others:
            raise InputError(
                f"init={self.wanted.init} can't serve data.image_size={write_size(self.wanted.image_size)} and "
                f"data.channels={self.wanted.channels}, for its weights depend on them ({others[0]}); "
                f"use data.image_size={write_size(self.source.encoder.image_size)} data.channels={self.source.encoder.channels}"
            )

    def describe(self, tokenizer: Tokenizer) -> Iterator[str]:
        """What the run starts with and what of it is new, for the terminal."""
        init, source, encoder = self.wanted.init, self.source, tokenizer.encoder
        codes = "no codes" if source.K is None else f"{source.K} codes"
        yield (
            f"init={init}: {type(source.encoder).__name__} with {codes}, {write_size(encoder.image_size)} pixels to "
            f"{describe_grid(tokenizer)}"
        )
        if encoder.channels != source.encoder.channels:
            yield describe_new_layers(f"init={init}", source.encoder.channels, encoder.channels)
        if tokenizer.K != source.K:
            yield f"init={init}: the codebook grows from {source.K} to {tokenizer.K} codes, which split the crowded ones"


def choose_start(run: Run, data: ImageDataModule) -> Start:
    """How the tokenizer of a run starts. With `init`, the run's config gets the architecture of the tokenizer that it names."""
    config = run.config
    if run.resume:
        return ResumedStart(run.resume, read_record(run.resume, "of"))
    if not config.init:
        if config.grow:
            raise InputError("grow=true is for a run that starts with init=...; leave grow out")
        return ImageStart()
    keys = [clean_key(word) for word in read_overrides()]
    keys += keys_of_experiment(config, ADOPTED_GROUPS)
    wanted = Adoption(
        str(config.init),
        data.image_size,
        data.channels,
        bool(config.grow),
        [key for key in keys if key.split(".")[0] in ADOPTED_GROUPS],
        {name: OmegaConf.to_container(config[name], resolve=True) for name in ADOPTED_GROUPS},
    )
    start = RunStart(wanted)
    for name in ADOPTED_GROUPS:
        config[name] = start.groups[name]
    return start


def describe_grid(tokenizer: Tokenizer) -> str:
    """The codes of an image in words."""
    if not tokenizer.is_spatial:
        return f"a sequence of {tokenizer.grid[1]}"
    return f"a grid of {'x'.join(map(str, tokenizer.grid))} (f={tokenizer.f})"


def describe_start(of: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The origin and the tags of a run that started with the tokenizer of run `of`; nothing for None."""
    return ({}, ()) if of is None else ({"of": of}, (f"init={of}"[:MAX_TAG],))


@torch.no_grad()
def take_vectors(tokenizer: Tokenizer, data: ImageDataModule, K: int) -> Tensor:
    """What the encoder makes of training images, (n, in_dim of the quantizer): enough for K codes."""
    n = -(-VECTORS_PER_CODE * K // (tokenizer.grid[0] * tokenizer.grid[1]))
    images, _ = data.take_evenly("train", min(n, RANDOM_START_IMAGES))
    x = data.preprocess(images.to(next(tokenizer.parameters()).device))
    return torch.cat([flatten(tokenizer.encode_input(part)) for part in x.split(16)])
