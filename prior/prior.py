"""A trained prior with its tokenizer: all that a script or a notebook needs of stage 2."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from codegrid.data.labels import ClassTable
from codegrid.engine.defaults import read_defaults
from codegrid.engine.errors import InputError, check_int, check_seed, suggest
from codegrid.engine.precision import autocast, deterministic_float32
from codegrid.engine.sizes import Size, SizeSetting, write_size
from prior.coding.codec import Codec
from prior.coding.file import DAMAGED_CODES, CodedFile
from prior.conditioning.base import Condition, check_guidance, shorten_value
from prior.conditions import check_places, choose_labels, encode_init_image, list_labels
from prior.decoding.generate import check_sampler_fits, generate
from prior.decoding.pictures import decode_latents
from prior.decoding.sampling import Sampler, make_sampler, write_grid
from prior.likelihood import judge_codes
from prior.models.base import PriorModel
from vqgan.pictures import Picture, list_pictures, to_pictures
from vqgan.tokenizer import Tokenizer

# The number or name of a class, -1 for no class, or several of them.
Label = int | str | Sequence[int | str] | Tensor | NDArray[Any] | None
Output = Literal["pil", "tensor", "array", "codes"]
Drawings = list[Image.Image] | Tensor | NDArray[Any]

SAMPLE_OUTPUTS = ("pil", "tensor", "array", "codes")
COMPLETED = ("init_image", "rows", "region")  # settings of what stays of an image


class SamplingSettings(TypedDict, total=False):
    """How samples are drawn; conf/sampler/default.yaml and conf/stage/sample.yaml say more and have the defaults.

    seed                of the samples, 0 to 2^32 - 1: sample i depends on the seed and i only
    label               the number or name of a class, -1 for no class, or several to cycle through; by default all classes
    condition           of a prior of vectors: one of its size or several, an array, a .npy file, or a mapping of columns to values;
                        of a prior of other images: these, or a folder of them; several are cycled through; "none" for none
    batch_size          samples at once; they do not depend on it
    temperature         above 0; below 1: more likely codes; above 1: more varied ones
    top_k               draw from the k most likely codes; 0: from all
    top_p               draw from the most likely codes with this total probability, above 0 to 1 (Holtzman et al. 2020)
    min_p               draw from codes at least this many times as likely as the most likely one, 0 to 1 (Nguyen et al. 2024)
    guidance            with a condition: above 1, samples are more typical of it (Ho & Salimans 2022); 1: none
    guidance_power      above 0, guidance grows from 1 over the grid
    steps               of priors that draw many codes in one step; 0: the prior's own
    order               of maskgit and diffusion: halton, random or confidence (Besnier et al. 2025); None: the prior's own
    choice_temperature  of order="confidence": noise in the choice of codes to accept (Chang et al. 2022)
    corrector           of maskgit and diffusion: steps after each step that draw as many codes again
    remask              of maskgit and diffusion: share of the codes that can be masked again in a step and are, 0 to 1
    compile             compile the steps of gpt, rar and rq
    parallel            of gpt and rar: positions drawn in one pass, from the same distribution; "auto": as many as pay
    """

    seed: int
    label: Label
    condition: Any
    batch_size: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    guidance: float
    guidance_power: float
    steps: int
    order: str | None
    choice_temperature: float
    corrector: int
    remask: float
    compile: bool
    parallel: int | Literal["auto"]


@dataclass(repr=False, eq=False)
class Prior:
    """A trained prior and its tokenizer, in eval mode and on one device.

    model         logits of codes: what stage=prior trains
    tokenizer     images <-> codes: the one that the prior was trained on
    name          of the prior's run
    config        of the prior's run
    data          the config of the tokenizer's images, in the places where the prior's run had them
    classes       names and labels of its classes; empty for a prior without
    tokenizer_of  the id of the tokenizer's run
    condition     what it is conditioned on beside classes: vectors of numbers, or the codes of another image; None: neither

    Wrong values raise InputError, a ValueError, with the sentences of the command line.
    """

    model: PriorModel
    tokenizer: Tokenizer
    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    classes: ClassTable
    tokenizer_of: str | None
    condition: Condition | None = None

    @classmethod
    def from_pretrained(
        cls, ckpt: str | Path, revision: str | None = None, *, trust: Sequence[str] = ()
    ) -> "Prior":
        """The prior that `ckpt` names, in eval mode on the CPU, with averaged weights if the run has them.

        ckpt        a run folder of stage=prior, or a checkpoint in one; a folder that stage=export wrote of it with
                    format=safetensors; or the hub id of one, owner/name
        revision    on the hub: a branch, a tag or a commit; None: the newest
        trust       full names of classes of your own that the run has, as in trust=["mine.Prior"]

        Raises InputError for anything else, and if the tokenizer is missing or not the one that it was trained on.
        """
        load = resolve_name("prior.pretrained").load_any_prior  # by name: it builds this class
        trained: Prior = load(ckpt, revision, trust)
        return trained

    def to(self, device: torch.device | str) -> "Prior":
        """Move all networks to a device, in place; returns the prior itself."""
        self.model.to(device)
        self.tokenizer.to(device)
        if self.condition is not None:
            self.condition.to(device)
        return self

    def use_decoder(self, tokenizer: Tokenizer, name: str = "this tokenizer") -> "Prior":
        """Decode samples by another tokenizer of the same codes, in place; returns the prior itself.

        Such a tokenizer comes from stage=vqgan init=<the prior's tokenizer> learn=decoder, with codes=<the prior> or without.
        Raises InputError, with `name` in its sentence, if it has other codes, or was trained for images of another size.
        """
        if tokenizer.fingerprint_codes() != self.tokenizer.fingerprint_codes():
            raise InputError(
                f"{name} has other codes than those that the prior {self.name} learned; give a run of stage=vqgan that started "
                "with init=<the prior's tokenizer> learn=decoder"
            )
        size, own_size = tokenizer.encoder.image_size, self.tokenizer.encoder.image_size
        if size != own_size:
            raise InputError(
                f"{name} decodes images of {write_size(size)} pixels, and the prior {self.name} draws codes of "
                f"{write_size(own_size)}; give a run of data.image_size={write_size(own_size)}"
            )
        self.tokenizer = tokenizer.to(self.device)
        return self

    def __repr__(self) -> str:
        weights = sum(p.numel() for p in self.model.parameters())
        h, w = self.grid
        classes = f", {len(self.classes)} classes" if len(self.classes) else ""
        if self.condition is not None:
            classes = f", of {self.condition.summarize()}"
        return (
            f"Prior({self.name}: {type(self.model).__name__}, {weights:,} weights, {h}x{w} codes out of {self.K:,}{classes}, "
            f"on {self.device})"
        )

    @property
    def device(self) -> torch.device:
        return next(self.tokenizer.parameters()).device

    @property
    def K(self) -> int:
        """Codes per codebook."""
        return self.model.K

    @property
    def grid(self) -> Size:
        """Rows and columns of codes of an image, the grid that the prior learned."""
        return self.model.grid

    @overload
    def sample(
        self,
        n: int,
        *,
        grid: str | SizeSetting | None = ...,
        output: Literal["pil"] = ...,
        **settings: Unpack[SamplingSettings],
    ) -> list[Image.Image]: ...

    @overload
    def sample(
        self,
        n: int,
        *,
        grid: str | SizeSetting | None = ...,
        output: Literal["tensor", "codes"],
        **settings: Unpack[SamplingSettings],
    ) -> Tensor: ...

    @overload
    def sample(
        self,
        n: int,
        *,
        grid: str | SizeSetting | None = ...,
        output: Literal["array"],
        **settings: Unpack[SamplingSettings],
    ) -> NDArray[Any]: ...

    def sample(
        self,
        n: int,
        *,
        grid: str | SizeSetting | None = None,
        output: Output = "pil",
        **settings: Unpack[SamplingSettings],
    ) -> Drawings:
        """Draw n samples: those of stage=sample with the same seed and settings, to the bit.

        `settings` are those of SamplingSettings: seed, label, temperature, top_k, top_p, min_p, guidance, batch_size ...
        `grid` is (rows, columns) of codes, or one number for a square, at least the prior's own: larger pictures are drawn window
        by window.

        Returns n Pillow images of the channels that pictures of the data show; with output="tensor" (n, C, H, W) float32 in
        [-1, 1], and with output="codes" (n, h, w) or (n, h, w, num_codebooks) int64 in [0, K), both on the CPU; with
        output="array" a numpy array (n, H, W, C) in the units of the data, the values that save=[npy] writes. Models run in
        bfloat16 where the hardware computes in it.
        """
        check_int("n", n, 1)
        return self._draw(n, None, output, settings, grid=grid)

    @overload
    def complete(
        self,
        images: Picture | Iterable[Picture],
        rows: int | None = ...,
        *,
        region: Sequence[int] | None = ...,
        n: int = ...,
        output: Literal["pil"] = ...,
        **settings: Unpack[SamplingSettings],
    ) -> list[Image.Image]: ...

    @overload
    def complete(
        self,
        images: Picture | Iterable[Picture],
        rows: int | None = ...,
        *,
        region: Sequence[int] | None = ...,
        n: int = ...,
        output: Literal["tensor", "codes"],
        **settings: Unpack[SamplingSettings],
    ) -> Tensor: ...

    @overload
    def complete(
        self,
        images: Picture | Iterable[Picture],
        rows: int | None = ...,
        *,
        region: Sequence[int] | None = ...,
        n: int = ...,
        output: Literal["array"],
        **settings: Unpack[SamplingSettings],
    ) -> NDArray[Any]: ...

    def complete(
        self,
        images: Picture | Iterable[Picture],
        rows: int | None = None,
        *,
        region: Sequence[int] | None = None,
        n: int = 1,
        output: Output = "pil",
        **settings: Unpack[SamplingSettings],
    ) -> Drawings:
        """Draw the rest of images n times each: what stage=sample draws with sampler.init_image, to the bit.

        Images are what Tokenizer.encode_images takes: paths, Pillow images, arrays or tensors, one or several. The upper `rows`
        rows of their codes stay, or all codes outside the `region` (top, left, bottom, right), in codes, bottom and right
        exclusive; only masked priors read what comes after it. `settings` are those of SamplingSettings.

        Conditions are those of the images in turn; of one image, those of its completions.

        Returns what `sample` does: n completions of the first image, then those of the second ...
        """
        check_int("n", n, 1)
        pictures = list(list_pictures(images))
        if not pictures:
            raise InputError("complete needs an image, and got an empty list")
        first = pictures[0]
        name = str(first) if isinstance(first, str | Path) else type(first).__name__
        return self._draw(n, pictures, output, settings, init_image=name, rows=rows, region=region)

    def nats(
        self,
        images: Picture | Iterable[Picture],
        *,
        label: Label = None,
        condition: Any = None,
        per_position: bool = False,
        batch_size: int | None = None,
    ) -> Tensor:
        """-log p(codes of an image | label) of each image, in nats: (B,) float64 on the CPU (VQGAN, Esser et al. 2021, eq. 9).

        With per_position=True that of each code, (B, h, w) or (B, h, w, num_codebooks) float32, whose sum it is. Divided by
        log 2 it is in bits, divided by the number of codes per token. It is the likelihood of the codes, not of the pixels. Of
        priors that are not `model.exact` (maskgit, diffusion) it is an unbiased estimate of an upper bound.

        Images are what Tokenizer.encode_images takes. A prior of classes needs `label`: one class for all images, or as many as
        there are images; -1 is no class. One of another condition needs `condition`, as `sample` takes it. Encoded as for training,
        judged in float32.
        """
        batch = read_batch_size(batch_size)
        self._require_label(label)
        with autocast(self.device):
            codes = self.tokenizer.encode_images(images, batch)
        return self.nats_of_codes(
            codes, label=label, condition=condition, per_position=per_position, batch_size=batch
        )

    def nats_of_codes(
        self,
        codes: Tensor,
        *,
        label: Label = None,
        condition: Any = None,
        per_position: bool = False,
        batch_size: int | None = None,
    ) -> Tensor:
        """As `nats`, of codes (B, h, w) or (B, h, w, num_codebooks) on the prior's own grid, such as `sample` returns."""
        batch = read_batch_size(batch_size)
        if codes.ndim == 0 or len(codes):
            self.tokenizer.check_codes(codes)
        h, w, _ = self.model.code_shape
        if tuple(codes.shape[1:3]) != (h, w):
            raise InputError(
                f"codes of shape {list(codes.shape)} must be of the grid that the prior learned, {h}x{w}"
            )
        labels = self.label_images(label, condition, len(codes))
        parts = [torch.empty(0, *self.model.code_shape)]
        for first in range(0, len(codes), batch):
            part = slice(first, first + batch)
            with torch.autocast(self.device.type, enabled=False), deterministic_float32():
                parts.append(
                    judge_codes(self.model, codes[part], None if labels is None else labels[part])
                )
        per_code = torch.cat(parts)
        return per_code.view(codes.shape) if per_position else per_code.double().sum((1, 2, 3))

    def compress(
        self,
        images: Picture | Iterable[Picture],
        *,
        label: Label = None,
        condition: Any = None,
        batch_size: int | None = None,
        verify: bool = True,
    ) -> list[bytes]:
        """Each image as the bytes of a .cgz file: its codes by arithmetic coding under the prior, which needs its nats / (8 log 2)
        bytes for them and 27 for a header without a label (docs/codec.md).

        Images, `label` and `condition` are as for `nats`; the label goes into the header. With `verify` each file is decoded again
        and compared. `decompress` reads the files with any batch size, precision and number of threads, on any machine. Raises
        InputError for a prior that is not `model.exact`, and without the package constriction (codegrid[codec]).
        """
        batch = read_batch_size(batch_size)
        codec = Codec(self.model, self.tokenizer, self.device)
        with autocast(self.device):
            codes = self.tokenizer.encode_images(images, batch)
        labels = self.label_images(label, condition, len(codes))
        files: list[bytes] = []
        for first in range(0, len(codes), batch):
            part = slice(first, first + batch)
            of_part = None if labels is None else labels[part]
            coded = codec.compress(codes[part], of_part, verify)
            files += [image.file.write() for image in coded]
        return files

    @overload
    def decompress(
        self,
        files: bytes | Sequence[bytes],
        *,
        output: Literal["pil"] = ...,
        batch_size: int | None = ...,
    ) -> list[Image.Image]: ...

    @overload
    def decompress(
        self,
        files: bytes | Sequence[bytes],
        *,
        output: Literal["tensor", "codes"],
        batch_size: int | None = ...,
    ) -> Tensor: ...

    @overload
    def decompress(
        self,
        files: bytes | Sequence[bytes],
        *,
        output: Literal["array"],
        batch_size: int | None = ...,
    ) -> NDArray[Any]: ...

    def decompress(
        self,
        files: bytes | Sequence[bytes],
        *,
        output: Output = "pil",
        batch_size: int | None = None,
    ) -> Drawings:
        """The images in the bytes of .cgz files, in the forms in which `sample` returns them, decoded in float32; output="codes":
        the codes that were written, to the bit.

        Raises InputError for what is no such file, was written under another prior or of another tokenizer, or is damaged.
        """
        if output not in SAMPLE_OUTPUTS:
            raise InputError(f"output={output} must be one of {', '.join(SAMPLE_OUTPUTS)}")
        batch = read_batch_size(batch_size)
        codec = Codec(self.model, self.tokenizer, self.device)
        contents = [files] if isinstance(files, bytes | str | Path) else list(files)
        for i, content in enumerate(contents):
            if not isinstance(content, bytes):
                raise InputError(
                    f"file {i} is of type {type(content).__name__}; give the bytes of a file, as Path(name).read_bytes()"
                )
        parsed = [CodedFile.read(content, f"file {i}") for i, content in enumerate(contents)]
        for i, file in enumerate(parsed):
            codec.check(file, f"file {i}")
        grids: list[Tensor] = []
        for first in range(0, len(parsed), batch):
            for i, grid in enumerate(codec.decompress(parsed[first : first + batch]), first):
                if grid is None:
                    raise InputError(f"file {i}: {DAMAGED_CODES}")
                grids.append(grid)
        if not grids:
            raise InputError("decompress needs a file, and got an empty list")
        codes = torch.stack(grids)
        if output == "codes":
            return codes
        with deterministic_float32():
            return self.tokenizer.decode_codes(codes, output, batch)

    def choose_labels(self, label: Any, condition: Any, n: int, sampler: Sampler) -> Tensor | None:
        """The labels (n, ...) of n samples, None for a prior that takes none. Raises InputError for labels, conditions and settings
        of the sampler that this prior or its device doesn't take."""
        labels = self._pick_labels(label, condition, n)
        check_guidance(sampler, self.model)
        if self.model.front is not None and sampler.grid is not None:
            raise InputError(
                f"sampler.grid={write_grid(sampler.grid)} is drawn window by window, and the other image of the condition is of a "
                "whole picture; leave sampler.grid out"
            )
        check_sampler_fits(self.model, sampler, self.device.type)
        return labels

    def _pick_labels(
        self, label: Any, condition: Any, n: int, in_turn: bool = True
    ) -> Tensor | None:
        """The labels (n, ...) of n samples or images: the classes that `label` names, or those that `condition` gives."""
        if self.condition is None:
            if condition is not None:
                needed = "classes, named by label" if len(self.classes) else "none"
                raise InputError(
                    f"condition={shorten_value(condition)} needs a prior that was trained with a condition, and this one has "
                    f"{needed}; train one with condition=<columns, file or run>"
                )
            return choose_labels(self.classes, label, n)
        if label is not None:
            raise InputError(
                f"label={label} is of priors of classes, and this one is conditioned on {self.condition.summarize()}; give "
                "condition instead"
            )
        return self.condition.choose(self.model, condition, n, in_turn)

    @torch.no_grad()
    def _draw(
        self,
        n: int,
        pictures: Sequence[Picture] | None,
        output: str,
        settings: SamplingSettings,
        **chosen: Any,
    ) -> Drawings:
        """n samples, or n completions of each picture; `chosen` are further settings of the sampler."""
        if output not in SAMPLE_OUTPUTS:
            raise InputError(f"output={output} must be one of {', '.join(SAMPLE_OUTPUTS)}")
        seed, label, condition, batch_size, of_sampler = split_settings(settings)
        sampler = make_sampler(**of_sampler, **chosen)
        total = n if pictures is None else n * len(pictures)
        if pictures is not None and len(pictures) > 1 and self.condition is not None:
            of_pictures = self.choose_labels(label, condition, len(pictures), sampler)
            labels = None if of_pictures is None else of_pictures.repeat_interleave(n, 0)
        else:
            labels = self.choose_labels(label, condition, total, sampler)
        check_places(sampler, self.tokenizer, self.grid)
        grid = sampler.size(self.grid)
        known = sampler.known(grid)  # raises for what does not fit the grid
        places = grid if self.grid == self.tokenizer.grid else self.tokenizer.grid
        init_codes = None
        if pictures is not None:
            each = [encode_init_image(picture, self.tokenizer)[0] for picture in pictures]
            whole = torch.stack(each)
            restricted = self.tokenizer.quantizer.restrict(whole, known.to(whole.device))
            init_codes = restricted.repeat_interleave(n, 0)
        rules = self.tokenizer.rules
        codes: list[Tensor] = []
        images: list[Tensor] = []
        values: list[NDArray[Any]] = []
        shown: list[Image.Image] = []
        with autocast(self.device):
            for batch in generate(self.model, sampler, total, seed, batch_size, labels, init_codes):
                if output == "codes":
                    codes.append(batch.cpu())
                    continue
                latents = self.tokenizer.quantizer.lookup_on(batch, places)
                for part in decode_latents(self.tokenizer, latents, batch_size):
                    if output == "pil":
                        shown += to_pictures(part, rules)
                    elif output == "array":
                        values.append(rules.to_units(part).transpose(0, 2, 3, 1))
                    else:
                        images.append(part.clamp(-1, 1).cpu())
        if output == "array":
            return np.concatenate(values)
        return shown if output == "pil" else torch.cat(codes or images)

    def _require_label(self, label: Label) -> None:
        """Raise InputError if the likelihood of an image depends on a class that nobody names."""
        if label is None and len(self.classes):
            raise InputError(
                "nats of a prior of classes are those of an image of a class; give label=<class> for all images, a list with "
                "one for each, or label=-1 for no class"
            )

    def label_images(self, label: Label, condition: Any, n: int) -> Tensor | None:
        """The labels (n, ...) of n images whose likelihood is asked for, None for a prior that takes none.

        Raises InputError for labels and conditions that it does not take, or that are neither one for all nor one for each.
        """
        self._require_label(label)
        if self.condition is not None or condition is not None:
            return self._pick_labels(label, condition, n, in_turn=False)
        several = list_labels(label)
        if len(several) not in (1, n):
            raise InputError(
                f"label has {len(several)} classes for {n} images; give one for all, or one for each"
            )
        return choose_labels(self.classes, label, n)


def split_settings(settings: SamplingSettings) -> tuple[int, Any, Any, int, dict[str, Any]]:
    """Seed, label, condition, batch size, and the settings of the sampler, with the defaults of conf/. Raises InputError for
    others."""
    rest: dict[str, Any] = dict(settings)
    names = list(SamplingSettings.__annotations__)
    for name, value in rest.items():
        if name in COMPLETED:
            raise InputError(
                f"{name}={value} is of complete(image, rows=4), which keeps part of an image"
            )
        if name not in names:
            raise InputError(
                f"{name}={value} is no setting of sampling{suggest(name, names) or ';'} there is {', '.join(names)}"
            )
    seed = rest.pop("seed", read_defaults("config")["seed"])
    label, condition = rest.pop("label", None), rest.pop("condition", None)
    batch_size = read_batch_size(rest.pop("batch_size", None))
    check_seed(seed)
    return seed, label, condition, batch_size, rest


def read_batch_size(batch_size: int | None) -> int:
    """The number of images at once, by default that of stage=sample."""
    value = read_defaults("stage/sample")["batch_size"] if batch_size is None else batch_size
    check_int("batch_size", value, 1, "image")
    return int(value)
