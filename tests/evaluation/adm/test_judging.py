"""The scores of ADM's evaluator against numpy, scipy and torch-fidelity, and what their provenance tells apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray

from codegrid.engine.errors import InputError
from codegrid.evaluation.adm.judging import ADM_SPLIT, AbsentAdmJudge, AdmJudge, make_adm_judge
from codegrid.evaluation.adm.manifold import measure_manifolds
from codegrid.evaluation.adm.reference import AdmReference, RunningMoments, open_reference
from codegrid.evaluation.scores import ScoreSheet, check_comparable, names_in_group
from tests.helpers.evaluation import choose_settings
from tests.helpers.small_adm import (
    SmallNetwork,
    as_batch,
    draw_pictures,
    save_pictures_as,
    use_small_network,
)

REAL, FAKE = draw_pictures(60, 1), draw_pictures(40, 2) // 3 * 2 + 70
NAMES = ("adm_fid", "adm_sfid", "adm_inception_score", "adm_precision", "adm_recall")
RATIOS = ("adm_fid_real", "adm_fid_ratio", "adm_sfid_real", "adm_sfid_ratio")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_network(monkeypatch)


@pytest.fixture
def reference(tmp_path: Path) -> str:
    return save_pictures_as(tmp_path / "real.npz", REAL)


def features_of(images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    return {k: v.numpy() for k, v in vars(SmallNetwork()(as_batch(images))).items()}


def judge(
    reference: str,
    images: NDArray[np.uint8],
    batch_size: int = 7,
    rounding: str = "nearest",
    network: SmallNetwork | None = None,
) -> ScoreSheet:
    settings = choose_settings(reference=reference, batch_size=batch_size)
    opened = open_reference(settings, None, str(Path(reference).parent / "cache"))
    size = [3, *images.shape[1:3]]
    judging = make_adm_judge(opened, rounding, size)
    assert isinstance(judging, AdmJudge)
    if network is not None:
        judging = AdmJudge(judging.reference, network, rounding, size)  # type: ignore[arg-type]
    for part in as_batch(images).split(batch_size):
        judging.add(part)
    sheet = ScoreSheet({"judged": "samples"})
    judging.add_scores(sheet)
    return sheet


def scores(sheet: ScoreSheet) -> dict[str, Any]:
    """Those of the evaluator itself."""
    return {name: value for name, value in sheet.values.items() if name not in RATIOS}


def reasons(sheet: ScoreSheet) -> dict[str, str]:
    return {name: reason for name, reason in sheet.absent.items() if name not in RATIOS}


def result(sheet: ScoreSheet, run: str) -> dict[str, Any]:
    return {"run": run, **sheet.values, **sheet.describe()}


def frechet_by_scipy(a: NDArray[Any], b: NDArray[Any]) -> float:
    """On the features (n, D) of two sets."""
    A, B = (np.cov(x, rowvar=False) for x in (a, b))
    apart = a.mean(0) - b.mean(0)
    root = scipy.linalg.sqrtm(A @ B)
    return float(apart @ apart + np.trace(A) + np.trace(B) - 2 * np.trace(root).real)


def inception_score_by_numpy(logits: NDArray[Any], size: int) -> float:
    scores = []
    for first in range(0, len(logits), size):
        part = np.exp(logits[first : first + size].astype(float))
        p = part / part.sum(1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores))


def test_the_scores_are_those_of_scipy_and_numpy_on_the_same_features(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codegrid.evaluation.adm.judging.ADM_SPLIT", 15)  # parts of 15, 15 and 10
    values = judge(reference, FAKE).values
    real, fake = features_of(REAL), features_of(FAKE)
    assert values["adm_fid"] == pytest.approx(
        frechet_by_scipy(real["pool"], fake["pool"]), rel=1e-4
    )
    assert values["adm_sfid"] == pytest.approx(
        frechet_by_scipy(real["spatial"], fake["spatial"]), rel=1e-4
    )
    assert values["adm_inception_score"] == pytest.approx(
        inception_score_by_numpy(fake["logits"], 15), rel=1e-4
    )
    expected = measure_manifolds(*(torch.from_numpy(x["pool"]) for x in (real, fake)), 3)
    assert (values["adm_precision"], values["adm_recall"]) == pytest.approx(expected, rel=1e-4)
    assert 0 < expected[0] < 1


def test_the_frechet_distance_and_the_inception_score_of_one_part_are_torch_fidelitys(
    reference: str,
) -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    values = judge(reference, FAKE).values
    real, fake = features_of(REAL), features_of(FAKE)
    for name, layer in (("adm_fid", "pool"), ("adm_sfid", "spatial")):
        sides = (torch.from_numpy(x[layer]).double() for x in (real, fake))
        statistics = [fid.fid_features_to_statistics(x) for x in sides]
        theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)
        assert values[name] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    theirs = isc.isc_features_to_metric(torch.from_numpy(fake["logits"]), 1)
    assert len(FAKE) < ADM_SPLIT
    assert values["adm_inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_neither_the_order_nor_the_batches_change_a_score(reference: str, batch_size: int) -> None:
    first = scores(judge(reference, FAKE))
    order = np.random.default_rng(0).permutation(len(FAKE))
    shuffled = save_pictures_as(Path(reference).with_name("shuffled.npz"), REAL[::-1].copy())
    assert scores(judge(shuffled, FAKE[order], batch_size)) == pytest.approx(first, rel=1e-4)


def test_the_parts_of_the_inception_score_are_in_the_order_of_the_images(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the evaluator has it: more than 5,000 images in another order have another score."""
    monkeypatch.setattr("codegrid.evaluation.adm.judging.ADM_SPLIT", 20)
    logits = features_of(FAKE)["logits"]
    order = logits.argmax(1).argsort()
    sheets = [judge(reference, images) for images in (FAKE, FAKE[order])]
    in_parts = [sheet.values["adm_inception_score"] for sheet in sheets]
    assert in_parts[1] < in_parts[0] - 0.01  # type: ignore[operator]
    about = sheets[0].provenance["adm_inception_score"]
    assert (about["split_size"], about["splits"]) == (20, 2)


