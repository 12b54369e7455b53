"""Image files and Pillow images of any kind -> uint8 pixels of one form."""

import io
import re
import struct
import sys
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from codegrid.data.form import Form
from codegrid.data.pixels import PixelRules, mask_numbers
from codegrid.data.values import UnreadableImage as UnreadableImage

# Part of the cache key: increase it when decoding gives other pixels by the same PixelRules.
DECODE_VERSION = 1
JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
HEIF = (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftypmif1", b"ftypmsf1")
ORIENTATION = 0x0112  # the Exif tag
SIXTEEN_BITS = re.compile(
    r"RGB[AX]?;16[BLN]"
)  # kinds of numbers that Pillow unpacks in either order
# Pixels; as RGB they take 800 MB while an image is resized. Large JPEGs are downscaled while they are decoded.
MAX_PIXELS = 2**28

Image.MAX_IMAGE_PIXELS = None  # Pillow would warn at half as many; `to_form` refuses larger images


PLAIN = PixelRules()  # for images of no dataset


def decode(content: bytes, form: Form, rules: PixelRules = PLAIN) -> NDArray[np.uint8]:
    """Decode the content of an image file to pixels of this form, as `to_form` does. Raises UnreadableImage."""
    if not content:
        raise UnreadableImage("empty file")
    try:
        if content.startswith(JPEG):
            # If simplejpeg fails, Pillow may still read the file, or it says what is wrong with it.
            with suppress(ValueError):
                exif = _find_exif(content)
                orientation = _read_orientation(exif) if exif else 1
                pixels = _decode_jpeg(content, turn_form(form, orientation))
                return apply_orientation(pixels, orientation)
        with open_image(io.BytesIO(content)) as image:
            if image.format in ("JPEG", "MPO"):
                image.draft(None, (2 * max(form.size), 2 * max(form.size)))
            return to_form(image, form, rules, content)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("no image of a known format") from None
    except Exception as error:  # thirty decoders, each with exceptions of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnreadableImage(reason) from error


def open_image(file: Any) -> Image.Image:
    """The image in a file that is open for reading; only its header is read. Raises UnreadableImage for PostScript."""
    start = file.read(12)
    file.seek(0)
    if start[4:12] in HEIF:
        register_heif()
    image = Image.open(file)
    if image.format == "EPS":
        raise UnreadableImage("PostScript, a program, which is not run")
    return image


@cache
def register_heif() -> bool:
    """Let Pillow read HEIF files, as phones write them; False if the library for that is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _decode_jpeg(content: bytes, form: Form) -> NDArray[np.uint8]:
    """As `to_form`, but ignores the Exif orientation.

    Large images are decoded at a fraction of their size that still has at least twice the size asked for. simplejpeg takes
    a third of Pillow's time for small images.
    """
    colours, (height, width) = "RGB" if form.channels == 3 else "GRAY", form.size
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        content, colours, min_height=2 * height, min_width=2 * width
    )
    if pixels.shape[:2] == form.size:
        return pixels.transpose(2, 0, 1)
    return to_form(Image.fromarray(pixels if form.channels == 3 else pixels[:, :, 0]), form)


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


def turn_form(form: Form, orientation: int) -> Form:
    """The form of an image that has this one once the Exif orientation is applied."""
    return replace(form, size=form.size[::-1]) if orientation in (5, 6, 7, 8) else form


def apply_orientation(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn and mirror pixels (channels, h, w) as the Exif orientation 1..8 demands; other values change nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    return pixels


def to_form(
    image: Image.Image, form: Form, rules: PixelRules = PLAIN, content: bytes = b""
) -> NDArray[np.uint8]:
    """The middle of an image, resized (bicubic) until it just fills the form.

    The Exif orientation is applied. An animation gives its first frame. `rules` are for transparent pixels, which are
    blended with white without them, and for more than 8 bits a channel: 16-bit images keep their upper 8 bits without
    them. `content` is the file of the image, which Pillow reads only 8 bits of if it has colours of 16. An image of the
    right size is not changed. Raises UnreadableImage if the range of the pixels is not known or if there are more than
    2^28 of them.
    """
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImage(f"{image.width} x {image.height} pixels, more than 2^28")
    image.load()  # some formats know their orientation only after this
    orientation = _read_orientation(image)
    image = _to_eight_bits(image, rules, content)
    height, width = turn_form(form, orientation).size
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    mode = "RGB" if form.channels == 3 else "L"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    pixels = pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)
    return apply_orientation(pixels, orientation)


def _to_eight_bits(image: Image.Image, rules: PixelRules, content: bytes) -> Image.Image:
    """Convert to 8-bit RGB, or to L if the image is grey."""
    values = read_grey_values(image)
    if values is None and has_deep_colours(image, content):
        if has_plain_planes(image):  # which Pillow mixes up
            values = read_planes(content)
        elif rules.reads_all_bits:
            values = read_deep_colours(content)
    if values is not None:
        image = _scale_values(values, rules)
    if rules.alpha == "ignore" and has_alpha_channel(image):
        image = image.convert("RGBA").convert("L" if image.mode in ("LA", "La") else "RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _scale_values(values: NDArray[Any], rules: PixelRules) -> Image.Image:
    """An 8-bit image of values (h, w) or (h, w, 2, 3 or 4), whose second or fourth channel is alpha."""
    if not rules.is_open and rules.value_range is None:
        if values.dtype.kind == "f":
            raise UnreadableImage("floating-point pixels, whose range is not known")
        if values.min() < 0 or values.max() >= 2**16:
            raise UnreadableImage("32-bit pixels, whose range is not known")
    if values.size and not mask_numbers(values).any():
        raise UnreadableImage("no pixel is a number")
    if values.ndim == 2:
        return Image.fromarray(rules.scale(values))
    colours = values.shape[2] - (values.shape[2] in (2, 4))
    scaled = [rules.scale(values[..., :colours])]
    if colours < values.shape[2]:
        scaled.append((values[..., colours:] >> 8).astype(np.uint8))
    return Image.fromarray(np.ascontiguousarray(np.concatenate(scaled, 2).squeeze()))


def has_alpha_channel(image: Image.Image) -> bool:
    """Whether an image has a fourth channel, or a second beside grey, that its file calls alpha."""
    return image.mode in ("RGBA", "LA", "RGBa", "La")


def read_grey_values(image: Image.Image) -> NDArray[Any] | None:
    """The values (h, w) of a grey image of more than 8 bits, or of floating-point numbers; None for other images."""
    if image.mode == "I":
        values = np.asarray(image)
        # Pillow reads unsigned numbers of 32 bits as signed ones.
        unsigned = image.format == "TIFF" and _tiff_tags(image).get(339, (1,))[0] == 1
        return values.view(np.uint32) if unsigned and values.min() < 0 else values
    if image.mode == "F" or image.mode.startswith("I;16"):
        return np.asarray(image)
    return None


def has_deep_colours(image: Image.Image, content: bytes) -> bool:
    """Whether a file has colours, or grey and alpha, of 16 bits a channel, of which Pillow keeps the upper 8."""
    if content.startswith(PNG):
        return len(content) > 25 and content[24] == 16 and content[25] in (2, 4, 6)
    if image.format == "TIFF" and image.mode in ("RGB", "RGBA"):
        return int(_tiff_tags(image).get(258, (8,))[0]) == 16
    return False


def read_deep_colours(content: bytes) -> NDArray[Any] | None:
    """All bits (h, w, 2, 3 or 4) of a file that has deep colours; None for a TIFF whose channels Pillow can't separate.

    Pillow unpacks the upper bytes. Asked for numbers of the other byte order, it unpacks the lower ones.
    """
    if content.startswith(PNG) and content[25] == 4:  # grey and alpha have no other order
        header = content[12:24] + b"\x08\x06" + content[26:29]
        # The same bytes as four channels of 8 bits: upper and lower grey, upper and lower alpha.
        rewritten = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
        halves = _unpack(rewritten, False)
        assert halves is not None
        return halves[..., 0::2].astype(np.uint16) << 8 | halves[..., 1::2]
    with Image.open(io.BytesIO(content)) as image:
        if has_plain_planes(image):
            return read_planes(content)
    upper, lower = _unpack(content, False), _unpack(content, True)
    return None if upper is None or lower is None else upper.astype(np.uint16) << 8 | lower


def has_plain_planes(image: Image.Image) -> bool:
    """Whether a TIFF has its channels one after the other, not compressed."""
    tags = _tiff_tags(image)
    return bool(tags.get(284) == 2 and tags.get(259) == 1)


def read_planes(content: bytes) -> NDArray[np.uint16]:
    """The values (h, w, channels) of a TIFF of 16 bits that has plain planes, turned as its orientation says."""
    with Image.open(
        io.BytesIO(content)
    ) as image:  # not loaded, for that takes the orientation away
        tags = dict(_tiff_tags(image))
        channels = 4 if image.mode == "RGBA" else 3
    if 273 not in tags:
        raise UnreadableImage("a TIFF of 16-bit planes in tiles")
    pieces = zip(tags[273], tags[279], strict=True)
    data = b"".join(content[start : start + size] for start, size in pieces)
    values = np.frombuffer(data, "<u2" if content.startswith(b"II") else ">u2")
    planes = values.astype(np.uint16).reshape(-1, tags[257], tags[256])[:channels]
    return apply_orientation(planes, int(tags.get(ORIENTATION, 1))).transpose(1, 2, 0)


def _unpack(content: bytes, swaps: bool) -> NDArray[Any] | None:
    """The pixels of an image as Pillow unpacks them; with `swaps` from numbers of the other byte order.

    None if numbers of its kind have no other order.
    """
    with Image.open(io.BytesIO(content)) as image:
        if swaps:
            tiles: Any = image.tile
            if _tiff_tags(image).get(284) == 2 or not all(
                SIXTEEN_BITS.fullmatch(_raw_mode(tile)) for tile in tiles
            ):
                return None
            image.tile = [tile._replace(args=_swap_order(tile.args)) for tile in tiles]
        image.load()
        return np.asarray(image)


def _raw_mode(tile: Any) -> str:
    return str(tile.args if isinstance(tile.args, str) else tile.args[0])


def _swap_order(args: Any) -> Any:
    """The arguments of one of Pillow's decoders, whose first is the kind of numbers that it unpacks, for the other order."""
    if isinstance(args, str):
        native = "L" if sys.byteorder == "little" else "B"
        order = native if args[-1] == "N" else args[-1]
        return f"{args[:-1]}{'B' if order == 'L' else 'L'}"
    return (_swap_order(args[0]), *args[1:])


def _tiff_tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})
