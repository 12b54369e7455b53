"""Judging tokenizers of images of any size, channels and depth, without a command."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_uint8
from codegrid.evaluation.features import Extractor, TorchScriptNetwork
from codegrid.evaluation.scores import SCORES, ScoreSheet
from codegrid.evaluation.table import format_table
from codegrid.evaluation.units import count_pixel_bits
from tests.helpers.bands import Bands
from tests.helpers.evaluation import choose_settings
from tests.helpers.stage1 import Noise, make_tokenizer
from vqgan.judging import TokenizerJudge, compare_codecs
from vqgan.losses.perceptual import LPIPS
from vqgan.tokenizer import Tokenizer

SIZE, GRID = (24, 40), (6, 10)
PLAIN_8_BITS = {"depth": 8, "range": "auto", "number_type": None}


def start_tokenizer(data: ImageDataModule) -> Tokenizer:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(data.image_size, GRID, channels=data.channels).eval()
    tokenizer.initialise(data.preprocess(data.take_evenly("train", 32)[0]))
    tokenizer.rules = data.rules
    return tokenizer


def judge(
    data: ImageDataModule, own: TorchScriptNetwork | None = None, **changed: Any
) -> tuple[TokenizerJudge, ScoreSheet]:
    judging = TokenizerJudge(start_tokenizer(data), data, choose_settings(**changed), own)
    judging.measure_all()
    return judging, judging.scores()


def pixels_of(judging: TokenizerJudge) -> tuple[Tensor, Tensor]:
    """All validation images and their reconstructions as whole pixels, float64."""
    data, tokenizer = judging.images, judging.tokenizer
    x = data.preprocess(data.take_evenly("val", 12)[0])
    with torch.no_grad():
        x_hat = tokenizer.decode(tokenizer.encode(x).z_q)
    top = data.rules.top
    return tuple(((each.double().clamp(-1, 1) + 1) / 2 * top).round() for each in (x, x_hat))  # type: ignore[return-value]


def test_every_score_of_five_bands_of_16_bits_is_a_number_or_has_a_reason(tmp_path: Path) -> None:
    judging, sheet = judge(Bands(tmp_path), proxy=3, ratios=True)
    for name, score in SCORES.items():
        if score.stages[0] == "vqgan" and score.group in ("pixels", "distance", "codes", "rate"):
            assert sheet.values[name] is not None or sheet.absent[name]
    left_out = {name for name in SCORES if name.startswith(("pfid", "probe"))}
    assert set(sheet.absent) == {
        "rfid",
        "rfid_real",
        "rfid_ratio",
        "kid",
        "mind",
        "lpips",
        *left_out,
    }
    ratio = sheet.values["rfid_proxy"] / sheet.values["rfid_real_proxy"]  # type: ignore[operator]
    assert sheet.values["rfid_ratio_proxy"] == pytest.approx(ratio, rel=1e-4)
    for name in ("kid_proxy", "mind_proxy"):
        low, high = sheet.intervals[name]
        assert low <= sheet.values[name] <= high  # type: ignore[operator]
    assert sheet.values["rfid_proxy"] > 0  # type: ignore[operator]
    x, x_hat = pixels_of(judging)
    errors = (x - x_hat).square().mean((1, 2, 3))
    psnr = float((10 * (65_535**2 / errors).log10()).mean())
    assert sheet.values["psnr"] == pytest.approx(psnr, rel=1e-4)
    assert sheet.values["l1"] == pytest.approx(float((x - x_hat).abs().mean()) / 65_535, rel=1e-4)


def test_scores_of_pixels_state_the_range_and_the_depth(tmp_path: Path) -> None:
    _, sheet = judge(Bands(tmp_path))
    for name in ("psnr", "ssim", "ms_ssim", "l1", "l2", "sharpness"):
        about = sheet.provenance[name]
        assert (about["range"], about["depth"], about["size"]) == ([0, 4095], 16, [5, *SIZE])
    assert "at most 107.12 dB" in sheet.provenance["psnr"]["floor"]
    result = {"ckpt": "runs/x", "K": 16, "grid": GRID, "n": 12, "split": "val", **sheet.values}
    table = format_table({**result, **sheet.describe()}, list(sheet.values))
    assert "dB of the range 0 to 4,095, higher is better" in table
    assert "pixels of 60 bits relative to the codes" in table


def test_channels_with_ranges_of_their_own_are_all_named(tmp_path: Path) -> None:
    ranges = [[0, 4095], [0, 1023], [-5, 5], [0, 1], [0, 65_535]]
    _, sheet = judge(Bands(tmp_path, range=ranges))
    assert sheet.provenance["psnr"]["range"] == ranges
    bits = 12 + 10 + 4 + 1 + 16
    assert sheet.provenance["compression_ratio"]["pixel_bits"] == bits
    rate = sheet.values["bits_per_image"]
    assert sheet.values["compression_ratio"] == pytest.approx(24 * 40 * bits / rate, rel=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changed", "bits"),
    [
        ({}, 60),
        ({"number_type": "float32"}, 80),
        ({"range": [100, 355]}, 40),
        ({"range": [-0.4, 3.6]}, 10),  # four whole numbers
        ({"depth": 8}, 40),
        ({"depth": 8, "range": "auto", "number_type": None}, 40),
    ],
)
def test_the_bits_of_the_data_are_those_of_its_range(
    tmp_path: Path, changed: dict[str, Any], bits: int
) -> None:
    assert count_pixel_bits(Bands(tmp_path, **changed).rules, 5) == bits


def test_ordinary_images_have_the_provenance_and_the_hash_of_8_bits(tmp_path: Path) -> None:
    data = Noise(16, cache="ram", cache_dir=str(tmp_path))
    tokenizer = make_tokenizer(16, 4).eval()
    tokenizer.initialise(data.preprocess(data.take_evenly("train", 24)[0]))
    judging = TokenizerJudge(tokenizer, data, choose_settings(), None)
    judging.measure_all()
    sheet = judging.scores()
    assert sheet.provenance["psnr"]["range"] == [0, 255]
    assert sheet.provenance["psnr"]["depth"] == 8
    assert "channels" not in sheet.provenance["psnr"]
    assert sheet.values["compression_ratio"] == 16 * 16 * 24 / (16 * 4)


class Seeing(Extractor):
    """Stands in for Inception, and remembers what it sees."""

    name, hash = "instead", "0123"

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        self.inputs.append(images)
        return images.float().mean((2, 3)), None


@pytest.mark.parametrize("show", [None, [5, 3, 1], 2])
def test_networks_of_three_colours_see_the_shown_channels_in_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, show: Any
) -> None:
    monkeypatch.setattr("codegrid.evaluation.judging.Inception", Seeing)
    network = LPIPS("squeeze", pretrained=False)  # random weights
    monkeypatch.setattr("vqgan.judging.load_lpips", lambda net, fetch: (network, ""))
    data = Bands(tmp_path, show=show)
    judging, sheet = judge(data, inception=True, lpips="squeeze")
    inception: Any = judging.feature_sets[0].extractor
    x = data.preprocess(data.take_evenly("val", 12)[0])
    numbers = [2] if show == 2 else show or [1, 2, 3]
    expected = to_uint8(x[:, [number - 1 for number in numbers]])
    assert torch.equal(torch.cat(inception.inputs[::2]), expected)
    assert sheet.provenance["rfid"]["channels"] == numbers
    assert sheet.provenance["lpips"]["channels"] == numbers
    network.shown = None
    x, x_hat = (each.float() / 32_767.5 - 1 for each in pixels_of(judging))
    lpips = float(network(*(each[:, [n - 1 for n in numbers]] for each in (x, x_hat))))
    assert sheet.values["lpips"] == pytest.approx(lpips, rel=1e-3)


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


def test_a_network_of_the_users_own_sees_three_channels_of_five(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    own = TorchScriptNetwork(str(tmp_path / "means.pt"), SIZE)
    _, sheet = judge(Bands(tmp_path, show=[4, 2, 1]), own)
    assert sheet.values["rfid_means"] >= 0  # type: ignore[operator]
    assert sheet.provenance["rfid_means"]["channels"] == [4, 2, 1]


@pytest.mark.parametrize(
    ("channels", "changed", "reason"),
    [
        (5, PLAIN_8_BITS, "it holds 1 or 3 channels, and these images have 5"),
        (3, {}, "it holds 8 bits a channel, and these images have 16"),
        (1, PLAIN_8_BITS, None),
    ],
)
def test_jpeg_is_compared_where_it_can_hold_the_images(
    tmp_path: Path, channels: int, changed: dict[str, Any], reason: str | None
) -> None:
    data = Bands(tmp_path, channels=channels, **changed)
    codecs, absent = compare_codecs(start_tokenizer(data), data, choose_settings())
    assert absent == ({"JPEG": reason} if reason else {})
    assert {codec["codec"] for codec in codecs} == {"classical VQ", *([] if reason else ["JPEG"])}
    assert all(5 < codec["psnr"] < 60 for codec in codecs)


def test_classical_vq_of_bands_is_a_tokenizer_that_starts_from_patches(tmp_path: Path) -> None:
    data = Bands(tmp_path)
    codecs, _ = compare_codecs(start_tokenizer(data), data, choose_settings())
    _, sheet = judge(data)
    assert codecs[0]["psnr"] == pytest.approx(sheet.values["psnr"], abs=1.5)
    assert codecs[0]["bits_per_image"] == math.prod(GRID) * 4


@pytest.mark.parametrize(("show", "grey"), [([5, 3, 1], False), (2, True)])
def test_pictures_show_the_chosen_channels_of_rectangles(
    tmp_path: Path, show: Any, grey: bool
) -> None:
    data = Bands(tmp_path, show=show)
    judging, _ = judge(data)
    files = judging.save_pictures(tmp_path / "pictures", **judging.rank_by_error())
    with Image.open(files[0]) as sheet:
        assert sheet.size == (2 * (3 * 42 - 2), 2 * (2 * 26 - 2))
        pixels = np.array(sheet)[::2, ::2]
    x = data.preprocess(data.take_evenly("val", 12)[0])
    first = data.rules.to_picture(x[:1])[0].expand(3, -1, -1).permute(1, 2, 0).numpy()
    assert np.array_equal(pixels[:24, :40], first)
    assert (pixels[..., 0] == pixels[..., 1]).all() == grey
