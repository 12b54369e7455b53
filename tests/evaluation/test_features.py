"""Extractors, the proxy, and the scores computed in their features."""

import hashlib
import importlib
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from codegrid.data.shapes import Shapes
from codegrid.engine.errors import InputError
from codegrid.evaluation.feature_set import AbsentFeatureSet, FeatureSet
from codegrid.evaluation.features import (
    INCEPTION,
    Extractor,
    FeatureNetwork,
    Inception,
    TorchScriptNetwork,
)
from codegrid.evaluation.proxy import Proxy, cut_square, list_label_classes, train_proxy
from codegrid.evaluation.scores import ScoreSheet
from tests.helpers.bands import Bands, UnlabelledBands
from tests.helpers.images import make_images
from tests.helpers.stage1 import Noise

CPU = torch.device("cpu")
OF_SAMPLES = (
    "gfid", "gfid_real", "gfid_ratio", "kid", "inception_score", "precision", "recall", "density", "coverage",
)  # fmt: skip


def shapes(tmp_path: Path, **settings: object) -> Shapes:
    return make_images(
        Shapes, image_size=16, n_train=256, n_val=128, cache_dir=str(tmp_path), **settings
    )


def scripted(file: Path, network: nn.Module) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(file))
    return str(file)


class Means(nn.Module):
    """The mean of each colour, and twice that as logits."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = images.float().mean(dim=(2, 3))
        return means, 2 * means


class Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class Map(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


def test_the_proxy_learns_to_classify_the_labels(tmp_path: Path) -> None:
    proxy = train_proxy(shapes(tmp_path), 60, CPU)
    assert proxy.name == "classifier of labels, 60 steps"
    assert proxy.validation["accuracy"] > proxy.validation["chance"] + 0.05


def test_the_proxy_of_images_without_labels_classifies_rotations_and_its_name_says_so(
    tmp_path: Path,
) -> None:
    proxy = train_proxy(Noise(16, cache="ram", cache_dir=str(tmp_path)), 2, CPU)
    assert proxy.name == "classifier of rotations, 2 steps"
    assert proxy(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))[1] is None
    assert proxy.validation["chance"] < 0.5


def test_images_are_rotated_by_the_turns_that_are_the_targets() -> None:
    proxy, inputs = Proxy(3, 0), []
    proxy.features.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    x = torch.randn(4, 3, 16, 16)
    _, targets = proxy.classify(x, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 2, 3]))
    assert targets.tolist() == [0, 1, 2, 3]
    assert torch.equal(inputs[0], torch.stack([x[i].rot90(i, (1, 2)) for i in range(4)]))


@pytest.mark.parametrize("labelled", [True, False])
def test_the_proxy_learns_from_rectangles_of_any_channels_and_depth(
    tmp_path: Path, labelled: bool
) -> None:
    data = Bands(tmp_path, size=(24, 40))
    if not labelled:
        data.source_kind = UnlabelledBands
    proxy = train_proxy(data, 2, CPU)
    assert proxy.uses_rotations == (not labelled)
    pixels = data.samples("val").__getitems__(range(5))[0]
    assert pixels.dtype == torch.int32
    features, logits = proxy(pixels)
    assert (features.shape, logits is None) == ((5, FeatureNetwork.num_features), not labelled)
    assert torch.equal(features, proxy.features(pixels.float() / 32_767.5 - 1))


def test_the_square_that_is_rotated_is_the_middle_of_a_rectangle() -> None:
    x = torch.arange(24.0).view(1, 1, 3, 8).expand(2, 1, 3, 8)
    assert cut_square(x)[0, 0].tolist() == [[2, 3, 4], [10, 11, 12], [18, 19, 20]]
    square = torch.randn(1, 2, 5, 5)
    assert torch.equal(cut_square(square), square)


def test_all_runs_on_the_same_images_share_a_proxy_whatever_their_batches_and_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_proxy(shapes(tmp_path), 3, CPU)
    anew = train_proxy(shapes(tmp_path / "elsewhere"), 3, CPU)
    monkeypatch.setattr("codegrid.evaluation.proxy.fit_proxy", None)  # nothing is trained any more
    second = train_proxy(shapes(tmp_path, batch_size=8, cache="ram"), 3, CPU)
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    for other in (anew, second):
        assert other.hash == first.hash
        assert torch.equal(other(images)[0], first(images)[0])
    assert second.validation == first.validation


def test_training_a_proxy_does_not_change_the_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train_proxy(shapes(tmp_path), 2, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_other_images_or_more_steps_make_another_proxy(tmp_path: Path) -> None:
    hashes = {
        train_proxy(shapes(tmp_path, **how), steps, CPU).hash
        for how, steps in (({}, 2), ({}, 3), ({"seed": 1}, 2), ({"flip": False}, 2))
    }
    assert len(hashes) == 4


def test_images_have_no_classes_if_one_has_no_label(tmp_path: Path) -> None:
    data = shapes(tmp_path, cache="ram")
    assert len(list_label_classes(data)) == 5
    data.samples("train").labels[3] = -1
    assert len(list_label_classes(data)) == 0


def test_ids_with_holes_between_them_are_few_classes(tmp_path: Path) -> None:
    data = shapes(tmp_path, cache="ram")
    data.classes = []
    for split in ("train", "val"):
        data.samples(split).labels[:] *= 5_000_000
    assert list_label_classes(data).labels == [0, 5_000_000, 10_000_000, 15_000_000, 20_000_000]
    assert train_proxy(data, 2, CPU).head.out_features == 5


@pytest.mark.parametrize("channels", [1, 3])
def test_a_torchscript_file_sees_three_channels_of_uint8(tmp_path: Path, channels: int) -> None:
    script = TorchScriptNetwork(scripted(tmp_path / "my-means.2.pt", Means()), 16)
    images = torch.randint(256, (5, channels, 16, 16), dtype=torch.uint8)
    features, logits = script(images)
    assert torch.equal(features, images.float().mean((2, 3)).expand(-1, 3))
    assert logits is not None
    assert (script.name, script.suffix) == ("my-means.2.pt", "_my_means_2")
    assert script.hash == hashlib.sha256((tmp_path / "my-means.2.pt").read_bytes()).hexdigest()[:12]


@pytest.mark.parametrize(
    ("name", "network", "message"),
    [
        (
            "map",
            Map(),
            r"must return features \(n, D\) for n images, and returns \(2, 3, 16, 16\) for 2",
        ),
        ("proxy", Flat(), "the names of others, such as rfid_proxy; give the file another name"),
        ("ratio", Flat(), "the names of others, such as rfid_ratio; give the file another name"),
    ],
)
def test_a_torchscript_file_that_returns_no_features_is_refused(
    tmp_path: Path, name: str, network: nn.Module, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TorchScriptNetwork(scripted(tmp_path / f"{name}.pt", network), 16)


def test_a_file_that_is_no_torchscript_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there"):
        TorchScriptNetwork(str(tmp_path / "nothing.pt"), 16)
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(InputError, match="can't be used on uint8 images"):
        TorchScriptNetwork(str(tmp_path / "text.pt"), 16)


def judged(extractor: Extractor, real: Tensor, fake: Tensor, suffix: str = "_own") -> ScoreSheet:
    judge, scores = FeatureSet(extractor, suffix), ScoreSheet({"reference": "originals of val"})
    for side, images in (("reference", real), ("judged", fake)):
        for part in images.split(7):
            judge.add(side, part)
    judge.add_distances(scores, "rfid")
    judge.add_variety(scores)
    return scores


def test_the_frechet_distance_equals_torchmetrics_with_the_same_network(
    tmp_path: Path,
) -> None:
    extractor = train_proxy(shapes(tmp_path), 2, CPU)

    class ProxyFeatures(nn.Module):
        num_features = FeatureNetwork.num_features

        def forward(self, images: Tensor) -> Tensor:
            return extractor(images)[0]

    real, fake = torch.randint(256, (2, 150, 3, 16, 16), dtype=torch.uint8)
    fake = fake // 2
    theirs = FrechetInceptionDistance(feature=ProxyFeatures(), normalize=False)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert judged(extractor, real, fake).values["rfid_own"] == pytest.approx(
        float(theirs.compute()), rel=1e-3
    )


def test_every_score_has_its_provenance(tmp_path: Path) -> None:
    extractor = train_proxy(shapes(tmp_path), 2, CPU)
    scores = judged(extractor, *torch.randint(256, (2, 20, 3, 16, 16), dtype=torch.uint8), "_proxy")
    assert len(scores.provenance) == 7
    assert set(scores.absent) == {"rfid_real_proxy", "rfid_ratio_proxy"}  # which need other images
    for name in scores.provenance:
        about = scores.provenance[name]
        assert (about["n"], about["n_reference"], about["reference"]) == (
            20,
            20,
            "originals of val",
        )
        assert (about["extractor"], about["extractor_hash"], about["resize"]) == (
            extractor.name,
            extractor.hash,
            "none",
        )
        assert about["library"].startswith("torch ")
    assert scores.provenance["precision_proxy"]["neighbours"] == 3
    assert scores.provenance["density_proxy"]["neighbours"] == 5


def test_too_few_images_make_scores_absent_with_a_reason(tmp_path: Path) -> None:
    extractor = train_proxy(shapes(tmp_path), 2, CPU)
    scores = judged(extractor, *torch.randint(256, (2, 4, 3, 16, 16), dtype=torch.uint8))
    assert scores.values["precision_own"] is not None
    reason = "it needs more than 5 images on each side"
    assert {name for name in scores.absent if scores.absent[name] == reason} == {
        "density_own", "coverage_own",
    }  # fmt: skip
    scores = judged(extractor, *torch.randint(256, (2, 1, 3, 16, 16), dtype=torch.uint8))
    assert scores.absent["rfid_own"] == "it needs at least 2 images on each side"


def test_a_network_that_predicts_no_classes_gives_no_inception_score(tmp_path: Path) -> None:
    proxy = train_proxy(Noise(16, cache="ram", cache_dir=str(tmp_path)), 2, CPU)
    scores = judged(proxy, *torch.randint(256, (2, 8, 3, 16, 16), dtype=torch.uint8))
    assert (
        scores.absent["inception_score_own"]
        == "these images have no labels: the proxy classifies rotations"
    )


class Standardising(Extractor):
    """Divides each image by its own spread, as many networks do: 0 / 0 for a blank one."""

    name, hash = "standardising.pt", "0"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = images.float().flatten(1)
        features = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
        return features[:, :4], features[:, 4:8]


@pytest.mark.parametrize("blank", ["reference", "judged"])
def test_features_that_are_no_numbers_make_scores_absent_with_a_reason(blank: str) -> None:
    """They would fail in the distances' linear algebra, and count as no neighbours without a word."""
    sides = dict(zip(("reference", "judged"), torch.randint(256, (2, 12, 1, 8, 8)), strict=True))
    sides[blank][[2, 5, 7]] = 40
    features, scores = FeatureSet(Standardising(), "_own"), ScoreSheet({})
    for side, images in sides.items():
        features.add(side, images.to(torch.uint8))
    features.add_distances(scores, "gfid")
    features.add_variety(scores)
    reason = "standardising.pt returns NaN or infinity for 3 of 12 images"
    assert scores.absent == {f"{name}_own": reason for name in OF_SAMPLES}