def moments_of(images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Statistics as a reference file has them."""
    features = features_of(images)
    names = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    return {
        name: value
        for layer, (mean, covariance) in names.items()
        for name, value in (
            (mean, features[layer].mean(0)),
            (covariance, np.cov(features[layer], rowvar=False)),
        )
    }


def test_statistics_in_a_file_replace_those_of_its_images(tmp_path: Path, reference: str) -> None:
    """As in ADM's batches, whose statistics are of the whole set and whose images are 10,000 of it."""
    some = save_pictures_as(tmp_path / "some.npz", REAL[:20], **moments_of(REAL))
    whole, partly = judge(reference, FAKE), judge(some, FAKE)
    for name in ("adm_fid", "adm_sfid"):
        assert partly.values[name] == pytest.approx(whole.values[name], rel=1e-4)
        about = partly.provenance[name]
        assert about["n_reference"] is None
        assert about["reference"] in ("mu and sigma of an npz", "mu_s and sigma_s of an npz")
    of_20 = judge(save_pictures_as(tmp_path / "20.npz", REAL[:20]), FAKE)
    assert of_20.values["adm_fid"] != pytest.approx(whole.values["adm_fid"], rel=1e-2)
    for name in ("adm_precision", "adm_recall"):
        assert partly.values[name] == of_20.values[name]
        assert partly.provenance[name] == of_20.provenance[name]


def test_bare_statistics_give_distances_alone(tmp_path: Path, reference: str) -> None:
    np.savez(tmp_path / "bare.npz", **moments_of(REAL))  # type: ignore[arg-type]
    bare = judge(str(tmp_path / "bare.npz"), FAKE)
    whole = judge(reference, FAKE)
    for name in ("adm_fid", "adm_sfid", "adm_inception_score"):
        assert bare.values[name] == pytest.approx(whole.values[name], rel=1e-4)
    reason = f"{tmp_path}/bare.npz has statistics alone, and these scores compare images"
    assert reasons(bare) == {"adm_precision": reason, "adm_recall": reason}
    two = {name: moments_of(REAL)[name] for name in ("mu", "sigma")}
    np.savez(tmp_path / "two.npz", **two)  # type: ignore[arg-type]
    sheet = judge(str(tmp_path / "two.npz"), FAKE)
    assert sheet.values["adm_fid"] == bare.values["adm_fid"]
    assert (
        sheet.absent["adm_sfid"] == f"{tmp_path}/two.npz has mu and sigma without mu_s and sigma_s"
    )


def test_statistics_of_another_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match="has mu of 3 features, and the evaluator's network has 6"):
        AdmReference(choose_settings(reference=str(tmp_path / "a.npz")), None, str(tmp_path))


