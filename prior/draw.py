"""What stage=sample draws from, a prior or a tokenizer by itself, and the loop that draws."""

import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.pictures import save_picture
from codegrid.data.samples import ArraySamples
from codegrid.engine.card import write_card
from codegrid.engine.checkpoint import find_checkpoint, read_checkpoint
from codegrid.engine.console import best_effort_write, log_line, progress_bar
from codegrid.engine.distributed import cluster_plugins
from codegrid.engine.errors import InputError
from codegrid.engine.exit_codes import SIGNALS
from codegrid.engine.folder import CARD
from codegrid.engine.precision import autocast
from codegrid.engine.resume import resume_command
from codegrid.evaluation.units import describe_shown
from prior.conditioning.base import NO_CONDITION, Condition
from prior.conditioning.images import hash_labels, open_recorded_labels
from prior.conditions import check_places, encode_init_image, show_init_image
from prior.decoding.generate import generate
from prior.decoding.kv_decoder import StepCache
from prior.decoding.pictures import decode_latents, show_pixels
from prior.decoding.sampling import Sampler
from prior.load import load_prior, refuse_decoder
from prior.models.base import PriorModel
from prior.neighbours import MAX_JUDGED, find_neighbours
from prior.prior import Prior
from prior.samples import explain_shown, save_grid
from prior.saving import (
    CodeFile,
    FirstSamples,
    NpyFile,
    NpzFile,
    PngFiles,
    SampleBatch,
    SampleFiles,
    SampleSaver,
    ShardFiles,
    explain_write_errors,
)
from vqgan.load import load_images, load_tokenizer
from vqgan.tokenizer import Tokenizer, hash_weights

Drawn = Iterator[
    tuple[Tensor | None, Tensor]
]  # codes, if there are any, and what the decoder takes


@dataclass(frozen=True)
class Wanted:
    """What the samples of a conditional prior are to be of: the settings label and condition of stage=sample.

    data        where this command has the prior's images
    condition_data   where it has those of the condition's tokenizer
    """

    label: Any = None
    condition: Any = None
    data: Mapping[str, Any] = field(default_factory=dict)
    condition_data: Mapping[str, Any] = field(default_factory=dict)
    is_dry: bool = False  # whether no images are to be read: samples are then of no condition

    @classmethod
    def read(cls, settings: Mapping[str, Any], is_dry: bool) -> "Wanted":
        """The settings in a stage's config, which has others too."""
        names = [each.name for each in fields(cls) if each.name != "is_dry"]
        return cls(**{name: settings[name] for name in names if name in settings}, is_dry=is_dry)

    def choose_labels(
        self, trained: Prior, n: int, sampler: Sampler, ckpt: str | Path
    ) -> Tensor | None:
        """The labels (n, ...) of n samples; by default the conditions of the validation images in turn."""
        is_split = self.condition in (None, "val", "train")
        if trained.condition is None or self.label is not None or not is_split:
            return trained.choose_labels(self.label, self.condition, n, sampler)
        blank = trained.choose_labels(
            None, NO_CONDITION, n, sampler
        )  # raises for settings of the sampler
        if self.is_dry:
            return blank
        images = load_images(trained.data, self.data, ckpt)
        changes = {"condition_data": self.condition_data}
        labels = open_recorded_labels(trained.condition, trained.config, images, ckpt, changes)
        assert labels is not None
        device = trained.device.type
        fabric = Fabric(accelerator=device, devices=1, plugins=cluster_plugins(1))
        of_images = labels.read(self.condition or "val", fabric=fabric)
        chosen = ArraySamples(of_images, of_images).__getitems__(
            [i % len(of_images) for i in range(n)]
        )
        return chosen[1]