@pytest.mark.parametrize("size", [16, 24])
def test_blank_pictures_have_distances_in_the_proxys_features(size: int) -> None:
    """All features are the same, so both covariances are zero."""
    torch.manual_seed(1)
    proxy = Proxy(1, 3).eval()
    proxy.set_identity(0)
    blank = torch.full((12, 1, size, size), 255, dtype=torch.uint8)
    scores = judged(proxy, blank, blank.clone())
    assert scores.values["rfid_own"] == pytest.approx(0, abs=1e-6)
    assert scores.values["kid_own"] == pytest.approx(0, abs=1e-6)
    assert (scores.values["precision_own"], scores.values["coverage_own"]) == (1, 1)
    assert scores.values["inception_score_own"] == pytest.approx(1)


def test_missing_weights_are_not_fetched_against_the_users_will(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", None)
    sentence = (
        f"the weights {INCEPTION} are not in .*, and fetch=false; put .* that features_dir names"
    )
    with pytest.raises(InputError, match=sentence):
        Inception(fetch=False)


def test_a_silent_download_is_given_up_after_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def silent(*_: object, **__: object) -> None:
        assert socket.getdefaulttimeout() == 10
        raise TimeoutError("timed out")

    monkeypatch.setattr("torch.hub.download_url_to_file", silent)
    with pytest.raises(InputError, match=r"can't be fetched \(timed out\)"):
        Inception(fetch=True)
    assert socket.getdefaulttimeout() is None


def test_without_the_package_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)  # type: ignore[attr-defined]
    with pytest.raises(
        InputError, match=r"torch-fidelity is missing: pip install codegrid\[fidelity\]"
    ):
        Inception()


