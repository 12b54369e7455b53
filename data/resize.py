"""Images of any number of channels brought to a size, by cutting, padding or stretching them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from codegrid.data.form import OWN_SIZE
from codegrid.engine.sizes import Size


def fit_image(image: Image.Image, size: Size, fit: str) -> Image.Image:
    """An image of this size (rows, columns), bicubic; see Form for `fit`. An image of the right size is not changed."""
    wanted = size[1], size[0]
    if image.size == wanted or fit == OWN_SIZE:
        return image
    if fit == "crop":
        return ImageOps.fit(image, wanted, Image.Resampling.BICUBIC)
    if fit == "stretch":
        return image.resize(wanted, Image.Resampling.BICUBIC)
    return ImageOps.pad(image, wanted, Image.Resampling.BICUBIC, color=0)


def fit_pixels(pixels: NDArray[Any], size: Size, fit: str) -> NDArray[Any]:
    """Pixels (h, w, c), uint8 or uint16, of this size, each channel by itself with the antialiasing of 8-bit images."""
    if pixels.shape[:2] == size or fit == OWN_SIZE:
        return pixels
    channels = [
        fit_image(to_channel_image(pixels[..., i]), size, fit) for i in range(pixels.shape[2])
    ]
    resized = np.stack([np.asarray(channel) for channel in channels], 2)
    if pixels.dtype == np.uint8:
        return resized
    return np.rint(resized).clip(0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)


def to_channel_image(channel: NDArray[Any]) -> Image.Image:
    """A Pillow image of one channel (h, w): of 8 bits, or of floating-point numbers, which hold 16 bits exactly."""
    eight_bits = channel.dtype == np.uint8
    return Image.fromarray(np.ascontiguousarray(channel, np.uint8 if eight_bits else np.float32))
