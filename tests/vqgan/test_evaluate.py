"""stage=evaluate of tokenizers: the terminal's table, and whole commands."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.evaluation.features import Extractor
from codegrid.evaluation.judging import image_name
from codegrid.evaluation.scores import ScoreSheet, score_difference
from codegrid.evaluation.table import format_codecs, format_number, format_table, nearest_codecs
from tests.helpers.commands import QUICK, TINY
from tests.helpers.runs import save_tokenizer_run
from tests.helpers.stage1 import Noise
from vqgan.losses.perceptual import LPIPS

Command = Callable[..., int]
IMAGES = [word for word in TINY if word.startswith("data.")]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:.*logging on a CPU"
)


def test_images_have_the_names_of_their_source_where_others_were_left_out(tmp_path: Path) -> None:
    data = Noise(16, cache="ram", cache_dir=str(tmp_path))
    assert image_name(data, "val", 3) == "image 3"
    data.samples("val").rows = np.array([0, 5, 6, 9])
    assert image_name(data, "val", 3) == "image 9"


def test_the_terminal_gets_a_line_per_score_and_one_per_reason_why_others_are_absent() -> None:
    scores = ScoreSheet({"size": [3, 64, 64]})
    scores.add("psnr", 23.456, range=[0, 4095], depth=16)
    for name in ("rfid", "kid"):
        scores.mark_absent(name, "there are no weights")
    scores.add("codes_used", 1024)
    scores.add("rfid_own", 0.0012344, extractor="own.pt")
    scores.add("kid_own", 0.5, extractor="own.pt", channels=[3, 2, 1])
    about = {
        "ckpt": "runs/x",
        "K": 2048,
        "grid": [4, 8],
        "n": 1000,
        "split": "val",
        **scores.values,
    }
    lines = format_table(
        {**about, "absent": scores.absent, "provenance": scores.provenance}, list(scores.values)
    ).splitlines()
    assert [line.split(maxsplit=2) for line in lines] == [
        ["evaluated", "runs/x,", "K 2,048, grid 4x8"],
        ["images", "1,000", "of val, 64x64 pixels"],
        [
            "psnr",
            "23.46",
            "dB of the range 0 to 4,095, higher is better; mean over images of each image's PSNR, at most 107.12",
        ],
        ["codes_used", "1,024", "codes that occur at least once"],
        ["rfid_own", "0.001234", "lower is better; Fréchet distance of reconstructions to images"],
        ["kid_own", "0.5000", "lower is better; kernel distance; may be slightly negative"],
        ["features", "rfid_own:", "own.pt"],
        ["features", "kid_own:", "own.pt, of channels 3, 2, 1"],
        ["absent", "rfid,", "kid: there are no weights"],
    ]
    assert (
        len({line.index(line.split()[1]) + len(line.split()[1]) for line in lines[2:5]}) == 1
    )  # aligned


def test_the_terminal_states_the_interval_of_a_score_that_has_one() -> None:
    scores = ScoreSheet({"size": [3, 64, 64]})
    scores.add("kid", 0.012345)
    scores.add_interval("kid", (0.01, 0.0148))
    about = {"ckpt": "runs/x", "K": 16, "grid": [4, 4], "n": 9, "split": "val", **scores.values}
    line = format_table({**about, **scores.describe()}, ["kid"]).splitlines()[-1]
    assert line.split(maxsplit=2)[2].startswith("95% in 0.01000 to 0.01480; lower is better")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (64.0, "64"),
        (12345, "12,345"),
        (12345.6, "12,346"),
        (999.96, "1,000.0"),
        (-0.001234, "-0.001234"),
        (math.inf, "inf"),
    ],
)
def test_numbers_have_four_significant_digits_and_whole_numbers_all(
    value: float, text: str
) -> None:
    assert format_number(value) == text


def test_jpeg_is_reported_at_the_qualities_next_to_the_tokenizers_bits() -> None:
    codecs = [{"codec": "classical VQ", "bits_per_image": 64.0, "settings": {"K": 16}}]
    codecs += [
        {"codec": "JPEG", "bits_per_image": 40.0 * q, "settings": {"quality": q}} for q in (1, 2, 3)
    ]
    assert [name for name, _ in nearest_codecs(codecs, 90)] == [
        "classical VQ",
        "JPEG, quality 2",
        "JPEG, quality 3",
    ]
    assert [name for name, _ in nearest_codecs(codecs, 9)] == ["classical VQ", "JPEG, quality 1"]
    assert len(nearest_codecs(codecs, None)) == 4


def test_a_codec_that_is_absent_has_a_line_too() -> None:
    codec = {"codec": "classical VQ", "bits_per_image": 64.0, "psnr": 20.0, "settings": {}}
    lines = format_codecs([codec], 64, {"JPEG": "it has 1 or 3 channels"}).splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["classical", "VQ                    20  dB with 64 bits"],
        ["absent", "JPEG: it has 1 or 3 channels"],
    ]


def test_images_of_other_channels_than_grey_and_colour_are_named_so() -> None:
    scores = ScoreSheet({"size": [5, 48, 80]})
    scores.add("ssim", 0.5)
    about = {"ckpt": "runs/x", "grid": [6, 10], "n": 9, "split": "val", **scores.values}
    lines = format_table({**about, **scores.describe()}, ["ssim"]).splitlines()
    assert lines[1].split(maxsplit=1)[1] == "9 of val, 48x80 pixels of 5 channels"


class Corners(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, ::8, ::8].float().flatten(1)


def result(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
    return content


@pytest.mark.slow
def test_a_tokenizer_is_evaluated_by_one_command_that_reads_all_else_from_its_checkpoint(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("stage=vqgan", *TINY) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Corners()).save("corners.pt")
    capsys.readouterr()
    line = ["stage=evaluate", "ckpt=runs/vqgan/shapes", *QUICK, "features=corners.pt", "show=3"]
    assert command(*line, "run_dir=judged") == 0
    (printed, terminal), evaluation, trained = (
        capsys.readouterr(),
        result("judged"),
        result("runs/vqgan/shapes"),
    )
    short = json.loads(printed)  # the one line of standard output
    assert {"provenance", "absent", "references", "worst"}.isdisjoint(short)
    assert short == {name: evaluation[name] for name in short}
    assert {"run", "psnr", "rfid", "rfid_proxy", "grid"} <= short.keys()
    assert (evaluation["of"], evaluation["of_stage"], evaluation["tokenizer_of"]) == (
        trained["id"],
        "vqgan",
        trained["id"],
    )
    assert (evaluation["split"], evaluation["n"], evaluation["K"], evaluation["grid"]) == (
        "val",
        16,
        16,
        [4, 4],
    )
    assert evaluation["psnr"] == pytest.approx(
        trained["psnr"], abs=0.05
    )  # training may have judged in bf16
    assert evaluation["bits_per_image"] == 4 * 4 * 4
    assert evaluation["compression_ratio"] == 16 * 16 * 3 * 8 / 64
    for name in ("rfid", "kid", "lpips"):
        assert evaluation[name] is None
        assert "fetch=false" in evaluation["absent"][name]
    numbers = (
        "ms_ssim",
        "l1",
        "l2",
        "sharpness",
        "perplexity",
        "entropy_bits",
        "codes_used",
        "usage",
    )
    ratios = ("rfid_ratio_proxy", "rfid_real_proxy", "rfid_ratio_corners")
    for name in (*numbers, *ratios, "rfid_proxy", "kid_proxy", "rfid_corners", "kid_corners"):
        assert isinstance(evaluation[name], float | int)
        assert evaluation["provenance"][name]["n"] == 16
        assert f"\n{name} " in terminal
    assert evaluation["provenance"]["rfid_corners"]["extractor"] == "corners.pt"
    assert evaluation["absent"]["rfdr"] == "it needs the ratios of two networks, and has 1 of 2"
    assert [row["codec"] for row in evaluation["references"]][:2] == ["classical VQ", "JPEG"]
    counts = np.load(evaluation["codes"])["counts"]
    assert (counts.shape, counts.sum(), (counts > 0).sum()) == (
        (1, 16),
        16 * 16,
        evaluation["codes_used"],
    )
    assert len(evaluation["worst"]) == len(evaluation["best"]) == 3
    for file in evaluation["pictures"]:
        assert Path(file).stat().st_size > 100
    assert "\nclassical VQ " in terminal
    assert (
        terminal.splitlines()[-1].split(maxsplit=2)[2]
        == "judged/metrics.json, with the provenance of each score"
    )

    assert (
        command(*line, "run_dir=again", "batch_size=5", "compare_to=judged", "data.num_workers=0")
        == 0
    )
    again = result("again")
    for name in evaluation["provenance"]:
        assert score_difference(name, again, evaluation) == pytest.approx(
            0, abs=1e-4 * abs(evaluation[name]) + 1e-6
        )
    assert command(*line, "run_dir=other", "proxy=3", "split=train", "compare_to=judged") == 0
    with pytest.raises(
        InputError,
        match="psnr of other and of judged can't be compared: reference is originals of train",
    ):
        score_difference("psnr", result("other"), evaluation)
    assert "psnr of other and of judged can't be compared" in capsys.readouterr().err


class FakeInception(Extractor):
    """Stands in for Inception."""

    name, hash, resize = "instead", "0123", "none"

    def __init__(self, *_: object) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return Corners()(images), None


@pytest.mark.slow
def test_with_all_weights_available_nothing_is_absent_and_lpips_is_the_mean_over_images(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer_run(Path("runs/vqgan/shapes"), *IMAGES)
    network = LPIPS("squeeze", pretrained=False)  # random weights
    monkeypatch.setattr("vqgan.judging.load_lpips", lambda net, fetch: (network, ""))
    monkeypatch.setattr("codegrid.evaluation.judging.Inception", FakeInception)
    for size in (5, 16):
        line = [
            "stage=evaluate",
            "ckpt=runs/vqgan/shapes",
            *QUICK,
            "lpips=squeeze",
            f"batch_size={size}",
            f"run_dir=by-{size}",
        ]
        assert command(*line) == 0
    evaluation = result("by-5")
    assert set(evaluation["absent"]) == {"valid_reconstructions"}  # the shapes are too small
    assert evaluation["lpips"] == pytest.approx(result("by-16")["lpips"], rel=1e-4)
    assert evaluation["provenance"]["lpips"]["extractor"] == "lpips squeeze"
    assert evaluation["provenance"]["lpips"]["extractor_hash"] == "b8a52dc0"
    assert evaluation["provenance"]["lpips"]["resize"] == "bilinear to 64"
    assert evaluation["provenance"]["rfid"]["extractor_hash"] == "0123"
    assert evaluation["rfid"] > 0


@pytest.mark.slow
def test_the_worst_and_the_best_images_are_those_of_the_largest_and_the_smallest_error(
    command: Command,
) -> None:
    save_tokenizer_run(Path("runs/vqgan/shapes"), *IMAGES)
    line = [
        "stage=evaluate",
        "ckpt=runs/vqgan/shapes",
        *QUICK,
        "proxy=0",
        "inception=false",
        "references=false",
        "lpips=null",
    ]
    assert command(*line, "show=16", "run_dir=judged") == 0
    evaluation = result("judged")
    with Image.open("judged/pictures/worst-and-best.png") as sheet:
        pixels = torch.from_numpy(np.array(sheet)[::2, ::2]).int()  # pictures are enlarged twice
    tiles = [
        [pixels[r * 18 : r * 18 + 16, c * 18 : c * 18 + 16] for c in range(16)] for r in range(4)
    ]
    errors = [float((a - b).square().float().mean()) for a, b in zip(*tiles[:2], strict=True)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]
    assert evaluation["worst"] == evaluation["best"][::-1]
    assert {evaluation["absent"][name] for name in ("rfid", "rfid_proxy", "lpips")} == {
        "left out with inception=false", "left out with proxy=0", "left out with lpips=null"
    }  # fmt: skip
    assert evaluation["references"] == []


@pytest.mark.slow
def test_a_continuous_bottleneck_has_no_scores_of_codes_and_says_why(command: Command) -> None:
    save_tokenizer_run(Path("runs/vqgan/shapes"), "quantizer=kl", *IMAGES)
    assert command("stage=evaluate", "ckpt=runs/vqgan/shapes", *QUICK, "run_dir=judged") == 0
    evaluation = result("judged")
    for name in (
        "perplexity",
        "entropy_bits",
        "codes_used",
        "usage",
        "bits_per_image",
        "compression_ratio",
    ):
        assert evaluation[name] is None
        assert "continuous" in evaluation["absent"][name]
    assert "continuous" in evaluation["absent"]["classical VQ"]
    assert {row["codec"] for row in evaluation["references"]} == {"JPEG"}
    assert evaluation["codes"] is None
    assert evaluation["psnr"] > 5