def test_an_absent_feature_set_gives_the_reason_for_each_score() -> None:
    judge, scores = AbsentFeatureSet("_proxy", "left out"), ScoreSheet({})
    judge.add("judged", torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    judge.add_distances(scores, "gfid")
    judge.add_variety(scores)
    assert scores.absent == {f"{name}_proxy": "left out" for name in OF_SAMPLES}


@pytest.mark.slow
def test_inception_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights where the real ones would be."""
    code = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    chance: Callable[..., nn.Module] = code.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(code, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(chance, "load_state_dict", lambda *_, **__: None)
        network = chance("x", ["2048", "logits_unbiased"])
    file = tmp_path / "hub" / "checkpoints" / INCEPTION
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    extractor, images = (
        Inception(fetch=False),
        torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8),
    )
    features, logits = extractor(images)
    assert features.shape == (2, 2048)
    assert logits is not None
    assert logits.shape == (2, 1008)
    assert torch.equal(features, network(images.expand(-1, 3, -1, -1))[0])
    assert extractor.hash == hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    own = tmp_path / INCEPTION
    file.rename(own)
    assert Inception(fetch=False, folder=str(tmp_path)).hash == extractor.hash
    own.rename(file)
    torch.save({"weight": Means()}, own)  # somebody else's pickle
    with pytest.raises(InputError, match="is damaged"):
        Inception(fetch=False, folder=str(tmp_path))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="is damaged"):
        Inception(fetch=False)