def test_a_split_as_the_reference_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reference=val is a split .*; add ckpt=<that run>"):
        AdmReference(choose_settings(reference="val"), None, str(tmp_path))


def refuse(first: ScoreSheet, second: ScoreSheet, names: Sequence[str], key: str) -> None:
    for name in names:
        with pytest.raises(InputError, match=f"{name} of a and of b can't be compared: {key} is"):
            check_comparable(name, [result(first, "a"), result(second, "b")])


def test_what_changes_a_score_changes_its_provenance_and_refuses_a_comparison(
    tmp_path: Path, reference: str
) -> None:
    first = judge(reference, FAKE)
    for name in NAMES:  # of other samples, measured alike
        check_comparable(name, [result(first, "a"), result(judge(reference, FAKE + 1), "b")])
    of_reference = [name for name in NAMES if name != "adm_inception_score"]

    one_level = REAL.copy()
    one_level[5, 3, 3, 1] += 1
    shifted = judge(save_pictures_as(tmp_path / "shifted.npz", one_level), FAKE)
    refuse(first, shifted, of_reference, "reference_hash")
    swapped = judge(save_pictures_as(tmp_path / "fake.npz", FAKE), REAL[:40])
    refuse(first, swapped, of_reference, "reference_hash|n_reference")
    for other in (shifted, swapped):  # the Inception Score has no reference
        check_comparable("adm_inception_score", [result(first, "a"), result(other, "b")])
    refuse(first, judge(reference, FAKE, rounding="truncate"), NAMES, "rounding")
    refuse(first, judge(reference, FAKE[:30]), NAMES, "n")
    refuse(first, judge(reference, FAKE.repeat(2, 1).repeat(2, 2)), NAMES, "size")
    resized = SmallNetwork()
    resized.resize = "bicubic to 299"
    refuse(first, judge(reference, FAKE, network=resized), NAMES, "resize")
    trained = SmallNetwork()
    trained.hash = "0ther"
    refuse(first, judge(reference, FAKE, network=trained), NAMES, "extractor_hash")


def test_every_score_says_how_it_was_measured(reference: str) -> None:
    sheet = judge(reference, FAKE)
    assert set(sheet.values) == set(names_in_group("adm")) == {*NAMES, *RATIOS}
    for name in NAMES:
        about = sheet.provenance[name]
        assert (about["protocol"], about["n"], about["size"]) == ("ADM's evaluator", 40, [3, 8, 8])
        assert (about["rounding"], about["extractor"], about["judged"]) == (
            "nearest",
            "small",
            "samples",
        )
    assert sheet.provenance["adm_fid"]["features"] == "pool_3, 6 features"
    assert "mixed_6/conv, first 7 channels" in sheet.provenance["adm_sfid"]["features"]
    assert sheet.provenance["adm_recall"]["neighbours"] == 3
    assert "float16" in sheet.provenance["adm_precision"]["distances"]
    assert sheet.provenance["adm_precision"]["reference_size"] == [3, 8, 8]


