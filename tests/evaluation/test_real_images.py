"""Fréchet distances relative to those of real images, and their mean over networks."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from codegrid.engine.errors import InputError
from codegrid.evaluation.feature_set import AbsentFeatureSet, FeatureSet, add_mean_ratio
from codegrid.evaluation.features import Extractor
from codegrid.evaluation.real_images import RealImages
from codegrid.evaluation.scores import SCORES, ScoreSheet, find_ambiguous, score_difference
from tests.helpers.bands import Bands

CPU = torch.device("cpu")
N, N_TRAIN = 12, 32  # images of Bands that validate, and that train


class Colours(Extractor):
    """The mean of each channel in the upper and in the lower half."""

    name, hash = "colours", "c0"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        halves = images.float().div(1000).chunk(2, 2)
        return torch.cat([half.mean((2, 3)) for half in halves], 1), None


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Bands:
    return Bands(tmp_path_factory.mktemp("cache"), channels=3)


@pytest.fixture(autouse=True)
def _separate_caches(bands: Bands, tmp_path: Path) -> None:
    bands.cache_dir = str(tmp_path)


def pixels(bands: Bands, split: str, rows: list[int]) -> Tensor:
    x = bands.preprocess(bands.samples(split).__getitems__(rows)[0])
    return bands.rules.to_pixels(x)


def blur(images: Tensor) -> Tensor:
    """As reconstructions are: each pixel is halfway to the mean of its channel."""
    return ((images + images.float().mean((2, 3), keepdim=True)) / 2 * 0.9).to(images.dtype)


def judge(
    bands: Bands,
    judged: Tensor | None = None,
    extractor: Extractor | None = None,
    split: str = "val",
    batch_size: int = 5,
    **common: Any,
) -> ScoreSheet:
    """The distances of `judged` images, by default blurred ones, to those of a split."""
    real = RealImages(bands, {"val": "train", "train": "val"}[split], CPU, batch_size)
    reference = pixels(bands, split, list(range(bands.size(split))))
    features = FeatureSet(extractor or Colours(), "", real=real)
    features.add("reference", reference)
    features.add("judged", blur(reference) if judged is None else judged)
    about = {"reference": f"originals of {split}", "reference_hash": "ab12", "judged": "samples"}
    sheet = ScoreSheet({**about, **common})
    features.add_frechet(sheet, "gfid")
    return sheet


def test_as_many_training_images_have_a_ratio_of_1(bands: Bands) -> None:
    """They are what the distance is divided by."""
    spread = np.linspace(0, N_TRAIN - 1, N).astype(int).tolist()
    sheet = judge(bands, pixels(bands, "train", spread))
    assert sheet.values["gfid_ratio"] == 1
    assert sheet.values["gfid"] == sheet.values["gfid_real"] > 0  # type: ignore[operator]


def slow_frechet(a: Tensor, b: Tensor) -> float:
    one, other = a.double().numpy(), b.double().numpy()
    A, B = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = sqrtm(A @ B).real
    return float(np.square(one.mean(0) - other.mean(0)).sum() + np.trace(A + B - 2 * root))


@pytest.mark.parametrize("m", [N, 7])
def test_the_ratio_is_that_of_two_distances_to_the_reference_by_as_many_images(
    bands: Bands, m: int
) -> None:
    extract = Colours()
    reference = pixels(bands, "val", list(range(N)))
    judged = blur(reference)[:m]
    spread = [i * (N_TRAIN - 1) // (m - 1) for i in range(m)]
    training = pixels(bands, "train", spread)
    real, fake = (slow_frechet(extract(reference)[0], extract(x)[0]) for x in (training, judged))
    values = judge(bands, judged).values
    assert values["gfid"] == pytest.approx(fake, rel=1e-4)
    assert values["gfid_real"] == pytest.approx(real, rel=1e-4)
    assert values["gfid_ratio"] == pytest.approx(fake / real, rel=1e-4)
    more = pixels(bands, "train", list(range(N_TRAIN)))  # the mistake that another n would be
    assert real != pytest.approx(slow_frechet(extract(reference)[0], extract(more)[0]), rel=0.02)


def test_neither_the_batches_nor_the_order_of_the_images_matter(bands: Bands) -> None:
    judged = blur(pixels(bands, "val", list(range(N))))
    first = judge(bands, judged).values
    bands.cache_dir += "-2"  # nothing of the first
    assert judge(bands, judged.flip(0), batch_size=12).values == pytest.approx(first, rel=1e-4)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of real images of each pass over them."""
    counts: list[int] = []
    iterate = RealImages.iterate

    def count(self: RealImages, n: int) -> Iterator[Tensor]:
        counts.append(n)
        return iterate(self, n)

    monkeypatch.setattr(RealImages, "iterate", count)
    return counts


