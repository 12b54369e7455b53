"""Image files and Pillow images of any kind -> pixels of one form."""

import io
import re
import struct
import sys
import zlib
from contextlib import suppress
from functools import cache
from typing import IO, Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from codegrid.data.arrays import NPY, ZIP, read_array
from codegrid.data.dicom import is_dicom, read_dicom
from codegrid.data.form import Form
from codegrid.data.orientation import ORIENTATION, apply_orientation, turn_form
from codegrid.data.pixels import PixelRules
from codegrid.data.resize import fit_image
from codegrid.data.tiff import PLAIN_CHANNELS, MissingCodec, exceeds_pillow, is_tiff, read_tiff
from codegrid.data.values import UnreadableImage as UnreadableImage
from codegrid.data.values import Values, check_num_pixels, values_to_pixels
from codegrid.engine.sizes import Size

# Part of the cache key: increase it when decoding gives other pixels by the same PixelRules.
DECODE_VERSION = 1
JPEG = b"\xff\xd8\xff"
PNG = b"\x89PNG\r\n\x1a\n"
HEIF = (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftypmif1", b"ftypmsf1")
# Kinds of numbers that Pillow unpacks in either order.
SIXTEEN_BITS = re.compile(r"RGB[AX]?;16[BLN]")

Image.MAX_IMAGE_PIXELS = None  # Pillow would warn at half as many; `to_form` refuses larger images


PLAIN = PixelRules()  # for images of no dataset


def decode(content: bytes, form: Form, rules: PixelRules = PLAIN) -> NDArray[Any]:
    """Decode the content of an image file to pixels of this form, as `to_form` does. Raises UnreadableImage."""
    if not content:
        raise UnreadableImage("empty file")
    try:
        if content.startswith(JPEG) and form.channels in PLAIN_CHANNELS and rules.depth == 8:
            # If simplejpeg fails, Pillow may still read the file, or it says what is wrong with it.
            with suppress(ValueError):
                exif = _find_exif(content)
                orientation = _read_orientation(exif) if exif else 1
                pixels = _decode_jpeg(content, turn_form(form, orientation))
                return apply_orientation(pixels, orientation)
        if (values := read_values(content, form.channels)) is not None:
            return values_to_pixels(values, form, rules)
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


def read_values(content: bytes, channels: int) -> Values | None:
    """The values of a file for data.channels that is not one of Pillow's; None if Pillow reads as much of it."""
    if is_dicom(content):  # before TIFF, whose header may stand before it
        return read_dicom(content)
    if content.startswith((NPY, *ZIP)):
        return read_array(content, channels)
    return _read_bands(content, channels) if is_tiff(content) else None


def measure_image(file: IO[bytes]) -> Size:
    """The size (rows, columns), upright, of an image that Pillow reads, by its header.

    A PNG may say at its end how it is turned, which is not looked at.
    """
    with open_image(file) as image:
        orientation = _read_orientation(image, loads=False)
        return turn_form(Form((image.height, image.width), 1), orientation).size


def _read_bands(content: bytes, channels: int) -> Values | None:
    """The values of a TIFF; None if Pillow reads as much of it."""
    if channels in PLAIN_CHANNELS and not exceeds_pillow(content):
        return None
    try:
        return read_tiff(content, channels)
    except MissingCodec:
        if channels not in PLAIN_CHANNELS or not _can_load(content):
            raise
        return None


def _can_load(content: bytes) -> bool:
    """Whether Pillow can decode a file, which it may where packages of other decoders are missing."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except Exception:  # whatever a decoder raises, it can't
        return False
    return True


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


def _read_orientation(image_or_exif: Image.Image | bytes, loads: bool = True) -> int:
    """The Exif orientation of an image or of an Exif segment; 1, upright, if it has none or a broken tag.

    Pillow decodes a whole PNG to look for it at the end, unless it must not be loaded.
    """
    try:
        if isinstance(image_or_exif, bytes):
            exif = Image.Exif()
            exif.load(image_or_exif)
        else:
            exif = image_or_exif.getexif() if loads else Image.Image.getexif(image_or_exif)
        orientation = exif.get(ORIENTATION, 1)
    except Exception:  # a broken tag is no reason to lose the image
        return 1
    return orientation if isinstance(orientation, int) else 1


def to_form(
    image: Image.Image, form: Form, rules: PixelRules = PLAIN, content: bytes = b""
) -> NDArray[Any]:
    """An image, resized (bicubic) and cut or padded to its form, with pixels of the type of the rules.

    The Exif orientation is applied. An animation gives its first frame. `rules` are for transparent pixels, which are
    blended with white without them unless the form counts alpha as a channel, and for more than 8 bits a channel: 16-bit
    images keep their upper 8 bits without them. `content` is the file of the image, which Pillow reads only 8 bits of if it
    has colours of 16. An image of the right size is not changed. Raises UnreadableImage if the range of the pixels is not
    known, if their channels don't fit the form, or if there are more than 2^28 of them.
    """
    check_num_pixels(image.width, image.height)
    image.load()  # some formats know their orientation only after this
    orientation = _read_orientation(image)
    turned = turn_form(form, orientation)
    values = _read_values(image, form.channels, rules, content)
    if values is not None:
        return apply_orientation(values_to_pixels(values, turned, rules), orientation)
    image = fit_image(_to_eight_bits(image, rules), turned.size, form.fit)
    mode = "RGB" if form.channels == 3 else "L"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    pixels = pixels[None] if form.channels == 1 else pixels.transpose(2, 0, 1)
    return apply_orientation(pixels, orientation)


def _read_values(
    image: Image.Image, channels: int, rules: PixelRules, content: bytes
) -> Values | None:
    """The values of an image, not turned; None if it becomes plain 8-bit grey or RGB."""
    grey = read_grey_values(image)
    if grey is not None:
        return Values(grey[..., None])
    if has_deep_colours(image, content) and (
        rules.reads_all_bits or channels not in PLAIN_CHANNELS
    ):
        deep = read_deep_colours(content)
        if deep is not None:
            return Values(deep, alpha=deep.shape[2] in (2, 4) and deep.shape[2] != channels)
        if rules.depth > 8:
            raise UnreadableImage("16-bit colours of which Pillow reads 8 bits")
    if channels not in PLAIN_CHANNELS:
        return Values(read_samples_as_data(image, channels))
    if rules.depth == 8:
        return None
    plain = np.asarray(_to_eight_bits(image, rules))
    return Values(plain if plain.ndim == 3 else plain[..., None])


def read_samples_as_data(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """The 8-bit samples (h, w, c) of an image whose alpha, if it has one, is data."""
    mode = choose_data_mode(image, channels)
    samples = np.asarray(image if image.mode == mode else image.convert(mode))
    return samples if samples.ndim == 3 else samples[..., None]


def choose_data_mode(image: Image.Image, channels: int) -> str:
    """The mode of an image whose alpha, if it has one, is data.

    Grey and alpha become RGB and alpha if there are 4 channels. The inks of CMYK stay as they are.
    """
    if image.has_transparency_data:
        is_grey = image.mode in ("1", "L", "LA", "La") and channels != 4
        return "LA" if is_grey else "RGBA"
    if image.mode in ("L", "CMYK"):
        return image.mode
    return "L" if image.mode == "1" else "RGB"


def count_channels(image: Image.Image, content: bytes, channels: int) -> int | None:
    """The channels of an image whose alpha, if it has one, is data; None if the image fits `channels` in any case."""
    if channels in PLAIN_CHANNELS:
        return None
    if has_deep_colours(image, content) and content.startswith(PNG):
        return {2: 3, 4: 2, 6: 4}[content[25]]  # colour types
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return 1
    return len(choose_data_mode(image, channels))


def _to_eight_bits(image: Image.Image, rules: PixelRules) -> Image.Image:
    """Convert to 8-bit RGB, or to L if the image is grey."""
    if rules.alpha == "ignore" and has_alpha_channel(image):
        image = image.convert("RGBA").convert("L" if image.mode in ("LA", "La") else "RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


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
    upper, lower = _unpack(content, False), _unpack(content, True)
    return None if upper is None or lower is None else upper.astype(np.uint16) << 8 | lower


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
