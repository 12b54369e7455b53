"""Pictures of a script or notebook to the images that a tokenizer takes, and back."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from codegrid.data.decode import UnreadableImage, decode, to_form
from codegrid.data.form import Form
from codegrid.data.images import to_float, to_uint8
from codegrid.data.pixels import PixelRules
from codegrid.engine.errors import InputError

# A path, a Pillow image, an array (H, W) or (H, W, 1, 3 or 4) uint8, or a tensor (C, H, W), uint8 or float in [-1, 1].
Picture = str | Path | Image.Image | NDArray[Any] | Tensor

ROUNDING = 1e-3  # by which a float may lie outside [-1, 1]


def list_pictures(pictures: Picture | Iterable[Picture]) -> Iterator[Picture]:
    """Pictures one by one: of a list, of a batch with an axis more, or a single one."""
    if isinstance(pictures, str | Path | Image.Image) or (
        isinstance(pictures, np.ndarray | Tensor) and pictures.ndim < 4
    ):
        yield pictures
    else:
        yield from pictures


def read_picture(picture: Picture, form: Form, rules: PixelRules, setting: str = "") -> Tensor:
    """A picture of any size -> pixels of this form, as in training, float in [-1, 1].

    Raises InputError for what is no picture, and for floats outside of [-1, 1]; `setting` is the one that names a file.
    """
    if isinstance(picture, Tensor) and picture.is_floating_point():
        check_floats(picture, form.channels)
        if picture.shape[1:] == form.size:
            return picture.detach().cpu().float()
    try:
        if isinstance(picture, str | Path):
            content = Path(picture).expanduser().read_bytes()
            pixels = decode(content, form, rules)
        else:
            pixels = to_form(open_pixels(picture), form, rules)
    except (OSError, UnreadableImage) as error:
        name = picture if isinstance(picture, str | Path) else type(picture).__name__
        name = f"{setting}={name}" if setting else name
        raise InputError(f"{name} can't be read as an image ({error}); give another") from error
    return to_float(torch.from_numpy(np.array(pixels)))  # a copy: it may be read-only


def open_pixels(picture: Picture) -> Image.Image:
    """A Pillow image of pixels in memory. Raises InputError for an array of another kind."""
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, Tensor):
        values = to_uint8(picture) if picture.is_floating_point() else picture
        picture = values.detach().cpu().movedim(0, -1).numpy()
    if not isinstance(picture, np.ndarray):
        raise InputError(
            f"a {type(picture).__name__} is no image; give a path, a Pillow image, an array or a tensor"
        )
    has_colours = picture.ndim == 3 and picture.shape[2] in (1, 3, 4)
    if picture.dtype != np.uint8 or not (picture.ndim == 2 or has_colours):
        raise InputError(
            f"an array of shape {list(picture.shape)} and type {picture.dtype} is no image; give uint8 of shape (H, W), "
            "(H, W, 3) or (H, W, 4), or a tensor (C, H, W) in [-1, 1]"
        )
    return Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture)


def check_floats(picture: Tensor, channels: int) -> None:
    """Raise InputError unless a float tensor is an image (channels, H, W) in [-1, 1]."""
    if picture.ndim != 3 or len(picture) != channels:
        raise InputError(
            f"a tensor of shape {list(picture.shape)} is no image here; give ({channels}, H, W)"
        )
    lowest, highest = float(picture.min()), float(picture.max())
    if not -1 - ROUNDING <= lowest <= highest <= 1 + ROUNDING:  # false for NaN too
        raise InputError(
            f"a tensor with values from {lowest:g} to {highest:g} must be in [-1, 1]; divide 0 to 255 by 127.5 and subtract 1"
        )


def to_pictures(x: Tensor) -> list[Image.Image]:
    """Images (B, 1 or 3, H, W) about [-1, 1] -> Pillow images, clamped and rounded."""
    return [
        Image.fromarray(image.movedim(0, -1).squeeze(-1).numpy()) for image in to_uint8(x).cpu()
    ]