@dataclass
class SampleSource:
    """A model to draw from, on its device.

    `draw(start)` yields the batches of the samples from number `start` on. `grid` (h, w) is that of a sample, and `code_shape`
    the shape of its codes, if it has any. `data` is the config of the images the model was trained on, `flip` whether it also
    learned them mirrored; `labels` (n, ...) are the samples' classes or what else they are conditioned on by `condition`, if there
    are any, and `classes` the names of all; `head` are pictures to show before the samples. `about` identifies the model and the
    codes that it completes; `model` is the prior, if there is one, and `cache` counts its passes where sampler.parallel may make
    them fewer.
    """

    tokenizer: Tokenizer
    draw: Callable[[int], Drawn]
    grid: tuple[int, int]
    name: str
    data: Mapping[str, Any]
    flip: bool
    about: dict[str, Any]
    code_shape: tuple[int, ...] | None = None
    labels: Tensor | None = None
    classes: Sequence[str] = ()
    head: list[Tensor] = field(default_factory=list)
    model: PriorModel | None = None
    cache: StepCache | None = None
    condition: Condition | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample."""
        h, w = self.grid
        if not self.tokenizer.is_spatial:
            return self.tokenizer.encoder.channels, *self.tokenizer.encoder.image_size
        return self.tokenizer.encoder.channels, h * self.tokenizer.f, w * self.tokenizer.f


def open_source(
    ckpt: str,
    sampler: Sampler,
    n: int,
    seed: int,
    batch_size: int,
    wanted: Wanted,
    device: torch.device,
    decoder: str | None = None,
) -> SampleSource:
    """Load what `ckpt` names, and prepare to draw n samples from it in batches. Raises InputError for what can't be drawn."""
    stage = read_checkpoint(ckpt, "prior", "vqgan")["codegrid"]["stage"]
    if stage == "prior":
        return prior_source(ckpt, sampler, n, seed, batch_size, wanted, device, decoder)
    refuse_decoder(ckpt, decoder)
    return tokenizer_source(ckpt, sampler, n, seed, batch_size, device)


def prior_source(
    ckpt: str,
    sampler: Sampler,
    n: int,
    seed: int,
    batch_size: int,
    wanted: Wanted,
    device: torch.device,
    decoder: str | None = None,
) -> SampleSource:
    """Codes from a prior; `decoder` is what load_prior takes."""
    trained = load_prior(ckpt, decoder).to(device)
    model, tokenizer = trained.model, trained.tokenizer
    labels = wanted.choose_labels(trained, n, sampler, ckpt)
    check_places(sampler, tokenizer, model.grid)
    grid = sampler.size(model.grid)
    known = sampler.known(grid)
    places = grid if model.grid == tokenizer.grid else tokenizer.grid
    about: dict[str, Any] = {"model": f"{hash_weights(model)}-{tokenizer.fingerprint()}"}
    if trained.condition is not None and labels is not None:
        about["condition"] = hash_labels(labels.numpy())
    init_codes: Tensor | None = None
    head: list[Tensor] = []
    if sampler.init_image is not None:
        init_codes, image = encode_init_image(sampler.init_image, tokenizer)
        head = show_init_image(image, init_codes, tokenizer, known)
        about["init_image"] = zlib.crc32(init_codes.cpu().numpy().tobytes())
        init_codes = tokenizer.quantizer.restrict(init_codes[None], known.to(device))

    cache = StepCache(sampler.compile)

    def draw(start: int) -> Drawn:
        settings = (n, seed, batch_size, labels, init_codes, start, cache)
        for codes in generate(model, sampler, *settings):
            yield codes, tokenizer.quantizer.lookup_on(codes, places)

    return SampleSource(
        tokenizer,
        draw,
        places,
        trained.name,
        trained.data,
        trained.config["flip"],
        about,
        tokenizer.quantizer.code_shape(places),
        labels,
        trained.classes.names,
        head,
        model,
        cache if sampler.parallel != 1 else None,
        trained.condition,
    )


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
    check_places(sampler, tokenizer)
    grid = sampler.size(tokenizer.grid)

    def draw(start: int) -> Drawn:
        latents = tokenizer.quantizer.sample_latents(n, grid, seed, batch_size, start)
        return ((None, part) for part in latents)

    draw(n)  # a bottleneck that can't be sampled raises here
    name = find_checkpoint(ckpt).parent.parent.name
    data = described["data"]
    about = {"model": tokenizer.fingerprint()}
    return SampleSource(tokenizer, draw, grid, name, data, data["flip"], about)


def open_saver(
    folder: Path,
    source: SampleSource,
    save: Sequence[str],
    n: int,
    shown: int,
    shard_size: int,
) -> SampleSaver:
    """What saves n samples in the forms that `save` names, in `folder`, where an earlier run may have begun.

    `shown` is how many of the first samples the grid's picture shows at most.
    """
    channels, *size = source.image_shape
    rules = source.tokenizer.rules
    if remark := explain_shown(save, rules, channels):
        log_line(remark)
    forms: dict[str, SampleFiles] = {}
    if "png" in save:
        forms["png"] = PngFiles(folder / "samples")
    if "npz" in save:
        forms["npz"] = NpzFile(folder / "samples.npz", (n, *size, 3))
    if "npy" in save:
        forms["npy"] = NpyFile(folder / "samples.npy", (n, *size, channels), rules)
    if "shards" in save:
        forms["shards"] = ShardFiles(folder / "shards", n, shard_size)
    if source.code_shape is not None:
        shape = (n, *source.code_shape)
        forms["codes"] = CodeFile(folder / "codes.pt", shape, source.labels, source.classes)
    first = max(shown if "grid" in save else 0, MAX_JUDGED if "neighbours" in save else 0)
    if first:
        of_first = (min(n, first), channels, *size)
        forms["first"] = FirstSamples(folder / "first", of_first, rules.depth)
    return SampleSaver(folder, n, source.about, forms)


