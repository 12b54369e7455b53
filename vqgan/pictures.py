"""Pictures of a script or notebook to the images that a tokenizer takes, and back."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from codegrid.data.decode import PLAIN, UnreadableImage, decode, to_form
from codegrid.data.form import FIT_CHOICES, OWN_SIZE, Form
from codegrid.data.images import to_float
from codegrid.data.pixels import PixelRules
from codegrid.data.resize import fit_pixels
from codegrid.data.values import Values, values_to_pixels
from codegrid.engine.errors import InputError
from codegrid.engine.sizes import Size, SizeSetting, check_size, write_size

# A path, the bytes of a file, a Pillow image, an array (H, W) or (H, W, C), or a tensor (C, H, W); see Tokenizer.encode_images.
Picture = str | Path | bytes | Image.Image | NDArray[Any] | Tensor

ROUNDING = 1e-3  # by which a float may lie outside [-1, 1]


def list_pictures(pictures: Picture | Iterable[Picture]) -> Iterator[Picture]:
    """Pictures one by one: of a list, of a batch with an axis more, or a single one."""
    if isinstance(pictures, str | Path | bytes | Image.Image) or (
        isinstance(pictures, np.ndarray | Tensor) and pictures.ndim < 4
    ):
        yield pictures
    else:
        yield from pictures


def read_picture(picture: Picture, form: Form, rules: PixelRules, setting: str = "") -> Tensor:
    """A picture of any size -> pixels of this form, as in training, float in [-1, 1].

    Raises InputError for what is no picture, and for float tensors outside of [-1, 1]; `setting` is the one that names a file.
    """
    if isinstance(picture, Tensor) and picture.is_floating_point():
        return read_floats(picture, form, rules)
    try:
        if isinstance(picture, str | Path):
            content = Path(picture).expanduser().read_bytes()
            pixels = decode(content, form, rules)
        elif isinstance(picture, bytes):
            pixels = decode(picture, form, rules)
        elif isinstance(picture, Image.Image):
            pixels = to_form(picture, form, rules)
        else:
            pixels = read_array_picture(picture, form, rules)
    except (OSError, UnreadableImage) as error:
        name = name_picture(picture)
        name = f"{setting}={name}" if setting else name
        raise InputError(f"{name} can't be read as an image ({error}); give another") from error
    return to_float(torch.from_numpy(np.array(pixels)))  # a copy: it may be read-only


def name_picture(picture: Picture) -> str:
    """What a sentence calls a picture: its path, or its type."""
    if isinstance(picture, str | Path):
        return str(picture)
    return "the file" if isinstance(picture, bytes) else type(picture).__name__


def read_floats(picture: Tensor, form: Form, rules: PixelRules) -> Tensor:
    """A float tensor (C, H, W) in [-1, 1] -> an image of this form. One of the right size stays as it is to the bit, others are
    rounded to pixels before they are scaled."""
    check_floats(picture, form.channels)
    if picture.shape[1:] == form.size or form.fit == OWN_SIZE:
        return picture.detach().cpu().float()
    pixels = rules.to_pixels(picture.detach().cpu()).movedim(0, -1).numpy().astype(rules.dtype)
    fitted = fit_pixels(pixels, form.size, form.fit)
    return to_float(torch.from_numpy(fitted.transpose(2, 0, 1)))


def read_array_picture(picture: Any, form: Form, rules: PixelRules) -> NDArray[Any]:
    """An array (H, W) or (H, W, C), or a tensor (C, H, W) of whole numbers, in the units of the data -> pixels of this form.

    The fourth of four channels is alpha where the form has others. Raises InputError for what is no such array, and
    UnreadableImage if its values or its channels don't fit.
    """
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().movedim(0, -1).numpy()
    if not isinstance(picture, np.ndarray):
        raise InputError(
            f"a {type(picture).__name__} is no image; give a path, a Pillow image, an array or a tensor"
        )
    check_array(picture, form, rules)
    values = as_plain_pixels(picture[..., None] if picture.ndim == 2 else picture, rules)
    channels = values.shape[2]
    if values.dtype == np.uint8 and channels in (1, 3, 4) and form.channels in (1, 3):
        return to_form(Image.fromarray(values[..., 0] if channels == 1 else values), form, rules)
    values = values.astype(values.dtype.newbyteorder("="))
    has_alpha = channels == 4 and form.channels in (1, 3)
    return values_to_pixels(Values(values, has_alpha), form, rules)


def as_plain_pixels(values: NDArray[Any], rules: PixelRules) -> NDArray[Any]:
    """Whole numbers from 0 to 255 of any type as uint8, if the images in training were of 8 bits; what fits other rules stays.

    Raises InputError for other numbers: those in [0, 1] would become black.
    """
    may_be_deep = rules.number_type is None and values.dtype == np.uint16  # of an earlier run
    if values.dtype == np.uint8 or not rules.is_plain or may_be_deep:
        return values
    lowest, highest = values.min(), values.max()
    if not 0 <= lowest <= highest <= 255 or (values != np.rint(values)).any():
        raise InputError(
            f"an array of type {values.dtype} with values from {lowest:g} to {highest:g} must have whole numbers from 0 to 255, "
            "as the images in training; or give a tensor (C, H, W) in [-1, 1]"
        )
    return values.astype(np.uint8)


def check_array(picture: NDArray[Any], form: Form, rules: PixelRules) -> None:
    """Raise InputError unless an array has the shape and the type of an image: only grey and colours become each other."""
    channels, wanted = 1 if picture.ndim == 2 else picture.shape[-1], form.channels
    fits = channels == wanted or (channels in (1, 3, 4) and wanted in (1, 3))
    has_range = picture.dtype.kind != "f" or (
        rules.value_range is not None and (channels != 4 or wanted == 4)  # floats have no alpha
    )
    if (
        picture.ndim in (2, 3)
        and picture.size
        and fits
        and picture.dtype.kind in "uif"
        and has_range
    ):
        return
    units = "whole numbers" if rules.value_range is None else "numbers in the units of the data"
    also = " or (H, W)" if wanted in (1, 3) else ""
    raise InputError(
        f"an array of shape {list(picture.shape)} and type {picture.dtype} is no image here; give {units} of shape "
        f"(H, W, {wanted}){also}, or a tensor ({wanted}, H, W) in [-1, 1]"
    )


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


def choose_form(form: Form, size: SizeSetting | str | None, fit: str | None) -> Form:
    """The form of training, changed to a size of one's own or "own", and to another fit. Raises InputError for neither."""
    if fit is not None and fit not in FIT_CHOICES:
        raise InputError(f"fit={fit} must be one of {', '.join(FIT_CHOICES)}")
    if size == OWN_SIZE:
        if fit is not None:
            raise InputError(
                f"size={OWN_SIZE} changes no image, so fit={fit} says nothing; leave one out"
            )
        return Form.of_own_size(form.channels)
    if isinstance(size, str):
        raise InputError(f"size={size} must be {OWN_SIZE}, pixels of a side, or (rows, columns)")
    wanted = form.size if size is None else check_size("size", size, "pixel")
    return Form(wanted, form.channels, fit or form.fit)