def test_a_reference_goes_through_the_network_once(
    reference: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen_sizes: list[int] = []
    forward = SmallNetwork.forward
    monkeypatch.setattr(
        SmallNetwork,
        "forward",
        lambda self, images: seen_sizes.append(len(images)) or forward(self, images),  # type: ignore[func-returns-value]
    )
    first = judge(reference, FAKE)
    assert sum(seen_sizes) == len(FAKE) + len(REAL)
    seen_sizes.clear()
    moved = save_pictures_as(tmp_path / "moved.npz", REAL)  # the same images in another file
    assert scores(judge(moved, FAKE, batch_size=11)) == pytest.approx(scores(first), rel=1e-4)
    assert sum(seen_sizes) == len(FAKE)
    seen_sizes.clear()
    judge(save_pictures_as(tmp_path / "other.npz", REAL[:-1]), FAKE)
    other = SmallNetwork()
    other.hash = "0ther"
    judge(reference, FAKE, network=other)
    assert sum(seen_sizes) == 2 * len(FAKE) + len(REAL) - 1 + len(REAL)
    for name, value in (("package", "numpy"), ("resize", "bicubic to 299")):  # of another version
        changed = SmallNetwork()
        setattr(changed, name, value)
        seen_sizes.clear()
        judge(reference, FAKE, network=changed)
        assert sum(seen_sizes) == len(FAKE) + len(REAL)


def test_too_few_images_make_scores_absent_with_a_reason(tmp_path: Path, reference: str) -> None:
    few = "it needs at least 2 images on each side"
    more = "it needs more than 3 images on each side"
    one = judge(reference, FAKE[:1])
    assert reasons(one) == {
        "adm_fid": few, "adm_sfid": few, "adm_precision": more, "adm_recall": more
    }  # fmt: skip
    assert one.values["adm_inception_score"] == pytest.approx(1)
    three = judge(save_pictures_as(tmp_path / "three.npz", REAL[:3]), FAKE)
    assert reasons(three) == {"adm_precision": more, "adm_recall": more}
    assert judge(save_pictures_as(tmp_path / "one.npz", REAL[:1]), FAKE).absent["adm_fid"] == few


def test_features_that_are_no_numbers_make_all_scores_absent(reference: str) -> None:
    judge(reference, FAKE)  # the reference's features are cached
    sheet = judge(reference, FAKE, network=SmallNetwork(scale=float("inf")))
    assert sheet.absent == dict.fromkeys(
        (*NAMES, *RATIOS), "small returns NaN or infinity for 40 of 40 images"
    )


@pytest.mark.parametrize("sizes", [(40,), (1,) * 40, (1, 30, 9), (39, 1)])
def test_running_moments_are_numpys_however_the_rows_come(sizes: tuple[int, ...]) -> None:
    rows = 1000 + torch.randn(40, 5) @ torch.randn(5, 5)
    moments = RunningMoments(5, torch.device("cpu"))
    for part in rows.split(list(sizes)):
        moments.add(part)
    mean, covariance = moments.compute()
    np.testing.assert_allclose(mean, rows.double().mean(0), rtol=1e-13)
    np.testing.assert_allclose(
        covariance, np.cov(rows.double(), rowvar=False), rtol=1e-9, atol=1e-9
    )


def test_without_a_reference_there_are_no_scores_and_without_weights_a_sentence(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet = ScoreSheet({})
    absent = make_adm_judge(None, "nearest", [3, 8, 8])
    absent.add(as_batch(FAKE))
    absent.add_scores(sheet)
    assert not sheet.values

    def fail(*_: Any) -> None:
        raise InputError("the weights x.pth are not in y; put the file there")

    monkeypatch.setattr("codegrid.evaluation.adm.judging.Inception", fail)
    opened = open_reference(choose_settings(reference=reference), None, "cache")
    missing = make_adm_judge(opened, "nearest", [3, 8, 8])
    assert isinstance(missing, AbsentAdmJudge)
    missing.add_scores(sheet)
    assert sheet.absent == dict.fromkeys(
        (*NAMES, *RATIOS), "the weights x.pth are not in y; put the file there"
    )
