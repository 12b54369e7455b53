"""TIFFs of any bits and bands, in each of the ways in which they lie on disk."""

import base64
import io
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from codegrid.data.decode import decode
from codegrid.data.form import Form
from codegrid.data.pixels import PixelRules
from codegrid.data.plain_tiff import PlainSeries, open_plain, open_plain_series, peek_tags
from codegrid.data.tiff import (
    MissingCodec,
    divide_by_alpha,
    exceeds_pillow,
    is_tiff,
    lay_out,
    open_tiff,
    read_layout,
    read_tiff,
)
from codegrid.data.values import UnreadableImage, Values

Array = NDArray[Any]
DEEP = PixelRules((0, 65_535), depth=16)

# Files of 4 x 6 pixels with 5 bands of 16 bits, by rasterio 1.4.4, which interleaves pixels or bands. Band b has the values
# 500 * (24 b + i) of its pixels i.
BY_RASTERIO = {
    "pixel": (
        "c-r&y)MDUZU|`^3U|?isU<9(*fS3`=W&vU*Ae$9P&jVs+s5n?15?hdw1x)V(Vo|6#NRJqjIpR<?AAnc}NpBF44U%60#KBOzHZVYd035;qBOEd?JkUE"
        "3yP&6G_ZP-123z8%^p)&=!F<AKMPkQ<jQw|5_n6E{u9*~b@B;e=vk9pMQvwbj;ap<TlAbcn<>(IX8CDgU5i=}~ui@>n$;tMarE_ute}i2@uEQLK(^CX"
        "X976I<=82r`5YBM&DAZWMalS@0#>J*sX3?Ju1>ym22BiW^K3qzXbn#FrXIb{-N`$n9mqg`{<u|VR$m;m;RKHny=7xj3f*(WegVhIanJ9_`e5t##cFP?"
        "NWsaa14JX#GxF@6fC-_d&o{e)J2&jJuz0k5@^Mpq%noq)yv@O}%^5losjmRAxGqzVed!utEdQDf)&YTwj`G$GX"
    ),
    "band": (
        "c-r&y)MDUZU|`^3U|?isU<9(*fS3`=W&vU*Ae$9P&jVs+s5n?15?hdw1*~Qh5Q{>^L3}YJbHt(MtN>yes5lc42Lah2`C~vF3{`WE0RjZz&;Sl^0L3|g"
        "nk|4h1BhoZGQa^N95OI`VSK@ShxG#c5zZalYj_v%PZ8`8t`RK|Pmzp}_K|gvH&N73mQfW@XVLtj^+xA`-W7urMte*)m@ToGVbx>PU{~Uh;S}Q%;O63C"
        ";icoF;3pEm5%eecL+F$68<A(C55#VXUy(Q`c|vMSdPQbVc0z7QzDJ==u|cUyxkM#THAC%}x)%+1nl7{)Y1`4UrfWgZl)jD$HIoXaq)dyL;WNu&j>$Z"
        "Y1u}~Smar`QvHZ=-2dl5FJ+Xez#toa7Y@M;aXJ^CilD!%GV-5x!b~$QsT<4_1X_2!W=l@*zaOugF8`sX<IB;vrofY@yJecsP<w?b}oEHG>IDF9"
    ),
}

LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {  # settings of tifffile, and the note
    "samples side by side": ({"planarconfig": "contig"}, ""),
    "planes": ({"planarconfig": "separate"}, ""),
    "pages": ({}, "one page a band"),
    "rows": ({}, "one page a row"),
}
PACKINGS: list[dict[str, Any]] = [
    {}, {"compression": "zlib", "predictor": True}, {"compression": "lzw"}, {"compression": "zstd"}, {"tile": (16, 32)},
    {"bigtiff": True}, {"byteorder": ">"}, {"rowsperstrip": 7, "compression": "deflate"}, {"metadata": None},
]  # fmt: skip


def draw(height: int, width: int, channels: int, kind: str = "uint16") -> Array:
    random = np.random.default_rng(channels)
    if kind.startswith("float"):
        return random.normal(size=(height, width, channels)).astype(kind)
    bounds = np.iinfo(kind)
    return random.integers(bounds.min, bounds.max, (height, width, channels), kind, endpoint=True)