def check_own_sizes(sizes: Collection[Size]) -> None:
    """Raise InputError for images of several sizes, whose codes are no one tensor."""
    if len(sizes) > 1:
        first, second = sorted(sizes)[:2]
        raise InputError(
            f"images of {format_pixels(first)} and {format_pixels(second)} pixels, padded where necessary, have codes of several "
            "shapes; encode them one by one, or name one size for all"
        )


def choose_cut(grid: Sequence[int], f: int, size: SizeSetting | None) -> Size:
    """The rows and columns of a decoded image that are the encoded one. Raises InputError for a size that has other codes."""
    whole = grid[0] * f, grid[1] * f
    if size is None:
        return whole
    wanted = check_size("size", size, "pixel")
    if all(side - f < n <= side for side, n in zip(whole, wanted, strict=True)):
        return wanted
    rows, columns = (f"{side - f + 1} to {side}" if f > 1 else str(side) for side in whole)
    raise InputError(
        f"size={write_size(wanted)}: codes of {grid[0]}x{grid[1]} are images of {rows} rows and {columns} columns; "
        "leave size out for the whole image"
    )


def format_pixels(size: Size) -> str:
    """A size in a sentence: 48x80."""
    return f"{size[0]}x{size[1]}"


def pad_to_multiples(x: Tensor, f: int) -> Tensor:
    """x (C, H, W) -> (C, h * f, w * f), continued at the bottom and at the right by its mirror image."""
    for axis in (1, 2):
        side = x.shape[axis]
        if side % f:
            period = max(
                2 * (side - 1), 1
            )  # an image that is narrower than its padding is mirrored again
            position = torch.arange(-(-side // f) * f) % period
            x = x.index_select(axis, torch.minimum(position, period - position))
    return x


def to_pictures(x: Tensor, rules: PixelRules = PLAIN) -> list[Image.Image]:
    """Images (B, C, H, W) about [-1, 1] -> Pillow images of the channels that are shown, clamped and rounded."""
    return [
        Image.fromarray(image.movedim(0, -1).squeeze(-1).numpy())
        for image in rules.to_picture(x).cpu()
    ]
