import io
import struct
import sys
import zlib
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from codegrid.data.decode import (
    UnreadableImage,
    decode,
    read_deep_colours,
    register_heif,
    to_form,
)
from codegrid.data.form import Form
from codegrid.data.orientation import apply_orientation
from codegrid.data.pixels import PixelRules
from codegrid.data.ranges import FULL_16_BITS

Pixels = NDArray[np.uint8]


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image like a photograph: soft blobs of colour."""
    blobs = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def saved(image: Image.Image, format: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def pillow(content: bytes) -> Image.Image:
    """The image as Pillow alone decodes it."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def by_pillow(content: bytes, side: int, channels: int = 3) -> Pixels:
    """What `decode` should return, computed with Pillow alone and at full size."""
    image = ImageOps.exif_transpose(pillow(content)).convert("RGB" if channels == 3 else "L")
    pixels = np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def png(pixels: NDArray[Any], colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of 8- or 16-bit pixels (h, w, ...) with a colour type and extra chunks, not all of which Pillow can write."""
    big = pixels.astype(pixels.dtype.newbyteorder(">"))
    header = struct.pack(
        ">IIBBBBB", pixels.shape[1], pixels.shape[0], 8 * pixels.itemsize, colour, 0, 0, 0
    )
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in big))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def segment(marker: int, content: bytes) -> bytes:
    """A segment of a JPEG file."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def disable_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise ValueError("not today")

    monkeypatch.setattr("codegrid.data.decode.simplejpeg.decode_jpeg", refuse)


@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("side", [1, 7, 16, 33])
def test_a_square_jpeg_of_the_right_size_equals_pillows(
    side: int, progressive: bool, sampling: str
) -> None:
    content = saved(noise(side, side), "JPEG", subsampling=sampling, progressive=progressive)
    assert np.array_equal(decode(content, Form.square(side, 3)), by_pillow(content, side))


@pytest.mark.parametrize("size", [(33, 47), (16, 17), (5, 31), (1, 9), (61, 63)])
@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:0"])
def test_a_jpeg_that_is_scaled_without_a_fraction_equals_pillows(
    size: tuple[int, int], sampling: str
) -> None:
    content = saved(noise(*size), "JPEG", subsampling=sampling)
    assert np.array_equal(decode(content, Form.square(32, 3)), by_pillow(content, 32))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_jpeg_equals_pillows(channels: int) -> None:
    content = saved(noise(17, 17).convert("L"), "JPEG")
    assert np.array_equal(
        decode(content, Form.square(17, channels)), by_pillow(content, 17, channels)
    )


def test_a_colour_jpeg_becomes_the_grey_that_it_holds() -> None:
    content = saved(noise(17, 17), "JPEG")
    luma = Image.open(io.BytesIO(content))
    luma.draft("L", (17, 17))  # Pillow decodes the luma only
    assert np.array_equal(decode(content, Form.square(17, 1))[0], np.asarray(luma))


@pytest.mark.parametrize("size", [(130, 130), (401, 299), (1000, 300), (256, 512)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_that_is_decoded_at_a_fraction_is_close_to_the_whole(
    size: tuple[int, int], progressive: bool
) -> None:
    content = saved(smooth(*size), "JPEG", progressive=progressive)
    # The last column of a JPEG that is decoded at 1/8 may cover fewer than eight pixels, which stretches the image a little.
    assert (
        np.abs(decode(content, Form.square(32, 3)).astype(int) - by_pillow(content, 32)).max() <= 8
    )


def test_the_slow_path_scales_a_jpeg_as_the_fast_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved(smooth(401, 299), "JPEG")
    fast = decode(content, Form.square(32, 3)).astype(int)
    disable_simplejpeg(monkeypatch)
    assert np.abs(decode(content, Form.square(32, 3)) - fast).max() <= 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_tag_says(orientation: int, kind: str) -> None:
    content = saved(noise(16, 16), kind, exif=exif(orientation))
    assert np.array_equal(decode(content, Form.square(16, 3)), by_pillow(content, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_slow_path_turns_a_jpeg_too(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    disable_simplejpeg(monkeypatch)
    content = saved(noise(16, 16), "JPEG", exif=exif(orientation))
    assert np.array_equal(decode(content, Form.square(16, 3)), by_pillow(content, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_is_scaled_is_turned_too(orientation: int) -> None:
    content = saved(smooth(40, 90), "PNG", exif=exif(orientation))
    assert (
        np.abs(decode(content, Form.square(16, 3)).astype(int) - by_pillow(content, 16)).max() <= 1
    )


def test_a_jpeg_with_stray_bytes_is_still_read() -> None:
    content = saved(noise(16, 16), "JPEG", exif=exif(6))
    stray = content[:20] + bytes(5) + content[20:]
    with pytest.raises(ValueError, match="extraneous"):  # Pillow forgives them
        simplejpeg.decode_jpeg(stray)
    assert np.array_equal(decode(stray, Form.square(16, 3)), decode(content, Form.square(16, 3)))


def test_orientation_six_matches_a_hand_computed_example() -> None:
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert apply_orientation(pixels, 6).tolist() == [[[4, 1], [5, 2], [6, 3]]]
    assert apply_orientation(pixels, 1) is pixels


@pytest.mark.parametrize(
    "before",
    [
        segment(0xE2, b"ICC_PROFILE\0" + b"Exif" * 3000),
        segment(0xFE, b"\xff\xda" + b"a comment that holds the mark of the pixels"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"x" * 700),
        segment(0xE2, bytes(65_000)) * 3,
        b"\xff\xff\xff",
        b"",
    ],
    ids=["colour profile", "comment", "XMP", "three large ones", "fill", "none"],
)
def test_an_exif_segment_is_found_behind_others(before: bytes) -> None:
    content = saved(noise(16, 16), "JPEG")
    tag = segment(0xE1, b"Exif\0\0" + exif(6).tobytes().removeprefix(b"Exif\0\0"))
    late = content[:20] + before + tag + content[20:]  # the first 20 bytes are SOI and APP0
    assert np.array_equal(
        decode(late, Form.square(16, 3)), np.rot90(decode(content, Form.square(16, 3)), -1, (1, 2))
    )


def test_a_large_exif_segment_is_read() -> None:
    tags = exif(6)
    tags[0x010E] = "a long description " * 3000
    content = saved(noise(16, 16), "JPEG", exif=tags)
    assert np.array_equal(decode(content, Form.square(16, 3)), by_pillow(content, 16))


@pytest.mark.parametrize(
    "tag",
    [b"Exif\0\0", b"Exif\0\0no TIFF header at all", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif"],
)
def test_a_broken_exif_tag_is_ignored(tag: bytes) -> None:
    content = saved(noise(16, 16), "JPEG")
    assert np.array_equal(
        decode(content[:20] + segment(0xE1, tag) + content[20:], Form.square(16, 3)),
        decode(content, Form.square(16, 3)),
    )


@pytest.mark.parametrize("orientation", [0, 9, 99])
def test_an_orientation_that_does_not_exist_changes_nothing(orientation: int) -> None:
    content = saved(noise(16, 16), "PNG", exif=exif(orientation))
    assert np.array_equal(
        decode(content, Form.square(16, 3)), np.asarray(noise(16, 16)).transpose(2, 0, 1)
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_a_png_gives_three_channels_and_one(mode: str) -> None:
    plain = (
        Image.fromarray(np.full((9, 12), 2**15, np.uint16))
        if mode == "I;16"
        else smooth(9, 12).convert(mode)
    )
    content = saved(plain, "PNG")
    assert decode(content, Form.square(16, 3)).shape == (3, 16, 16)
    assert decode(content, Form.square(16, 1)).shape == (1, 16, 16)


def test_sixteen_bit_grey_keeps_its_upper_eight_bits() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (16, 16), np.uint16)
    for kind in ("PNG", "TIFF"):
        content = saved(Image.fromarray(values), kind)
        assert np.array_equal(decode(content, Form.square(16, 1))[0], values // 256)
        assert np.array_equal(
            decode(content, Form.square(16, 3)), np.broadcast_to(values // 256, (3, 16, 16))
        )


def test_sixteen_bit_colour_keeps_its_upper_eight_bits() -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (16, 16, 3), np.uint16)
    assert np.array_equal(
        decode(png(values, 2), Form.square(16, 3)), (values // 256).transpose(2, 0, 1)
    )


def test_transparent_pixels_lie_on_white_in_every_mode() -> None:
    opaque = np.asarray(noise(16, 16))
    clear = np.random.default_rng(1).random((16, 16)) < 0.5
    rgba = Image.fromarray(np.dstack([opaque, np.where(clear, 0, 255)]).astype(np.uint8))
    expected = np.where(clear[..., None], 255, opaque).transpose(2, 0, 1)
    for kind, settings in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert np.array_equal(decode(saved(rgba, kind, **settings), Form.square(16, 3)), expected)


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    half = Image.new("RGBA", (4, 4), (200, 100, 0, 51))
    assert decode(saved(half, "PNG"), Form.square(4, 3))[:, 0, 0].tolist() == [244, 224, 204]
    grey = Image.new("LA", (4, 4), (100, 51))
    assert decode(saved(grey, "PNG"), Form.square(4, 1))[0, 0, 0] == 224


def test_a_transparent_colour_of_a_palette_lies_on_white() -> None:
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
    palette = Image.fromarray(indices).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = np.array([[10, 20, 30], [255, 255, 255], [70, 80, 90]], np.uint8)
    assert np.array_equal(
        decode(saved(palette, "PNG", transparency=1), Form.square(4, 3)),
        colours[indices].transpose(2, 0, 1),
    )


@pytest.mark.parametrize(
    ("pixels", "colour", "key"),
    [
        (np.full((4, 4, 3), 7, np.uint8), 2, struct.pack(">HHH", 7, 7, 7)),
        (np.full((4, 4), 7, np.uint8), 0, struct.pack(">H", 7)),
    ],
    ids=["RGB", "grey"],
)
def test_a_transparent_colour_without_a_palette_lies_on_white_too(
    pixels: Pixels, colour: int, key: bytes
) -> None:
    assert set(decode(png(pixels, colour, (b"tRNS", key)), Form.square(4, 3)).flat) == {255}


def test_cmyk_comes_close_to_its_colours() -> None:
    image = smooth(16, 16)
    for kind in ("JPEG", "TIFF"):
        quality = {"quality": 95} if kind == "JPEG" else {}
        pixels = decode(saved(image.convert("CMYK"), kind, **quality), Form.square(16, 3))
        assert np.abs(pixels.astype(int) - np.asarray(image).transpose(2, 0, 1)).max() <= 8


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    settings = {"lossless": True} if kind == "WEBP" else {}
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert decode(content, Form.square(8, 3))[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_an_image_of_one_pixel_or_one_line_fills_the_square(
    size: tuple[int, int], kind: str
) -> None:
    assert set(
        decode(saved(Image.new("RGB", size, (90, 90, 90)), kind), Form.square(16, 3)).flat
    ) == {90}


def test_the_middle_of_a_wide_image_is_cropped() -> None:
    wide = np.zeros((4, 10, 3), np.uint8)
    wide[:, 3:7] = 200
    assert set(decode(saved(Image.fromarray(wide), "PNG"), Form.square(4, 3)).flat) == {200}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"no picture", "no image of a known format"),
        (b"\xff\xd8\xff", "no image of a known format"),
        (saved(smooth(90, 90), "JPEG")[:-400], "truncated"),
        (saved(noise(90, 90), "PNG")[:-400], "truncated"),
        (saved(noise(90, 90), "GIF")[:-4000], "truncated"),
        (saved(smooth(90, 90), "JPEG")[:300], "[Tt]runcated|no image"),
        (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point pixels"),
        (saved(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "32-bit pixels"),
        (saved(Image.fromarray(np.full((4, 4), -1, np.int32)), "TIFF"), "32-bit pixels"),
        (saved(Image.new("L", (4, 4)), "EPS"), "PostScript"),
    ],
    ids=[
        "empty",
        "text",
        "magic",
        "jpeg",
        "png",
        "gif",
        "header",
        "float",
        "int32",
        "negative",
        "eps",
    ],
)
def test_content_that_cannot_be_decoded_gets_a_short_reason(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason) as raised:
        decode(content, Form.square(16, 3))
    assert len(str(raised.value)) < 200
    assert "0x" not in str(raised.value)  # no address in memory


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_any_damage_is_unreadable_or_an_image_and_never_another_error(kind: str) -> None:
    random = np.random.default_rng(0)
    whole = saved(noise(24, 24), kind)
    for _ in range(40):
        content = bytearray(
            whole[: random.integers(4, len(whole))] if random.random() < 0.3 else whole
        )
        for at in random.integers(0, len(content), 3):
            content[at] = random.integers(256)
        with suppress(UnreadableImage):
            assert decode(bytes(content), Form.square(16, 3)).shape == (3, 16, 16)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("codegrid.data.values.MAX_PIXELS", 99)
    with pytest.raises(UnreadableImage, match=r"20 x 10 pixels, more than 2\^28"):
        decode(saved(Image.new("L", (20, 10)), "PNG"), Form.square(16, 3))


TWELVE_BITS = PixelRules((0, 4095))
KINDS = [(0, ()), (2, (3,)), (4, (2,)), (6, (4,))]  # colour types of PNG, and their channels


@pytest.mark.parametrize(("colour", "channels"), KINDS)
def test_twelve_bits_of_any_png_keep_their_upper_eight(
    colour: int, channels: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (16, 16, *channels), np.uint16)
    if channels in ((2,), (4,)):
        values[..., -1] = 65_535  # opaque
    pixels = decode(png(values, colour), Form.square(16, 3), TWELVE_BITS)
    colours = values.reshape(16, 16, -1)[..., : 3 if channels in ((3,), (4,)) else 1] >> 4
    assert np.array_equal(pixels, np.broadcast_to(colours.transpose(2, 0, 1), (3, 16, 16)))


@pytest.mark.parametrize(("colour", "channels"), KINDS[1:])
def test_all_bits_of_sixteen_bit_pngs_are_read(colour: int, channels: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).integers(0, 2**16, (9, 7, *channels), np.uint16)
    read = read_deep_colours(png(values, colour))
    assert read is not None
    assert np.array_equal(read, values)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("channels", [3, 4])
def test_all_bits_of_sixteen_bit_tiffs_are_read(
    channels: int, byteorder: str, compression: str | None
) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(1).integers(0, 2**16, (19, 17, channels), np.uint16)
    buffer = io.BytesIO()
    settings = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    settings |= {"photometric": "rgb", "compression": compression, "byteorder": byteorder}
    tifffile.imwrite(buffer, values, rowsperstrip=5, **settings)
    read = read_deep_colours(buffer.getvalue())
    assert read is not None
    assert np.array_equal(read, values)


@pytest.mark.parametrize("rules", [PixelRules(), PixelRules((0, 4095))], ids=["plain", "12 bits"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bit_planes_give_the_same_image_as_interleaved_pixels(
    orientation: int, byteorder: str, rules: PixelRules
) -> None:
    """Pillow 13 reads them as noise."""
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(1).integers(0, 4096, (19, 17, 3), np.uint16)
    planes, interleaved = io.BytesIO(), io.BytesIO()
    tags = [(0x0112, "H", 1, orientation, True)]
    settings = {"photometric": "rgb", "byteorder": byteorder, "extratags": tags}
    tifffile.imwrite(planes, values.transpose(2, 0, 1), planarconfig="separate", **settings)
    tifffile.imwrite(interleaved, values, **settings)
    expected = decode(interleaved.getvalue(), Form.square(16, 3), rules)
    assert np.array_equal(decode(planes.getvalue(), Form.square(16, 3), rules), expected)


@pytest.mark.parametrize(
    ("values", "value_range", "expected"),
    [
        (np.array([[0, 200], [100, 255]], np.int32), (0, 255), [[0, 200], [100, 255]]),
        (np.array([[0, 2], [1, 3]], np.int32), (0, 3), [[0, 170], [85, 255]]),
        (np.array([[-1024, 0], [-1, 1023]], np.int32), (-1024, 1023), [[0, 128], [127, 255]]),
        (np.array([[0, 0.5], [0.25, 1]], np.float32), (0, 1), [[0, 128], [64, 255]]),
        (np.array([[0, 2**-15], [2**-14, 2**-16]], np.float32), (0, 2**-14), [[0, 128], [255, 64]]),
        (np.array([[0, 2**31], [2**30, 2**32 - 1]], np.uint32), (0, 2**32 - 1), [[0, 128], [64, 255]]),
    ],
    ids=["int32", "few levels", "negative", "float", "tiny float", "uint32"],
)  # fmt: skip
def test_thirty_two_bits_are_read_by_the_range_of_their_dataset(
    values: NDArray[Any], value_range: tuple[float, float], expected: list[list[int]]
) -> None:
    if values.dtype == np.uint32:  # Pillow writes none
        tifffile = pytest.importorskip("tifffile")
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values, photometric="minisblack")
        content = buffer.getvalue()
    else:
        content = saved(Image.fromarray(values), "TIFF")
    assert decode(content, Form.square(2, 1), PixelRules(value_range))[0].tolist() == expected


def test_pixels_that_are_no_numbers_are_black_and_an_image_of_them_is_unreadable() -> None:
    values = np.array([[np.nan, 1], [0.5, -3.4e38]], np.float32)
    content = saved(Image.fromarray(values), "TIFF")
    assert decode(content, Form.square(2, 1), PixelRules((0, 1)))[0].tolist() == [
        [0, 255],
        [128, 0],
    ]
    with pytest.raises(UnreadableImage, match="no pixel is a number"):
        decode(
            saved(Image.new("F", (4, 4), float("nan")), "TIFF"),
            Form.square(4, 1),
            PixelRules((0, 1)),
        )


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_fourth_channel_that_is_ignored_changes_no_colour(mode: str) -> None:
    opaque = noise(16, 16).convert("L" if mode == "LA" else "RGB")
    infrared = Image.fromarray(np.asarray(noise(16, 16))[..., 0].copy())
    image = opaque.copy()
    image.putalpha(infrared)
    rules = PixelRules(FULL_16_BITS, "ignore")
    expected = decode(saved(opaque, "PNG"), Form.square(16, 3))
    assert np.array_equal(decode(saved(image, "PNG"), Form.square(16, 3), rules), expected)
    assert not np.array_equal(decode(saved(image, "PNG"), Form.square(16, 3)), expected)


def test_a_transparent_colour_is_no_fourth_channel() -> None:
    content = png(np.full((4, 4), 7, np.uint8), 0, (b"tRNS", struct.pack(">H", 7)))
    assert set(decode(content, Form.square(4, 3), PixelRules(FULL_16_BITS, "ignore")).flat) == {255}


def test_heif_is_read_if_the_library_for_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\0\0\0\x18ftypheic" + bytes(40)
    opened = []
    module = ModuleType("pillow_heif")
    module.register_heif_opener = lambda: opened.append(True)  # type: ignore[attr-defined]
    for installed, expected in ((None, []), (module, [True])):
        register_heif.cache_clear()
        monkeypatch.setitem(sys.modules, "pillow_heif", installed)
        with pytest.raises(UnreadableImage, match="no image of a known format"):
            decode(content, Form.square(4, 3))
        assert opened == expected
    register_heif.cache_clear()


def test_to_form_takes_an_image_that_is_in_no_file() -> None:
    pixels = np.asarray(noise(16, 16))
    assert np.array_equal(
        to_form(Image.fromarray(pixels), Form.square(16, 3)), pixels.transpose(2, 0, 1)
    )


ALL_BITS = PixelRules(FULL_16_BITS, depth=16)


@pytest.mark.parametrize(("colour", "samples"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_every_channel_of_a_sixteen_bit_png_is_data_if_it_is_counted(
    colour: int, samples: int
) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (9, 7, samples), np.uint16)
    content = png(values, colour)
    form = Form((9, 7), samples)
    assert np.array_equal(decode(content, form, ALL_BITS), values.transpose(2, 0, 1))
    assert np.array_equal(decode(content, form), (values >> 8).transpose(2, 0, 1))


def test_transparent_colours_of_sixteen_bits_lie_on_white() -> None:
    values = np.full((4, 4, 4), 20_000, np.uint16)
    values[..., 3] = np.arange(4) * 21_845  # clear, two steps between, and opaque
    pixels = decode(png(values, 6), Form.square(4, 3), ALL_BITS)
    assert pixels[0, 0].tolist() == [65_535, 50_357, 35_178, 20_000]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_eight_bits_become_sixteen_among_deeper_images(kind: str) -> None:
    content = saved(noise(16, 16), kind)
    shallow = decode(content, Form.square(16, 3))
    deep = decode(content, Form.square(16, 3), ALL_BITS)
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - shallow).max() <= (3 if kind == "JPEG" else 0)  # by another decoder


def test_a_palette_with_a_clear_colour_has_four_channels() -> None:
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
    palette = Image.fromarray(indices).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    pixels = decode(saved(palette, "PNG", transparency=1), Form.square(4, 4))
    assert np.array_equal(pixels[3], np.where(indices == 1, 0, 255))
    assert np.array_equal(pixels[0], np.array([10, 40, 70])[indices])


@pytest.mark.parametrize(
    ("image", "channels", "words"),
    [
        (noise(8, 8), 4, "3 channels"),
        (noise(8, 8), 2, "3 channels"),
        (noise(8, 8).convert("L"), 2, "1 channel"),
        (noise(8, 8).convert("L"), 4, "1 channel"),
        (noise(8, 8).convert("RGBA"), 5, "4 channels"),
        (noise(8, 8).convert("RGBA"), 2, "4 channels"),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_channels_that_are_not_there_are_never_made_up(
    kind: str, image: Image.Image, channels: int, words: str
) -> None:
    with pytest.raises(UnreadableImage) as raised:
        decode(saved(image, kind), Form.square(8, channels))
    assert str(raised.value) == f"{words}, where data.channels={channels}"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_every_fit_is_turned_as_the_exif_tag_says(fit: str, orientation: int) -> None:
    image = smooth(40, 80)
    form = Form((32, 60), 3, fit)  # with even margins
    content = saved(image, "PNG", exif=exif(orientation))
    upright = saved(ImageOps.exif_transpose(pillow(content)), "PNG", exif=exif(1))
    assert np.abs(decode(content, form).astype(int) - decode(upright, form)).max() <= 1
    jpeg = saved(image, "JPEG", exif=exif(orientation), quality=100, subsampling="4:4:4")
    assert np.abs(decode(jpeg, form).astype(int) - decode(upright, form)).mean() < 3
