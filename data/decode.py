"""Whatever a file calls an image -> a square of uint8 pixels."""

import io
from contextlib import suppress

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

DECODE_VERSION = 1  # part of the cache's key: raise it when the pixels of an image change
JPEG = b"\xff\xd8\xff"
ORIENTATION = 0x0112  # the Exif tag
LARGEST = (
    2**28
)  # pixels; as RGB they take 800 MB while an image is scaled. A large JPEG is scaled as it is decoded

Image.MAX_IMAGE_PIXELS = None  # Pillow would warn of half as many; `square` refuses what is larger


class Unreadable(Exception):
    """What is no image, or a broken one; the message says why in a few words."""


def decode(content: bytes, side: int, channels: int) -> NDArray[np.uint8]:
    """An image file's content as `square` gives it; Unreadable where it can't be decoded."""
    if not content:
        raise Unreadable("empty file")
    try:
        if content.startswith(JPEG):
            with suppress(
                ValueError
            ):  # broken: Pillow may read it nevertheless, or says what is wrong
                pixels = _jpeg(content, side, channels)
                exif = _jpeg_exif(content)
                return turned(pixels, _orientation(exif)) if exif else pixels
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "EPS":
                raise Unreadable("PostScript, a program, which is not run")
            if image.format in ("JPEG", "MPO"):
                image.draft(None, (2 * side, 2 * side))
            return square(image, side, channels)
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("no image of a known format") from None
    except Exception as error:  # thirty decoders, each with exceptions of its own
        raise Unreadable(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _jpeg(content: bytes, side: int, channels: int) -> NDArray[np.uint8]:
    """As `square`, but not turned; decoded at a fraction of its size where that still has twice the pixels asked for.

    simplejpeg takes a third of Pillow's time for a small image.
    """
    colours = "RGB" if channels == 3 else "GRAY"
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        content, colours, min_height=2 * side, min_width=2 * side
    )
    if pixels.shape[:2] == (side, side):
        return pixels.transpose(2, 0, 1)
    return square(Image.fromarray(pixels if channels == 3 else pixels[:, :, 0]), side, channels)


def _jpeg_exif(content: bytes) -> bytes:
    """A JPEG's Exif segment, which may come after others, such as a colour profile's; empty where there is none."""
    at = 2
    while (
        at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA
    ):  # after DA come the pixels
        if content[at + 1] == 0xFF:  # fill
            at += 1
            continue
        end = at + 2 + (content[at + 2] << 8 | content[at + 3])
        if content[at + 1] == 0xE1 and content.startswith(b"Exif\0\0", at + 4):
            return content[at + 4 : end]
        at = end
    return b""


def _orientation(of: Image.Image | bytes) -> int:
    """The Exif orientation of an image or in an Exif segment, 1 where there is none."""
    try:
        if isinstance(of, bytes):
            exif = Image.Exif()
            exif.load(of)
        else:
            exif = of.getexif()
        found = exif.get(ORIENTATION, 1)
    except Exception:  # a broken tag costs no picture
        return 1
    return found if isinstance(found, int) else 1


def turned(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Pixels (channels, h, w) as they are meant to be seen: an Exif orientation says which row and column come first."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels


def square(image: Image.Image, side: int, channels: int) -> NDArray[np.uint8]:
    """The middle of an image, its shorter side scaled to `side` pixels: (channels, side, side).

    Turned as its Exif tag says; of an animation the first frame; transparent pixels lie on white; 16-bit grey keeps its
    upper 8 bits. A square of that size comes through unchanged. Unreadable where the range of the pixels is not known or
    there are more than 2^28.
    """
    if image.width * image.height > LARGEST:
        raise Unreadable(f"{image.width} x {image.height} pixels, more than 2^28")
    image.load()  # some formats know only then how they are turned
    orientation = _orientation(image)
    image = _eight_bits(image)
    if image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    wanted = "RGB" if channels == 3 else "L"
    pixels = np.asarray(image if image.mode == wanted else image.convert(wanted))
    return turned(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), orientation)


def _eight_bits(image: Image.Image) -> Image.Image:
    """As RGB, or L where it is grey."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise Unreadable("32-bit pixels, whose range is not known")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise Unreadable("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")
