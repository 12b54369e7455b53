"""Images to indices and back: the only part of stage 1 that stage 2 sees."""

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from codegrid.data.decode import PLAIN
from codegrid.data.form import FIT_CHOICES, Form
from codegrid.data.pixels import PixelRules
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, check_int, check_range
from codegrid.engine.precision import to_memory_format
from codegrid.engine.sizes import Size, SizeSetting, check_size, write_size
from vqgan.networks.base import ImageDecoder, ImageEncoder
from vqgan.networks.blocks import zero_init
from vqgan.networks.patches import Patches
from vqgan.pictures import (
    Picture,
    check_own_sizes,
    choose_cut,
    choose_form,
    list_pictures,
    pad_to_multiples,
    read_picture,
    to_pictures,
)
from vqgan.quantizers.base import NO_CODES_MESSAGE, Quantized, Quantizer
from vqgan.tiling import run_by_tiles

STARTS = ("patches", "random")
OUTPUTS = ("pil", "tensor", "array")  # of decode_codes
ENCODED_AT_ONCE = 32  # images
PIXEL_RANGES = ((-1, 1), (0, 1))
RANDOM_START_IMAGES = (
    512  # images that go through a random encoder; the networks cost more than patches
)
RANDOM_START_PIXELS = 64 * 64**2  # of the images that go through it at once
START_IMAGES = 2_000  # enough patches for principal components and k-means
LEAST_START_IMAGES = 256  # of large images, which have many codes each
SMALL_IMAGE = 64**2  # pixels, up to which a start costs little memory
MAX_START_VECTORS = 100_000  # enough for k-means
LONG_START = 10  # seconds