def write(values: Array, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **{"photometric": "minisblack", **settings})
    return buffer.getvalue()


def write_as(layout: str, values: Array, **packing: Any) -> bytes:
    """A file of values (h, w, c) whose bands lie in one of the four ways."""
    settings, _ = LAYOUTS[layout]
    planes = layout in ("planes", "pages")
    return write(values.transpose(2, 0, 1) if planes else values, **settings, **packing)


def read(content: bytes, channels: int) -> Values:
    values = read_tiff(content, channels)
    assert values is not None
    return values


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("bands", [2, 3, 4, 5, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_four_ways_in_which_bands_lie_are_the_same_picture(
    layout: str, bands: int, packing: dict[str, Any]
) -> None:
    values = draw(48, 80, bands)
    content = write_as(layout, values, **packing)
    result = read(content, bands)
    assert np.array_equal(result.array, values)
    assert result.array.dtype == np.uint16
    assert (result.note, result.alpha) == (LAYOUTS[layout][1], False)
    assert np.array_equal(decode(content, Form((48, 80), bands), DEEP), values.transpose(2, 0, 1))


@pytest.mark.parametrize(
    "kind", ["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"]
)
@pytest.mark.parametrize("channels", [2, 4, 5, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_of_every_type_are_read_as_they_are(layout: str, channels: int, kind: str) -> None:
    values = draw(20, 30, channels, kind)
    array = read(write_as(layout, values), channels).array
    assert np.array_equal(array, values)
    assert array.dtype == kind


def test_halves_become_floats_that_hold_them() -> None:
    values = draw(9, 20, 2, "float16")
    array = read(write(values, planarconfig="contig"), 2).array
    assert array.dtype == np.float32
    assert np.array_equal(array, values)


@pytest.mark.parametrize("interleave", BY_RASTERIO)
def test_files_of_rasterio_are_read(interleave: str) -> None:
    content = zlib.decompress(base64.b85decode(BY_RASTERIO[interleave]))
    expected = 500 * np.arange(120).reshape(5, 4, 6).transpose(1, 2, 0)
    assert np.array_equal(read(content, 5).array, expected)


@pytest.mark.parametrize("planes", [False, True])
def test_the_fourth_of_four_bands_which_tifffile_marks_as_alpha_is_data(planes: bool) -> None:
    values = draw(48, 80, 4)
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # "future versions" may not mark it
        warnings.simplefilter("ignore", DeprecationWarning)
        tifffile.imwrite(buffer, values.transpose(2, 0, 1) if planes else values)
    with tifffile.TiffFile(io.BytesIO(buffer.getvalue())) as file:
        assert file.pages.first.extrasamples == (2,)
    result = read(buffer.getvalue(), 4)
    assert np.array_equal(result.array, values)
    assert not result.alpha
    assert result.note == "the channel marked alpha is data"


def test_four_channels_of_eight_bits_are_data_if_they_are_counted() -> None:
    values = draw(24, 40, 4, "uint8")
    content = write(values, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(decode(content, Form((24, 40), 4)), values.transpose(2, 0, 1))


def test_alpha_beside_three_channels_is_blended_with_white_or_left_out() -> None:
    values = draw(20, 20, 4)
    values[..., 3] = np.where(np.arange(20) < 10, 0, 65_535)
    content = write(values, photometric="rgb", extrasamples=["unassalpha"])
    assert read(content, 3).alpha
    colours = values[..., :3].transpose(2, 0, 1)
    ignored = PixelRules((0, 65_535), "ignore", depth=16)
    assert np.array_equal(decode(content, Form((20, 20), 3), ignored), colours)
    blended = decode(content, Form((20, 20), 3), DEEP)
    assert np.array_equal(blended[:, :, 10:], colours[:, :, 10:])
    assert set(blended[:, :, :10].flat) == {65_535}


def test_colours_that_are_multiplied_by_alpha_are_divided_by_it() -> None:
    random = np.random.default_rng(0)
    alpha = random.integers(20_000, 65_536, (20, 20, 1))
    colours = random.integers(0, 65_536, (20, 20, 3))
    multiplied = np.rint(colours * (alpha / 65_535))
    values = np.concatenate([multiplied, alpha], 2).astype(np.uint16)
    divided = divide_by_alpha(values)
    assert np.abs(divided[..., :3] - colours).max() <= 2
    assert np.array_equal(divided[..., 3:], alpha)
    content = write(values, photometric="rgb", extrasamples=["assocalpha"])
    assert np.array_equal(read(content, 3).array, divided)
    assert np.array_equal(read(content, 4).array, values)  # four bands are data


def test_a_fourth_channel_without_a_name_is_left_out_of_three() -> None:
    values = draw(20, 20, 4)
    result = read(write(values, photometric="rgb", extrasamples=["unspecified"]), 3)
    assert np.array_equal(result.array, values[..., :3])
    assert result.note == "a fourth channel without a name is left out"


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize(
    ("pages", "channels", "settings"),
    [
        (5, 3, {}),
        (5, 1, {}),
        (3, 1, {}),
        (3, 3, {"imagej": True, "metadata": {"axes": "ZYX"}}),
        (3, 3, {"ome": True, "metadata": {"axes": "TYX"}}),
        (4, 3, {"imagej": True, "metadata": {"axes": "CYX"}}),
    ],
)
def test_pages_of_a_stack_are_no_bands_of_a_plain_picture(
    pages: int, channels: int, settings: dict[str, Any], kind: str
) -> None:
    stack = draw(48, 80, pages, kind)
    content = write(stack.transpose(2, 0, 1), **settings)
    pixels = decode(content, Form((48, 80), channels), DEEP if kind == "uint16" else PixelRules())
    assert np.array_equal(pixels, [stack[..., 0]] * channels)


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize(
    "settings", [{}, {"metadata": None}, {"imagej": True}, {"ome": True}], ids=str
)
def test_three_pages_are_three_channels_unless_they_are_said_to_be_something_else(
    settings: dict[str, Any], kind: str
) -> None:
    values = draw(48, 80, 3, kind)
    axes = {"metadata": {"axes": "CYX"}} if settings and "metadata" not in settings else {}
    content = write(values.transpose(2, 0, 1), **settings, **axes)
    pixels = decode(content, Form((48, 80), 3), DEEP if kind == "uint16" else PixelRules())
    assert np.array_equal(pixels, values.transpose(2, 0, 1))


def test_further_pages_of_several_channels_are_not_read() -> None:
    pages = draw(48, 80, 5)[None] + np.array([0, 1, 2], np.uint16)[:, None, None, None]
    content = write(pages, planarconfig="contig")
    assert np.array_equal(read(content, 5).array, pages[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("bands", "channels"), [(5, 4), (4, 5), (2, 6), (5, 2)])
def test_another_number_of_channels_is_a_sentence(bands: int, channels: int, layout: str) -> None:
    note = LAYOUTS[layout][1]
    expected = f"{bands} channels{', ' + note if note else ''}, where data.channels={channels}"
    with pytest.raises(UnreadableImage) as raised:
        read_tiff(write_as(layout, draw(48, 80, bands)), channels)
    assert str(raised.value) == expected


@pytest.mark.parametrize("layout", ["samples side by side", "planes", "rows"])
def test_five_bands_are_no_picture_of_three_channels(layout: str) -> None:
    for kind in ("uint8", "uint16"):
        with pytest.raises(UnreadableImage, match=r"^5 channels.*where data.channels=3$"):
            decode(write_as(layout, draw(48, 80, 5, kind)), Form((48, 80), 3))


def test_a_stack_of_small_pages_is_not_taken_for_rows() -> None:
    stack = draw(10, 12, 5)
    array = read(write(stack.transpose(2, 0, 1)), 1).array
    assert np.array_equal(array, stack[..., :1])


def test_pages_that_may_be_rows_or_bands_are_a_sentence() -> None:
    content = write(draw(5, 7, 5))
    with pytest.raises(UnreadableImage, match="5 bands or as many rows of 5 bands; save it with"):
        read_tiff(content, 5)


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_channels_that_a_microscope_names_are_bands_of_the_first_picture(kind: str) -> None:
    values = draw(20, 30, 5)
    later = np.stack([values.transpose(2, 0, 1) + np.uint16(i) for i in range(3)])
    content = write(later, metadata={"axes": "ZCYX"}, **{kind: True})
    result = read(content, 5)
    assert np.array_equal(result.array, values)
    assert result.note == "one page a band"
    with pytest.raises(UnreadableImage, match="5 channels, one page a band"):
        read_tiff(content, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_are_turned_as_the_orientation_says(orientation: int) -> None:
    values = draw(20, 30, 5)
    tags = [(0x0112, "H", 1, orientation, True)]
    turned = read(write(values, planarconfig="contig", extratags=tags), 5).array
    plain = Image.fromarray(np.arange(600, dtype=np.int32).reshape(20, 30))
    buffer = io.BytesIO()
    plain.save(buffer, "TIFF", tiffinfo={0x0112: orientation})
    with Image.open(buffer) as image:
        image.load()  # which turns it
        places = np.asarray(image)
    assert np.array_equal(turned, values.reshape(-1, 5)[places])


def test_sixteen_bit_palettes_give_their_colours() -> None:
    indices = np.arange(48, dtype=np.uint16).reshape(6, 8)
    colours = np.random.default_rng(0).integers(0, 2**16, (3, 2**16), np.uint16)
    content = write(indices, photometric="palette", colormap=colours)
    assert np.array_equal(read(content, 3).array, colours[:, indices].transpose(1, 2, 0))


def test_values_of_files_whose_zero_is_white_stay_and_are_noted() -> None:
    values = draw(20, 30, 1)
    for packing in ({}, {"compression": "zlib"}):
        result = read(write(values[..., 0], photometric="miniswhite", **packing), 1)
        assert np.array_equal(result.array, values)
        assert result.note == "0 is white in the files, and the lowest value here"


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_bits_are_unpacked(bits: int) -> None:
    values = draw(20, 31, 1) >> (16 - bits)
    content = write(values[..., 0], bitspersample=bits)
    assert np.array_equal(read(content, 1).array, values)


def test_the_mark_of_missing_data_is_handed_over() -> None:
    values = draw(20, 30, 5, "float32")
    tags = [(42113, "s", 6, "-9999", True)]
    assert read(write(values, planarconfig="contig", extratags=tags), 5).missing == -9999
    assert read(write(values, planarconfig="contig"), 5).missing is None


@pytest.mark.parametrize(
    ("kind", "text", "missing"),
    [
        ("float32", "-3.4028234663852886e+38", -3.4028234663852886e38),
        ("float32", "nan", None),
        ("float32", "none", None),
        ("int16", "-99999", -99999),
        ("uint16", "0", 0),
    ],
)
def test_a_mark_of_missing_data_that_does_not_fit_the_type_is_not_taken_for_0(
    kind: str, text: str, missing: float | None
) -> None:
    values = np.arange(40).reshape(5, 8).astype(kind)
    tags = [(42113, "s", len(text), text, True)]
    content = write(values, extratags=tags)
    assert read(content, 1).missing == missing
    if missing != 0:
        pixels = decode(content, Form((5, 8), 1), PixelRules((-64, 63), depth=16, number_type=kind))
        assert pixels[0, 0, 0] == round(64 / 127 * 65535), "0 is a value"


def test_pyramids_and_masks_are_no_further_pages() -> None:
    buffer = io.BytesIO()
    values = draw(48, 80, 5)
    with tifffile.TiffWriter(buffer) as file:
        settings: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig"}
        file.write(values, **settings)
        file.write(values[::2, ::2], subfiletype=1, **settings)
        file.write(values[..., 0] > 9, subfiletype=4, photometric="mask", metadata=None)
    assert np.array_equal(read(buffer.getvalue(), 5).array, values)


@pytest.mark.parametrize("packing", [*PACKINGS, {"planarconfig": "separate"}], ids=str)
def test_plain_pictures_are_left_to_pillow(packing: dict[str, Any]) -> None:
    planes = "planarconfig" in packing
    for values in (draw(48, 80, 3, "uint8"), draw(48, 80, 4, "uint8")):
        content = write(
            values.transpose(2, 0, 1) if planes else values, photometric="rgb", **packing
        )
        assert not exceeds_pillow(content)
        assert read_tiff(content, 3) is None
    grey = write(draw(48, 80, 1, "uint8")[..., 0], **{**packing, "planarconfig": None})
    assert not exceeds_pillow(grey)
    assert exceeds_pillow(write(draw(48, 80, 3), **{"planarconfig": "contig", **packing})) or planes


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_tags_are_peeked_at_as_tifffile_reads_them(packing: dict[str, Any]) -> None:
    content = write(draw(48, 80, 5, "int16"), planarconfig="contig", **packing)
    assert is_tiff(content)
    tags, following = peek_tags(content)
    with open_tiff(io.BytesIO(content)) as file:
        page = file.pages.first
        for tag in page.tags.values():
            if tag.dtype in (3, 4, 16):
                expected = tag.value if isinstance(tag.value, tuple) else (tag.value,)
                assert tags[tag.code] == expected, tag.name
        assert tags.keys() == {tag.code for tag in page.tags.values()}
    assert following == 0
    assert peek_tags(write_as("pages", draw(20, 30, 5)))[1] > 0


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("rows", [None, 7, 1])
@pytest.mark.parametrize(
    "kind", ["uint8", "uint16", "int16", "int32", "float16", "float32", "float64"]
)
def test_plain_files_are_read_without_tifffile_as_it_reads_them(
    kind: str, rows: int | None, bigtiff: bool, byteorder: str
) -> None:
    settings: dict[str, Any] = {"rowsperstrip": rows, "bigtiff": bigtiff, "byteorder": byteorder}
    for layout in ("samples side by side", "planes", "pages"):
        content = write_as(layout, draw(20, 30, 5, kind), **settings)
        assert open_plain_series(content) if layout == "pages" else open_plain(content)
        with open_tiff(io.BytesIO(content)) as file:
            expected = read_layout(lay_out(file, 5), 5)
        result = read(content, 5)
        assert np.array_equal(result.array, expected.array)
        assert result.array.dtype == expected.array.dtype
        assert (result.note, result.alpha, result.missing) == (expected.note, False, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"compression": "zlib"},
        {"tile": (16, 32)},
        {"extratags": [(42113, "s", 3, "-9", True)]},
        {"extratags": [(274, "H", 1, 6, True)]},
        {"photometric": "ycbcr", "planarconfig": "contig"},
        {"bitspersample": 12},
    ],
    ids=str,
)
def test_files_that_are_not_plain_are_left_to_tifffile(settings: dict[str, Any]) -> None:
    values = draw(48, 80, 3) >> 4
    values = values[..., 0] if "bitspersample" in settings else values
    assert open_plain(write(values, **{"planarconfig": "contig", **settings})) is None


@pytest.mark.parametrize("layout", ["pages", "rows"])
def test_pages_without_tags_of_their_own_are_read(layout: str) -> None:
    values = draw(20, 30, 5)
    content = write_as(layout, values, truncate=True)
    assert peek_tags(content)[1] == 0
    assert np.array_equal(read(content, 5).array, values)


@pytest.mark.parametrize(
    "settings",
    [{"compression": "zlib"}, {"metadata": None}, {"imagej": True}, {"ome": True}, {"truncate": True}, {"tile": (16, 16)}],
    ids=str,
)  # fmt: skip
def test_series_that_are_not_plain_are_left_to_tifffile(settings: dict[str, Any]) -> None:
    values = draw(20, 30, 5)
    content = write_as("pages", values, **settings)
    assert open_plain_series(content) is None
    assert np.array_equal(read(content, 5).array, values)
    assert open_plain_series(write_as("rows", values)) is None
    assert open_plain_series(write_as("pages", values)[:-200]) is None


def test_pages_that_do_not_follow_each_other_are_read_one_by_one() -> None:
    values = draw(20, 30, 5)
    content = write_as("pages", values, rowsperstrip=20, align=4096, contiguous=False)
    series = open_plain_series(content)
    assert series
    pages = [series[i] for i in (4, 0, 3, 1, 2)]
    mixed = PlainSeries(pages)
    assert np.array_equal(mixed.asarray(), values.transpose(2, 0, 1)[[4, 0, 3, 1, 2]])
    assert np.array_equal(series.asarray(), values.transpose(2, 0, 1))


def test_pages_strips_out_of_order_and_cut_files_are_not_plain() -> None:
    assert open_plain(write_as("pages", draw(20, 30, 5))) is None
    assert open_plain(write_as("rows", draw(20, 30, 5))) is None
    content = write(draw(48, 80, 5), planarconfig="contig", rowsperstrip=16)
    assert open_plain(content)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        offsets = file.pages.first.tags["StripOffsets"]
        first, second, third = offsets.value
        at, end = file.pages.first.dataoffsets[0], file.pages.first.dataoffsets[-1] + 1
    mixed = bytearray(content)
    mixed[offsets.valueoffset : offsets.valueoffset + 12] = struct.pack(
        "<III", second, first, third
    )
    assert open_plain(bytes(mixed)) is None
    assert open_plain(content[:end]) is None
    assert at == first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_damage_to_bands_is_unreadable_or_an_image(layout: str) -> None:
    random = np.random.default_rng(0)
    whole = write_as(layout, draw(20, 30, 5), compression="zlib")
    for _ in range(60):
        content = bytearray(
            whole[: random.integers(4, len(whole))] if random.random() < 0.3 else whole
        )
        for at in random.integers(4, min(len(content), 400), 3):
            content[at] = random.integers(256)
        with suppress(UnreadableImage):
            assert decode(bytes(content), Form((16, 16), 5), DEEP).shape == (5, 16, 16)


def test_a_page_that_lacks_some_of_its_strips_is_unreadable() -> None:
    """tifffile would fill them with zeros."""
    content = bytearray(write(draw(48, 80, 5), planarconfig="contig", rowsperstrip=16))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        at = file.pages.first.tags["ImageLength"].valueoffset
    content[at : at + 2] = (96).to_bytes(2, "little")
    with pytest.raises(UnreadableImage, match="3 of 6 pieces, truncated"):
        read_tiff(bytes(content), 5)


def test_a_compression_without_its_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw(48, 80, 5)
    for compression, error in (
        ("lzw", ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")),
        ("zstd", ModuleNotFoundError("No module named 'compression'")),
    ):
        content = write(values, planarconfig="contig", compression=compression)
        monkeypatch.setattr(tifffile.TiffPage, "asarray", _raise(error))
        with pytest.raises(MissingCodec) as raised:
            decode(content, Form((48, 80), 5), DEEP)
        expected = f"{compression.upper()} compression, which needs pip install imagecodecs"
        assert str(raised.value) == expected
        monkeypatch.undo()


def test_pillow_reads_compressions_whose_package_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = draw(20, 20, 3)
    files = [
        (write(values, photometric="rgb", compression="lzw"), values.transpose(2, 0, 1)),
        (write(values[..., 0], compression="lzw"), values[None, ..., 0]),
    ]
    error = ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")
    monkeypatch.setattr(tifffile.TiffPage, "asarray", _raise(error))
    for content, expected in files:
        assert np.array_equal(decode(content, Form((20, 20), len(expected)), DEEP), expected)


def _raise(error: Exception) -> Any:
    def fail(*arguments: object, **settings: object) -> None:
        raise error

    return fail


def test_bands_are_brought_to_a_form_of_another_size() -> None:
    values = draw(48, 80, 5)
    content = write_as("rows", values)
    for fit in ("crop", "pad", "stretch"):
        pixels = decode(content, Form((24, 24), 5, fit), DEEP)
        assert (pixels.shape, pixels.dtype) == ((5, 24, 24), np.uint16)


def test_a_file_on_disk_is_read_as_its_content(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", draw(48, 80, 5))
    content = (tmp_path / "a.tif").read_bytes()
    assert np.array_equal(read(content, 5).array, draw(48, 80, 5))