def test_the_distance_of_real_images_is_computed_once_for_all_runs(
    bands: Bands, passes: list[int]
) -> None:
    first = judge(bands)
    assert passes == [N]
    other = judge(bands, 255 - pixels(bands, "val", list(range(N))), batch_size=3, seed=5)
    assert passes == [N]
    assert other.values["gfid_real"] == first.values["gfid_real"]
    assert other.values["gfid_ratio"] != first.values["gfid_ratio"]


@pytest.mark.parametrize("changed", ["network", "reference", "number", "images", "split", "resize"])
def test_whatever_the_distance_of_real_images_depends_on_makes_it_another(
    bands: Bands, passes: list[int], changed: str, tmp_path: Path
) -> None:
    judge(bands)
    network, judged, common, data, split = Colours(), None, {}, bands, "val"
    if changed == "network":
        network.hash = "c1"
    elif changed == "resize":
        network.resize = "bilinear to 4"
    elif changed == "reference":
        common = {"reference_hash": "cd34"}
    elif changed == "number":
        judged = blur(pixels(bands, "val", list(range(7))))
    elif changed == "images":
        data = Bands(tmp_path, size=(24, 48), channels=3)
    else:
        split, judged = "train", blur(pixels(bands, "train", list(range(7))))
    judge(data, judged, network, split, **common)
    assert len(passes) == 2


