"""Image files and Pillow images of any kind -> a square of uint8 pixels."""

import io
from contextlib import suppress

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

DECODE_VERSION = 1  # part of the cache key: increase it when decoding gives other pixels
JPEG = b"\xff\xd8\xff"
ORIENTATION = 0x0112  # the Exif tag
# Pixels; as RGB they take 800 MB while an image is resized. Large JPEGs are downscaled while they are decoded.
MAX_PIXELS = 2**28

Image.MAX_IMAGE_PIXELS = (
    None  # Pillow would warn at half as many; `to_square` refuses larger images
)


class UnreadableImage(Exception):
    """The content is not an image, or a broken one; the message gives the reason in a few words."""


def decode(content: bytes, side: int, channels: int) -> NDArray[np.uint8]:
    """Decode the content of an image file to (channels, side, side), as `to_square` does. Raises UnreadableImage."""
    if not content:
        raise UnreadableImage("empty file")
    try:
        if content.startswith(JPEG):
            # If simplejpeg fails, Pillow may still read the file, or it says what is wrong with it.
            with suppress(ValueError):
                pixels = _decode_jpeg(content, side, channels)
                exif = _find_exif(content)
                return apply_orientation(pixels, _read_orientation(exif)) if exif else pixels
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "EPS":
                raise UnreadableImage("PostScript, a program, which is not run")
            if image.format in ("JPEG", "MPO"):
                image.draft(None, (2 * side, 2 * side))
            return to_square(image, side, channels)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("no image of a known format") from None
    except Exception as error:  # thirty decoders, each with exceptions of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnreadableImage(reason) from error


def _decode_jpeg(content: bytes, side: int, channels: int) -> NDArray[np.uint8]:
    """As `to_square`, but ignores the Exif orientation.

    Large images are decoded at a fraction of their size that still has at least twice the side asked for. simplejpeg takes
    a third of Pillow's time for small images.
    """
    colours = "RGB" if channels == 3 else "GRAY"
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        content, colours, min_height=2 * side, min_width=2 * side
    )
    if pixels.shape[:2] == (side, side):
        return pixels.transpose(2, 0, 1)
    return to_square(Image.fromarray(pixels if channels == 3 else pixels[:, :, 0]), side, channels)


def _find_exif(content: bytes) -> bytes:
    """The Exif segment of a JPEG, which may follow others such as a colour profile; empty if there is none."""
    at = 2
    # The pixels begin after marker DA.
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        if content[at + 1] == 0xFF:  # fill bytes between segments
            at += 1
            continue
        end = at + 2 + (content[at + 2] << 8 | content[at + 3])
        if content[at + 1] == 0xE1 and content.startswith(b"Exif\0\0", at + 4):
            return content[at + 4 : end]
        at = end
    return b""


def _read_orientation(image_or_exif: Image.Image | bytes) -> int:
    """The Exif orientation of an image or of an Exif segment; 1, upright, if it has none or a broken tag."""
    try:
        if isinstance(image_or_exif, bytes):
            exif = Image.Exif()
            exif.load(image_or_exif)
        else:
            exif = image_or_exif.getexif()
        orientation = exif.get(ORIENTATION, 1)
    except Exception:  # a broken tag is no reason to lose the image
        return 1
    return orientation if isinstance(orientation, int) else 1


def apply_orientation(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn and mirror pixels (channels, h, w) as the Exif orientation 1..8 demands; other values change nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels


def to_square(image: Image.Image, side: int, channels: int) -> NDArray[np.uint8]:
    """The middle of an image, with its shorter side resized to `side` pixels (bicubic): (channels, side, side).

    The Exif orientation is applied. An animation gives its first frame, transparent pixels are blended with white, 16-bit
    grey keeps its upper 8 bits. A square of the right size is not changed. Raises UnreadableImage if the range of the
    pixels is not known or if there are more than 2^28 of them.
    """
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width} x {image.height} pixels, more than 2^28")
    image.load()  # some formats know their orientation only after this
    orientation = _read_orientation(image)
    image = _to_eight_bits(image)
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    mode = "RGB" if channels == 3 else "L"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    pixels = pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
    return apply_orientation(pixels, orientation)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB, or to L if the image is grey."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise UnreadableImage("32-bit pixels, whose range is not known")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise UnreadableImage("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")