def draw_all(source: SampleSource, saver: SampleSaver, batch_size: int) -> dict[str, float]:
    """Draw the samples that the saver lacks and save them, a batch at a time.

    Returns the forward passes that a sample took, on average, if the source counts them.
    """
    start = saver.resume()
    drawn = source.draw(start)
    with (
        note_interruption(saver),
        exit_on_signals(),
        progress_bar(saver.n, "samples", done=start) as bar,
    ):
        while saver.done < saver.n:
            batch = draw_batch(source, drawn, saver.done, batch_size, "npy" in saver.forms)
            saver.save(batch)
            bar.update(len(batch.images))
    passes = 0 if source.cache is None else source.cache.passes
    return {"passes_per_sample": passes / (saver.n - start)} if passes else {}


@torch.no_grad()
def draw_batch(
    source: SampleSource, drawn: Drawn, first: int, batch_size: int, has_values: bool = False
) -> SampleBatch:
    """The next batch, decoded: samples from number `first` on; with `has_values` also in the units of the data."""
    tokenizer = source.tokenizer
    rules = tokenizer.rules
    device = next(tokenizer.parameters()).device
    values: list[NDArray[Any]] = []
    images: list[Tensor] = []
    with autocast(device):
        codes, latents = next(drawn)
        for part in decode_latents(tokenizer, latents, batch_size):
            images.append(rules.to_pixels(part).cpu())
            if has_values:
                values.append(rules.to_units(part))
    pixels = torch.cat(images)
    return SampleBatch(
        first,
        pixels,
        codes=None if codes is None else codes.cpu(),
        labels=None if source.labels is None else source.labels[first : first + len(latents)],
        pictures=show_pixels(pixels, rules),
        values=np.concatenate(values) if has_values else None,
    )


def save_pictures(
    saver: SampleSaver,
    source: SampleSource,
    save: Sequence[str],
    data: ImageDataModule | None,
    columns: int,
    rows: int,
) -> dict[str, Any]:
    """Save the pictures that `save` names, of the first samples on disk; returns what the result says about them.

    `data` are the images that neighbours are looked for in, None if there is nothing to look for.
    """
    first = saver.first_samples()
    figures: dict[str, Any] = {}
    pictures: list[Path] = []
    tokenizer = source.tokenizer
    caption = describe_shown(tokenizer.rules, tokenizer.encoder.channels)
    with explain_write_errors(saver.folder):
        if "grid" in save:
            shown = show_pixels(first, tokenizer.rules)
            pictures.append(save_grid(shown, saver.folder, columns, rows, source.head, caption))
            pictures += save_conditions(source, saver.folder, len(first), columns, rows)
        if data is not None:
            figures, sheet = find_neighbours(first, data, tokenizer, source.flip)
            pictures.append(save_picture(sheet, saver.folder / "neighbours.png", caption))
    return figures | ({"pictures": [str(picture) for picture in pictures]} if pictures else {})


def save_conditions(
    source: SampleSource, folder: Path, n: int, columns: int, rows: int
) -> list[Path]:
    """Save the pictures that the first n samples are conditioned on, in the places that the samples have in samples.png."""
    if source.condition is None or source.labels is None:
        return []
    shown = source.condition.show(source.labels[:n], source.image_shape[1:])
    if shown is None:
        return []
    head = [torch.full_like(shown[:1], 255).expand(len(part), -1, -1, -1) for part in source.head]
    return [save_grid(shown, folder, columns, rows, head, name="conditions.png")]


@contextmanager
def note_interruption(saver: SampleSaver) -> Iterator[None]:
    """Print how to go on, and write it to the card, if the drawing breaks off."""
    try:
        yield
    except BaseException as error:  # Ctrl-C too
        if not isinstance(error, InputError):  # whose sentence says how
            log_line(
                f"stopped after {saver.done:,} of {saver.n:,} samples; {resume_command(saver.folder)}"
            )
        reason = " ".join(f"{type(error).__name__} {error}".split())
        with best_effort_write(saver.folder / CARD):
            write_card(saver.folder, {}, f"broke off after {saver.done:,} samples: {reason}")
        raise


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 raise SystemExit with their exit code, as Ctrl-C raises KeyboardInterrupt."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(SIGNALS[signal.Signals(number)])

    if threading.current_thread() is not threading.main_thread():  # others can't have handlers
        yield
        return
    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for number in earlier:
            signal.signal(number, leave)
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