def test_images_whose_files_have_changed_are_measured_again(
    bands: Bands, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hash of the split has the content of 32 images alone, and the sizes of the others."""
    judge(bands)
    source = bands.source("train")
    monkeypatch.setattr(source, "key", ["changed", source.key])
    judge(bands)
    assert len(passes) == 2


def test_sets_that_share_a_reference_share_its_distance_to_real_images(
    bands: Bands, passes: list[int]
) -> None:
    """As those of perturbed codes and of other rates do, whose sheets have no hash of it."""
    reference = pixels(bands, "val", list(range(N)))
    one = FeatureSet(Colours(), "", real=RealImages(bands, "train", CPU, 5))
    one.add("reference", reference)
    for each in (one, other := one.share_reference()):
        each.add("judged", blur(reference))
        each.add_frechet(sheet := ScoreSheet({}), "rfid")
        assert sheet.values["rfid_ratio"] is not None
    assert other.suffix == one.suffix
    assert passes == [N]


def test_too_few_real_images_make_the_ratio_absent_and_not_the_distance(bands: Bands) -> None:
    sheet = judge(bands, split="train")
    reason = "it needs as many real images as are judged, 32 of val, which has 12"
    assert sheet.absent == dict.fromkeys(("gfid_real", "gfid_ratio"), reason)
    assert sheet.values["gfid"] > 0  # type: ignore[operator]


def test_missing_training_images_are_a_reason_and_end_no_run(
    bands: Bands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def size(split: str) -> int:
        if split == "train":
            raise InputError("data.root=/photos is not there")
        return N

    monkeypatch.setattr(bands, "size", size)
    assert judge(bands).absent["gfid_ratio"] == "data.root=/photos is not there"


def test_without_ratios_the_reason_is_the_setting() -> None:
    features, sheet = FeatureSet(Colours(), ""), ScoreSheet({})
    for side in ("reference", "judged"):
        features.add(side, torch.rand(8, 3, 6, 6))
    features.add_distances(sheet, "rfid")
    reason = "left out with ratios=false"
    assert sheet.absent == dict.fromkeys(("rfid_real", "rfid_ratio"), reason)
    assert set(sheet.values) == {"rfid", "rfid_real", "rfid_ratio", "kid"}


class Blank(Colours):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return torch.zeros(len(images), 4), None


def test_real_images_without_a_distance_have_no_ratio(bands: Bands) -> None:
    assert judge(bands, extractor=Blank()).absent == {
        "gfid_ratio": "the distance of real images is 0"
    }


class BrokenOnTrain(Colours):
    """Returns no numbers for images that are not among the first."""

    calls = 0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        features = super().forward(images)[0]
        return features if self.calls < 3 else features * torch.nan, None


def test_features_of_real_images_that_are_no_numbers_are_a_reason(bands: Bands) -> None:
    reason = "the features of 12 of 12 real images are no numbers"
    absent = judge(bands, extractor=BrokenOnTrain()).absent
    assert absent == dict.fromkeys(("gfid_real", "gfid_ratio"), reason)


def result(run: str, sheet: ScoreSheet) -> dict[str, Any]:
    return {"run": run, **sheet.values, **sheet.describe()}


def test_the_provenance_of_a_ratio_names_both_sets_and_that_of_real_images_no_sampler(
    bands: Bands,
) -> None:
    one, other = judge(bands, seed=1, sampler={"top_k": 0}), judge(bands, seed=2)
    about = one.provenance["gfid_ratio"]
    assert about["real"] == {
        "judged": "originals of train",
        "judged_hash": about["real"]["judged_hash"],
        "n": N,
    }
    assert (about["judged"], about["n"], about["seed"]) == ("samples", N, 1)
    assert one.provenance["gfid_real"]["judged"] == "originals of train"
    assert score_difference("gfid_real", result("a", one), result("b", other)) == 0
    with pytest.raises(InputError, match="can't be compared: seed is 1 of the one and 2"):
        score_difference("gfid_ratio", result("a", one), result("b", other))


@pytest.mark.parametrize(("key", "value"), [("judged_hash", "ff00"), ("n", 11)])
def test_ratios_to_other_real_images_are_not_compared(
    bands: Bands, key: str, value: object
) -> None:
    one = result("a", judge(bands))
    other = copy.deepcopy(one)
    other["provenance"]["gfid_ratio"]["real"][key] = value
    with pytest.raises(InputError, match="can't be compared: real is"):
        score_difference("gfid_ratio", one, other)


class Ready(FeatureSet):
    """A feature set whose ratio is known."""

    def __init__(self, suffix: str, ratio: float) -> None:
        super().__init__(Colours(), suffix)
        self.ratio = ratio

    def add_frechet(self, sheet: ScoreSheet, name: str) -> None:
        about = {"n": 5, "n_reference": 6, "real": {"n": 5}, "resize": "none", "library": "torch 2"}
        about |= {"extractor": f"network{self.suffix}", "extractor_hash": self.suffix}
        sheet.add(f"{name}_ratio{self.suffix}", self.ratio, **about)


def mean_of(*feature_sets: FeatureSet) -> ScoreSheet:
    sheet = ScoreSheet({"reference_hash": "ab12"})
    for each in feature_sets:
        each.add_frechet(sheet, "rfid")
    add_mean_ratio(sheet, "rfid", feature_sets)
    return sheet


def test_the_mean_over_networks_leaves_the_proxy_out_and_names_the_networks() -> None:
    sheet = mean_of(Ready("", 1.5), Ready("_proxy", 90), Ready("_dinov2", 3), Ready("_clip", 6))
    assert sheet.values["rfdr"] == 3.5
    about = sheet.provenance["rfdr"]
    assert [each["extractor"] for each in about["networks"]] == [
        "network", "network_dinov2", "network_clip",
    ]  # fmt: skip
    assert (about["n"], about["reference_hash"], about["real"]) == (5, "ab12", {"n": 5})


def test_means_over_other_networks_are_not_compared() -> None:
    missing = AbsentFeatureSet("_clip", "its weights are not at hand")
    one = mean_of(Ready("", 1.5), Ready("_dinov2", 3), missing)
    assert one.values["rfdr"] == 2.25
    other = mean_of(Ready("", 1.5), Ready("_dinov2", 3), Ready("_clip", 6))
    with pytest.raises(InputError, match="can't be compared: networks is"):
        score_difference("rfdr", result("a", one), result("b", other))


def test_a_mean_needs_two_networks() -> None:
    missing = AbsentFeatureSet("_clip", "its weights are not at hand")
    sheet = mean_of(Ready("", 1.5), missing)
    assert sheet.absent["rfdr"] == "it needs the ratios of two networks, and has 1 of 2"
    assert "rfdr" not in mean_of(Ready("", 1.5), Ready("_proxy", 2)).values  # nobody asked for it


def test_every_frechet_distance_has_its_lines_in_the_table() -> None:
    distances = [name for name, score in SCORES.items() if score.frechet]
    assert {"rfid", "rfid_proxy", "gfid", "gfid_proxy", "adm_fid", "adm_sfid"} <= set(distances)
    for name in distances:
        stem, proxy, _ = name.partition("_proxy")
        ratio, real = SCORES[f"{stem}_ratio{proxy}"], SCORES[f"{stem}_real{proxy}"]
        assert (ratio.better, real.better) == (-1, 0)
        assert ratio.stages == real.stages == SCORES[name].stages
        assert not ratio.frechet
        mean = SCORES.get(stem.replace("fid", "fdr"))
        if SCORES[stem].proxy_decimals is None:  # of one network alone
            assert mean is None
        else:
            assert mean is not None
            assert mean.better == -1


@pytest.mark.parametrize(
    ("suffix", "clash"),
    [("_proxy", "rfid_proxy"), ("_ratio", "rfid_ratio"), ("_real_x", "rfid_real_x")],
)
def test_a_suffix_that_reads_as_another_score_is_ambiguous(suffix: str, clash: str) -> None:
    assert find_ambiguous(suffix) == clash
    assert find_ambiguous("_mine") is None