class Tokenizer(nn.Module):
    """Encoder -> 1x1 convolution -> quantizer -> convolution -> decoder.

    With start="patches", a linear map of patches is added to both networks, and the tokenizer starts as classical vector
    quantization. With start="random" there are only the networks; None is "patches" where codes have places. `pixels` is the
    range of the images that the networks take and give; images outside are in [-1, 1] in any case. `rules` and `fit` say how
    the images of training became pixels of their size, as encode_images reads its own.

    The first codes of a sequence, or those of the first codebooks of quantizer=residual, are an image by themselves: decode_codes
    takes codes[:, :, :n] or codes[..., :n]. With nested dropout (Rippel et al. 2014) they learn to be one: `nested` is the share
    of training images that are decoded from the first n codes of a sequence, n uniform in 1 ... all - 1. A code that is left out
    counts as zero.
    """

    training_settings = ("nested",)

    rules: PixelRules = PLAIN
    fit: str = FIT_CHOICES[0]

    def __init__(
        self,
        encoder: ImageEncoder,
        quantizer: Quantizer,
        decoder: ImageDecoder,
        start: str | None,
        pixels: Sequence[float] = (-1, 1),
        nested: float = 0.0,
    ) -> None:
        super().__init__()
        if start is None:
            start = STARTS[0] if encoder.is_spatial else STARTS[1]
        if start not in STARTS:
            raise InputError(f"model.start={start} must be null or one of {', '.join(STARTS)}")
        check_nested(nested, encoder)
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        quantizer.bind(encoder.grid if encoder.is_spatial else None)
        if tuple(pixels) not in PIXEL_RANGES:
            raise InputError(f"model.pixels={list(pixels)} must be [-1, 1] or [0, 1]")
        self.pixels = tuple(pixels)
        self.nested = nested
        self.into = join_widths(encoder.out_channels, quantizer.in_dim, encoder.exit_kernel)
        self.out = join_widths(quantizer.dim, decoder.in_channels, decoder.entry_kernel)
        self.patches: Patches | None = None
        if start == "patches":
            if not encoder.is_spatial:
                raise InputError(
                    f"model.start=patches needs a code for each patch, and those of model.grid={write_size(encoder.grid)} are a "
                    "sequence without places; use model.start=random"
                )
            if not isinstance(self.into, nn.Conv2d):
                raise InputError(
                    f"model.start=patches needs an encoder whose output a convolution follows, and "
                    f"{type(encoder).__name__} has none; use model.start=random"
                )
            self.patches = Patches(encoder.channels, encoder.f, quantizer.dim)
            zero_init(self.into)

    @classmethod
    def from_pretrained(
        cls,
        ckpt: str | Path,
        revision: str | None = None,
        *,
        trust: Sequence[str] = (),
        image_size: SizeSetting | None = None,
        config: str | Path | None = None,
        ema: bool | None = None,
        pixels: tuple[int, int] | None = None,
        cosine: bool | None = None,
        score: str | None = None,
        scales: Sequence[SizeSetting] | None = None,
        head_width: int | None = None,
    ) -> "Tokenizer":
        """The tokenizer that `ckpt` names, in eval mode on the CPU.

        ckpt        a run folder or checkpoint, imported or trained; a folder of stage=export; a file or folder of another
                    program that stage=import knows (diffusers, taming-transformers ...); or a hub id, owner/name or
                    owner/name/file
        revision    on the hub: a branch, a tag or a commit; None: the newest
        trust       full names of classes of your own that the run has, as in trust=["mine.Quantizer"]

        The others are for weights of other programs, where those leave a choice; None: as the files say, and what had to be
        assumed is printed.

        image_size  pixels of a side of the images, or (rows, columns), to which encode_images scales
        config      the file with the network's settings
        ema         averaged weights, or the last ones
        pixels      the range of the networks' images, (-1, 1) or (0, 1)
        cosine      whether outputs and codes are compared at length 1
        score       which code is chosen, "nearest" or "inner_product"
        scales      the sides of the grids of VAR's tokenizer, smallest first
        head_width  channels of an attention head (TiTok)

        Raises InputError, with one sentence, for whatever can't be read, and where two readings remain. Reading runs no code
        of the files, and builds no classes but this program's and those in `trust`.
        """
        module = resolve_name("vqgan.pretrained")  # by name: it builds this class
        reading = module.Reading(image_size, config, ema, pixels, cosine, score, scales, head_width)
        tokenizer: Tokenizer = module.load_pretrained(ckpt, revision, trust, reading)
        return tokenizer

    @torch.no_grad()
    def encode_images(
        self,
        images: Picture | Iterable[Picture],
        batch_size: int = ENCODED_AT_ONCE,
        size: SizeSetting | str | None = None,
        fit: str | None = None,
        tile: int | str | None = None,
    ) -> Tensor:
        """Images -> their codes, (B, h, w) int64 on the CPU, (B, h, w, num_codebooks), or (B, 1, L) of several scales.

        An image is a path, the bytes of a file, a Pillow image, an array (H, W) or (H, W, C) in the units of the data, a tensor
        (C, H, W) of whole numbers in these units, or a tensor (C, H, W) of floats in [-1, 1]. It is read as the images of
        training were.

        size    to which an image is brought: pixels of a side, or (rows, columns); None: that of the images in training;
                "own": none, an image of any size is encoded as it is. Sides that f doesn't divide are padded at the bottom
                and at the right by a mirror image; decode_codes(size=) cuts it off
        fit     how an image of other proportions gets the size, crop, pad or stretch; None: as in training
        tile    pixels of a side that the networks take at once, for large images: memory then grows no more with the image, see
                vqgan/tiling.py; "auto": 512, or the sides of the images in training if these are longer; None: the whole image

        Raises InputError for what is no image, for images of several sizes with size="own", and if the tokenizer is
        continuous.
        """
        if self.K is None:
            raise InputError(NO_CODES_MESSAGE)
        check_int("batch_size", batch_size, 1, "image")
        form = choose_form(self.form, size, fit)
        device = next(self.parameters()).device
        codes: list[Tensor] = []
        sizes: set[Size] = set()
        remaining = list_pictures(images)
        while batch := list(islice(remaining, batch_size)):
            x = [self.pad(read_picture(image, form, self.rules)) for image in batch]
            sizes |= {(each.shape[1], each.shape[2]) for each in x}
            check_own_sizes(sizes)
            self.check_served(x[0])
            codes.append(self.indices(torch.stack(x).to(device), tile).cpu())
        return torch.cat(codes) if codes else torch.empty(0, *self.code_shape, dtype=torch.int64)

    def pad(self, image: Tensor) -> Tensor:
        """An image (C, H, W) with sides that f divides; the same one where codes have no places."""
        return pad_to_multiples(image, self.f) if self.is_spatial else image

    def check_served(self, image: Tensor) -> None:
        """Raise InputError for an image (C, H, W) of another size than that of training where the networks serve no other."""
        own = self.encoder.image_size
        if tuple(image.shape[1:]) != own and not self.encoder.sized_settings:
            raise InputError(
                f"{type(self.encoder).__name__} serves images of {write_size(own)} pixels alone; leave size out"
            )

    @torch.no_grad()
    def decode_codes(
        self,
        codes: Tensor,
        output: str = "pil",
        batch_size: int = ENCODED_AT_ONCE,
        size: SizeSetting | None = None,
        tile: int | str | None = None,
    ) -> list[Image.Image] | Tensor | NDArray[Any]:
        """Codes (B, h, w) or (B, h, w, num_codebooks), of any h and w, or (B, 1, L) of all scales or of the first ones -> Pillow
        images of the channels that are shown.

        Of a sequence, and of the codebooks of quantizer=residual, the first n are enough: codes[:, :, :n] or codes[..., :n].

        output    "tensor": (B, C, H, W) float32 in [-1, 1] on the CPU; "array": (B, H, W, C) in the units of the data, of their
                  type
        size      pixels of a side, or (rows, columns), of the images that encode_images has padded, to which these are cut; codes
                  of several scales don't tell it, so those of images of another size than in training need it
        tile      as in encode_images

        Raises InputError for codes of another shape or beyond K, for a size that doesn't belong to the codes, and if the
        tokenizer is continuous.
        """
        if output not in OUTPUTS:
            raise InputError(f"output={output} must be one of {', '.join(OUTPUTS)}")
        check_int("batch_size", batch_size, 1, "image")
        self.check_codes(codes)
        grid = self.find_grid(codes, size)
        rows, columns = self.choose_cut(grid, size)
        device = next(self.parameters()).device
        parts = [
            self.decode_indices(part.to(device), tile, grid)
            for part in codes.long().split(batch_size)
        ]
        x = torch.cat([part[..., :rows, :columns].clamp(-1, 1).cpu() for part in parts])
        if output == "array":
            return np.moveaxis(self.rules.to_units(x), 1, -1)
        return to_pictures(x, self.rules) if output == "pil" else x

    def find_grid(self, codes: Tensor, size: SizeSetting | None) -> Size:
        """The grid of codes (B, h, w ...); of a row of several scales that of images of this size, or the model's."""
        if self.is_gridded or not self.is_spatial:
            return codes.shape[1], codes.shape[2]
        if size is None:
            return self.grid
        height, width = check_size("size", size, "pixel")
        return -(-height // self.f), -(-width // self.f)

    def choose_cut(self, grid: Sequence[int], size: SizeSetting | None) -> Size:
        """The rows and columns of a decoded image that are the encoded one. Raises InputError for a size that has other codes."""
        if self.is_spatial:
            return choose_cut(grid, self.f, size)
        own = self.encoder.image_size
        wanted = own if size is None else check_size("size", size, "pixel")
        if wanted != own:
            raise InputError(
                f"size={write_size(wanted)}: these codes are images of {write_size(own)} pixels; leave size out"
            )
        return own

    def check_codes(self, codes: Tensor) -> None:
        """Raise InputError unless these are codes of this tokenizer, (B, h, w) or (B, h, w, num_codebooks), or the first of
        those codebooks; of codes that are a row (B, 1, n)."""
        if self.K is None:
            raise InputError(NO_CODES_MESSAGE)
        shape = ["B", "h", "w", *map(str, self.code_shape[2:])]
        fits = codes.ndim == len(shape) and (
            codes.shape[3:] == self.code_shape[2:] or codes.shape[-1] in self.quantizer.prefixes
        )
        if not self.is_gridded:
            shape[1:3] = ["1", "n"]
            fits = fits and codes.shape[1] == 1
        if not fits or not codes.numel():
            raise InputError(
                f"codes of shape {list(codes.shape)} must be ({', '.join(shape)}), at least one grid"
            )
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise InputError(f"codes of type {codes.dtype} must be whole numbers")
        lowest, highest = int(codes.min()), int(codes.max())
        if lowest < 0 or highest >= self.K:
            raise InputError(f"codes from {lowest} to {highest} must be 0 to {self.K - 1}")

    @property
    def form(self) -> Form:
        """What the images of training became before they were encoded."""
        return Form(self.encoder.image_size, self.encoder.channels, self.fit)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """The shape of an image's codes: (h, w), (h, w, num_codebooks) for several codebooks, or (1, L) for several scales."""
        return self.quantizer.code_shape(self.grid)

    @property
    def size_facts(self) -> dict[str, Any]:
        """What metrics.json says of the codes: K, the grid, and the codes of an image, if there are any."""
        count = {"codes_per_image": math.prod(self.code_shape)} if self.K else {}
        return {"K": self.K, "grid": list(self.grid), **count}

    @property
    def K(self) -> int | None:
        """Codes per codebook; None for a continuous bottleneck."""
        return self.quantizer.K

    @property
    def num_codebooks(self) -> int:
        """Codes per grid position, each from its own codebook."""
        return self.quantizer.num_codebooks

    @property
    def dim(self) -> int:
        """Width of z_q."""
        return self.quantizer.dim

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid of codes."""
        return self.encoder.grid

    @property
    def is_spatial(self) -> bool:
        """Whether each code has a place of f x f pixels; otherwise they are a sequence, and the grid is (1, n)."""
        return self.encoder.is_spatial

    @property
    def is_gridded(self) -> bool:
        """Whether the codes are one grid over the image; those of several scales are a row."""
        return self.is_spatial and self.quantizer.is_gridded

    @property
    def f(self) -> int:
        """Downsampling factor: pixels per grid position, in each direction. Raises InputError where codes have no places."""
        if not self.is_spatial:
            raise InputError(
                f"the {self.grid[1]} codes of this tokenizer are a sequence without places, so it has no f"
            )
        return self.encoder.f

    @property
    def code_space(self) -> dict[str, Any]:
        """What a prior has to know of the codes: all vectors (num_codebooks, K, width) on the CPU, and the grid.

        Raises InputError if the tokenizer is continuous.
        """
        return {"codebook": self.quantizer.codebooks(), "grid": self.code_shape[:2]}

    def encode(self, x: Tensor, quantize: bool = True) -> Quantized:
        """x (B, C, H, W) in [-1, 1] -> z_e, z_q, indices and the loss of the bottleneck; without `quantize` it has no indices,
        and z_q is z_e."""
        z_e = self.encode_input(x)
        q: Quantized = self.quantizer(z_e) if quantize else self.quantizer.bypass(z_e)
        return q

    def encode_input(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) in [-1, 1] -> what the bottleneck takes, (B, in_dim of the quantizer, h, w)."""
        self.check_images(x)
        z_e = self.encode_features(x)
        if self.patches is not None:
            # Channels beyond dim, such as the log-variances of kl, come from the network alone.
            extra_channels = self.quantizer.in_dim - self.dim
            z_e = z_e + F.pad(self.patches.encode(x), (0, 0, 0, 0, 0, extra_channels))
        return z_e

    def check_images(self, x: Tensor) -> None:
        """Raise InputError unless x is a batch of images that the networks take: of any size that f divides."""
        channels, f = self.encoder.channels, self.encoder.f
        if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.")
            raise InputError(
                f"images of shape {list(x.shape)} and type {kind} must be floats (B, {channels}, H, W) in [-1, 1]"
            )
        h, w = x.shape[2:]
        if h % f or w % f:
            rows, columns = max(h // f, 1) * f, max(w // f, 1) * f
            if not self.encoder.sized_settings:  # which serve no other
                rows, columns = self.encoder.image_size
            raise InputError(
                f"images of {h}x{w} pixels must have sides that f={f} divides; crop or resize them to {rows}x{columns}"
            )

    def encode_features(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) in [-1, 1] -> what the networks alone make of it, (B, in_dim of the quantizer, h, w)."""
        z: Tensor = self.into(self.encoder(x if self.pixels == (-1, 1) else (x + 1) / 2))
        return z

    def decode(self, z_q: Tensor) -> Tensor:
        """z_q (B, dim, h, w) -> x_hat (B, C, H, W) float32, about [-1, 1] but not clamped.

        Of a sequence the first n codes are enough, (B, dim, 1, n).
        """
        z_q = to_memory_format(z_q)  # a lookup leaves the channels last
        if not self.is_spatial:
            z_q = self.fill_sequence(z_q)
        x_hat = self.decoder(self.out(z_q))
        if self.pixels != (-1, 1):
            x_hat = 2 * x_hat.float() - 1
        if self.patches is not None:
            x_hat = x_hat + self.patches.decode(z_q)
        return x_hat.float()

    def fill_sequence(self, z_q: Tensor) -> Tensor:
        """The first codes of a sequence (B, dim, 1, n) -> (B, dim, *grid), zero where a code is left out; in training nested
        dropout leaves out more."""
        missing = self.grid[1] - z_q.shape[3]
        if missing > 0:
            z_q = F.pad(z_q, (0, missing))
        if self.nested and self.decoder.training:
            z_q = z_q * draw_lengths(z_q, self.nested)
        return z_q

    def indices(self, x: Tensor, tile: int | str | None = None) -> Tensor:
        """x (B, C, H, W) -> indices int64, (B, h, w), or (B, h, w, num_codebooks) for several codebooks.

        With `tile` as in encode_images the encoder takes large images by tiles. Raises InputError if the tokenizer is
        continuous.
        """
        self.check_images(x)  # tiles would leave out the rest of sides that f does not divide
        z_e = run_by_tiles(self, self.encode_input, x, (self.encoder.f, 1), tile)
        indices = self.quantizer(z_e).indices
        if indices is None:
            raise InputError(NO_CODES_MESSAGE)
        return indices

    def decode_indices(
        self, indices: Tensor, tile: int | str | None = None, grid: Size | None = None
    ) -> Tensor:
        """Indices from `indices` -> x_hat (B, C, H, W), the same as decode(encode(x).z_q); `tile` as in encode_images, `grid` that
        of z_q where it is not the model's and the codes are a row of several scales."""
        z_q = (
            self.quantizer.lookup(indices)
            if grid is None
            else self.quantizer.lookup_on(indices, grid)
        )
        return run_by_tiles(self, self.decode, z_q, (1, self.encoder.f), tile)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Fit the linear maps, if any, and the codes to images x (n, C, H, W) in [-1, 1], once before the first step."""
        if self.patches is not None:
            self.patches.initialise(x)
            # The networks still add zero.
            z = torch.cat([self.patches.encode(part) for part in x.split(64)])
        else:
            if len(x) > RANDOM_START_IMAGES:
                x = x[choose_evenly(len(x), RANDOM_START_IMAGES)]
            z = self.encode_start(x)
        self.quantizer.initialise_maps(z, MAX_START_VECTORS)

    def encode_start(self, x: Tensor) -> Tensor:
        """What the networks make of x (n, C, H, W), (n, in_dim of the quantizer, h, w); says so if it takes long."""
        z: list[Tensor] = []
        begun = time.monotonic()
        for part in x.split(choose_start_batch(x)):
            z.append(self.encode_features(part))
            seconds = (time.monotonic() - begun) * (len(x) / len(part) - 1)
            if len(z) == 1 and seconds > LONG_START:
                log_line(
                    f"the codes start among what the encoder makes of {len(x)} images, which takes about {seconds:.0f} seconds"
                )
        return torch.cat(z)

    @property
    def start_images(self) -> int:
        """How many training images `initialise` asks for: of large ones only as many as have enough codes, for the memory and the
        time that they take."""
        most = RANDOM_START_IMAGES if self.patches is None else START_IMAGES
        pixels = self.encoder.image_size[0] * self.encoder.image_size[1]
        if pixels <= SMALL_IMAGE:
            return most
        enough = -(-MAX_START_VECTORS // (self.grid[0] * self.grid[1]))
        in_memory = 4 * START_IMAGES * SMALL_IMAGE // pixels
        return min(most, max(LEAST_START_IMAGES, min(enough, in_memory)))

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the weights, by which a code cache and a prior identify their tokenizer."""
        return hash_weights(self)

    def fingerprint_codes(self) -> str:
        """The same of the weights that make the codes of an image alone. Tokenizers that share it differ in their decoders."""
        parts = [self.encoder, self.into, self.quantizer]
        if self.patches is not None:
            parts.append(self.patches.into)
        return hash_weights(nn.ModuleList(parts))


def check_nested(nested: float, encoder: ImageEncoder) -> None:
    """Raise InputError for a share that is none, and for codes of which none comes first."""
    check_range("model.nested", nested, 0, 1)
    if nested and (encoder.is_spatial or encoder.grid[1] == 1):
        raise InputError(
            f"model.nested={nested} leaves out the last codes of a sequence, and model.grid={write_size(encoder.grid)} is no "
            "sequence of several codes; use model=vit model.tokens=32, or nest the codes of each place: quantizer=residual "
            f"quantizer.nested={nested}"
        )


def draw_lengths(z_q: Tensor, share: float) -> Tensor:
    """Which codes of sequences z_q (B, dim, 1, n) stay, as ones and zeros (B, 1, 1, n): all of a sequence, or, of this share of
    the sequences, the first 1 to n - 1."""
    B, n, device = z_q.shape[0], z_q.shape[3], z_q.device
    short = torch.randint(1, n, (B,), device=device)
    lengths = torch.where(torch.rand(B, device=device) < share, short, n)
    stays = torch.arange(n, device=device) < lengths[:, None]
    return stays[:, None, None].to(z_q.dtype)


def choose_evenly(n: int, most: int) -> Tensor:
    """The numbers of at most so many of n images, evenly from all over: neighbours may be of one class."""
    return torch.linspace(0, n - 1, min(n, most), dtype=torch.float64).long()


def choose_start_batch(x: Tensor) -> int:
    """How many images of x (n, C, H, W) go through a random encoder at once: 64 as long as they are of at most 64x64 pixels,
    and fewer of larger ones, or the start would take many times the memory of training."""
    return min(max(RANDOM_START_PIXELS // (x.shape[2] * x.shape[3]), 1), 64)


def join_widths(in_width: int, out_width: int, kernel: int) -> nn.Module:
    """A convolution from one width to the other with this side; none for side 0, where both must be equal."""
    if kernel:
        return nn.Conv2d(in_width, out_width, kernel, padding=kernel // 2)
    if in_width != out_width:
        raise InputError(
            f"quantizer.dim={out_width} must be {in_width}, for these networks have no convolution beside the codes"
        )
    return nn.Identity()


def hash_weights(module: nn.Module) -> str:
    """Twelve hexadecimal digits of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
