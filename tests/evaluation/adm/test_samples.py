"""stage=evaluate of samples in a file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegrid.engine.errors import InputError
from codegrid.evaluation.adm.files import AdmFile
from codegrid.evaluation.adm.judging import make_adm_judge
from codegrid.evaluation.adm.reference import open_reference
from codegrid.evaluation.adm.samples import SamplesJudge
from codegrid.evaluation.features import Inception
from codegrid.evaluation.real_images import ORDER_SEED
from codegrid.evaluation.scores import ScoreSheet
from tests.helpers.bands import Bands
from tests.helpers.commands import QUICK, lightning_warnings, read_mistake
from tests.helpers.evaluation import choose_settings
from tests.helpers.shared import share_tiny_runs
from tests.helpers.small_adm import as_batch, draw_pictures, save_pictures_as, use_small_network
from tests.helpers.stage1 import Noise

Command = Callable[..., int]
REAL, FAKE = draw_pictures(40, 1), draw_pictures(30, 2) // 2 + 60
ADM_NAMES = ("adm_fid", "adm_sfid", "adm_inception_score", "adm_precision", "adm_recall")
IN_FEATURES = ("gfid", "kid", "mind", "precision", "recall", "density", "coverage")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_small_network(monkeypatch)
    save_pictures_as(tmp_path / "real.npz", REAL)
    save_pictures_as(tmp_path / "fake.npz", FAKE)


def read_result(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
    return content


EVALUATE = ("stage=evaluate", "accelerator=cpu")


def test_samples_of_anybody_are_scored_against_a_reference(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (*EVALUATE, "samples=fake.npz", "reference=real.npz")
    assert command(*line) == 0
    output = capsys.readouterr()
    printed = json.loads(output.out)
    result = read_result("runs/evaluate/fake")
    assert {name: printed[name] for name in ADM_NAMES} == {name: result[name] for name in ADM_NAMES}
    assert (result["of"], result["of_stage"], result["samples"]) == (None, "samples", 30)
    assert result["adm_fid"] > 0
    assert set(result["provenance"]) == set(ADM_NAMES)
    assert result["provenance"]["adm_fid"]["rounding"] == "unknown"
    assert "fake.npz, 30 images of 8x8 pixels" in output.err
    assert re.search(r"^reference +real.npz$", output.err, re.MULTILINE)

    capsys.readouterr()
    assert command(*line, "run_dir=again", "batch_size=7", "compare_to=runs/evaluate/fake") == 0
    lines = capsys.readouterr().err.splitlines()
    assert "+0" in next(each for each in lines if each.startswith("adm_sfid"))
    assert command(*line, "run_dir=cut", "rounding=truncate", "compare_to=again") == 0
    terminal = capsys.readouterr().err
    assert "rounding is truncate of the one and unknown of the other" in terminal


def test_mistakes_are_one_sentence_and_leave_no_folder(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("bare.npz", mu=np.zeros(6), sigma=np.eye(6))
    for words, message in {
        ("samples=gone.npz", "reference=real.npz"): "samples=gone.npz is not there",
        ("samples=fake.npz",): "samples=fake.npz has nothing to be compared with; add reference=",
        ("samples=fake.npz", "reference=gone.npz"): "reference=gone.npz is not there",
        ("samples=fake.npz", "reference=val"): "reference=val is a split of the images of a run",
        ("samples=bare.npz", "reference=real.npz"): "samples are images arr_0",
        ("samples=fake.npz", "reference=real.npz", "rounding=up"): "rounding=up must be one of",
        ("samples=16",): "stage=evaluate needs the run to evaluate",
        ("samples=fake.npz", "reference=real.npz", "split=test"): "split=test must be one of",
    }.items():
        capsys.readouterr()
        assert command(*EVALUATE, *words) != 0
        assert message in read_mistake(capsys)
        assert not Path("runs").exists()


def test_missing_weights_are_a_sentence_that_names_the_file(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr("codegrid.evaluation.adm.judging.Inception", Inception)
    monkeypatch.setenv("TORCH_HOME", "hub")
    assert command(*EVALUATE, "samples=fake.npz", "reference=real.npz", "fetch=false") != 0
    sentence = read_mistake(capsys)
    assert "weights-inception-2015-12-05-6726825d.pth" in sentence
    assert "features_dir" in sentence
    assert not Path("runs").exists()


def test_a_dry_run_reads_both_files_and_writes_nothing(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (*EVALUATE, "samples=fake.npz", "reference=real.npz", "dry_run=true")
    assert command(*line) == 0
    assert "score 30 images of fake.npz in runs/evaluate/fake" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert not Path("cache").exists()


def test_a_file_and_the_same_pixels_without_one_have_equal_scores(tmp_path: Path) -> None:
    settings = choose_settings(
        samples=str(tmp_path / "fake.npz"), reference=str(tmp_path / "real.npz")
    )
    in_file = SamplesJudge(
        AdmFile.open("samples", str(settings.samples)), settings, None, str(tmp_path)
    )
    in_file.load_networks()
    direct = make_adm_judge(open_reference(settings, None, str(tmp_path)), "nearest", [3, 8, 8])
    for part in as_batch(FAKE).split(settings.batch_size):
        direct.add(part)
    sheet = ScoreSheet({})
    direct.add_scores(sheet)
    assert in_file.measure_all().values == sheet.values


def test_statistics_beside_the_samples_replace_theirs_as_the_evaluator_has_it(
    tmp_path: Path,
) -> None:
    mean = np.full(6, 3.0)
    file = save_pictures_as(tmp_path / "a.npz", FAKE, mu=mean, sigma=np.eye(6))
    settings = choose_settings(samples=file, reference=str(tmp_path / "real.npz"))
    judge = SamplesJudge(
        AdmFile.open("samples", str(settings.samples)), settings, None, str(tmp_path)
    )
    judge.load_networks()
    sheet = judge.measure_all()
    assert "judged_statistics" in sheet.provenance["adm_fid"]
    assert "judged_statistics" not in sheet.provenance["adm_precision"]
    assert "without mu_s" in sheet.absent["adm_sfid"]
    assert sheet.values["adm_precision"] is not None


def evaluate_beside(data: Any, file: str, **changed: Any) -> ScoreSheet:
    settings = choose_settings(samples=file, proxy=2, **changed)
    judge = SamplesJudge(AdmFile.open("samples", str(file)), settings, data, data.cache_dir)
    judge.load_networks()
    return judge.measure_all()


def test_with_a_run_samples_are_compared_with_its_images_in_all_features(tmp_path: Path) -> None:
    data = Noise(8, cache="ram", cache_dir=str(tmp_path))
    file = str(tmp_path / "fake.npz")
    sheet = evaluate_beside(data, file, reference="val")
    for name in IN_FEATURES:
        about = sheet.provenance[f"{name}_proxy"]
        assert (about["n"], about["n_reference"], about["reference"]) == (
            30,
            24,
            "originals of val",
        )
        assert sheet.absent[name] == "left out with inception=false"
    assert sheet.provenance["adm_recall"]["reference"] == "originals of val"
    assert sheet.provenance["adm_recall"]["n_reference"] == 24
    for name in ADM_NAMES:
        assert sheet.values[name] is not None
    assert not set(ADM_NAMES) & set(evaluate_beside(data, file).values)
    images = data.preprocess(data.take_evenly("val", 24)[0])
    pixels = data.rules.to_pixels(images).permute(0, 2, 3, 1).numpy()
    in_file = save_pictures_as(tmp_path / "val.npz", pixels)
    of_file = evaluate_beside(data, file, reference=in_file)
    for name in ADM_NAMES:
        assert of_file.values[name] == pytest.approx(sheet.values[name], rel=1e-4)


@pytest.mark.parametrize("of", ["an npz", "val"])
def test_real_images_have_a_ratio_of_1_and_others_that_of_two_distances(
    tmp_path: Path, of: str
) -> None:
    """Beside an .npz real images are those of the split that scores refer to, and beside a split those of the other."""
    data = Noise(8, cache="ram", cache_dir=str(tmp_path))
    reference, split = ("val", "train") if of == "val" else (str(tmp_path / "real.npz"), "val")
    rows = data.spread_evenly(split, 20, ORDER_SEED)
    x = data.preprocess(data.samples(split).__getitems__(rows)[0])
    real = data.rules.to_pixels(x).permute(0, 2, 3, 1).numpy()
    files = {
        "real": save_pictures_as(tmp_path / "x.npz", real),
        "fake": save_pictures_as(tmp_path / "y.npz", FAKE[:20]),
    }
    for name in ("adm_fid", "adm_sfid"):
        sheets = {
            side: evaluate_beside(data, file, reference=reference, ratios=True)
            for side, file in files.items()
        }
        distances = {side: sheet.values[name] for side, sheet in sheets.items()}
        assert all(
            sheet.values[f"{name}_real"] == pytest.approx(distances["real"], rel=1e-4)
            for sheet in sheets.values()
        )
        assert sheets["real"].values[f"{name}_ratio"] == pytest.approx(1, rel=1e-4)
        ratio = sheets["fake"].values[f"{name}_ratio"]
        assert ratio == pytest.approx(distances["fake"] / distances["real"], rel=1e-4)
        assert ratio != pytest.approx(1, rel=0.1)
    about = sheets["fake"].provenance["adm_fid_real"]
    assert (about["judged"], about["n"]) == (f"originals of {split}", 20)
    assert "rounding" not in about
    assert sheets["fake"].provenance["adm_fid_ratio"]["real"]["judged_hash"] == about["judged_hash"]


def test_a_ratio_without_real_images_is_absent_with_its_reason(tmp_path: Path) -> None:
    data = Noise(8, cache="ram", cache_dir=str(tmp_path))
    many = evaluate_beside(data, str(tmp_path / "fake.npz"), reference="val", ratios=True)
    assert "as many real images as are judged, 30 of train" in many.absent["adm_fid_ratio"]
    settings = choose_settings(
        samples=str(tmp_path / "fake.npz"), reference=str(tmp_path / "real.npz"), ratios=True
    )
    file = AdmFile.open("samples", str(settings.samples))
    alone = SamplesJudge(file, settings, None, str(tmp_path))
    alone.load_networks()
    sheet = alone.measure_all()
    assert sheet.values["adm_fid"] is not None
    assert sheet.absent["adm_sfid_real"] == "it needs real images; add ckpt=<a run of such images>"


def test_samples_that_can_not_stand_beside_the_images_are_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "fake.npz")
    data = Noise(16, cache="ram", cache_dir=str(tmp_path))
    with pytest.raises(InputError, match="has images of 8x8 pixels, and those of ckpt have 16x16"):
        evaluate_beside(data, file)
    deep = Bands(tmp_path, size=(8, 8))
    with pytest.raises(
        InputError, match="images of ckpt have 5 channels of 16 bits; leave ckpt out"
    ):
        evaluate_beside(deep, file)


@pytest.mark.slow
@lightning_warnings
def test_what_stage_sample_saves_and_what_stage_evaluate_draws_are_judged_alike(
    command: Command,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(share_tiny_runs(tmp_path_factory), tmp_path, dirs_exist_ok=True)
    of_prior = ("ckpt=runs/prior/shapes", "accelerator=cpu")
    assert command("stage=sample", *of_prior, "n=12", "save=[npz]", "run_dir=drawn") == 0
    pictures = draw_pictures(20, 3, (16, 16))
    save_pictures_as(Path("r.npz"), pictures)
    quick = (*QUICK, "reference=r.npz", "proxy=0", "neighbours=false", "inception=false")
    assert command("stage=evaluate", of_prior[0], *quick, "samples=12", "run_dir=a") == 0
    line = ("stage=evaluate", "samples=drawn", "reference=r.npz", "accelerator=cpu", "run_dir=b")
    assert command(*line) == 0
    drawn, saved = read_result("a"), read_result("b")
    assert saved["rounding"] == "nearest" == saved["provenance"]["adm_fid"]["rounding"]
    for name in ADM_NAMES:
        assert saved[name] == pytest.approx(drawn[name], rel=2e-2)
    assert drawn["provenance"]["adm_fid"]["sampler"]["temperature"] == 1.0
    assert drawn["reference"] == "r.npz"

    tokenizer = ("stage=evaluate", "ckpt=runs/vqgan/shapes", *quick, "references=false")
    assert command(*tokenizer, "lpips=null", "run_dir=c") == 0
    assert read_result("c")["provenance"]["adm_precision"]["judged"] == "reconstructions"
    beside = ("stage=evaluate", "ckpt=runs/vqgan/shapes", *QUICK, "samples=drawn", "run_dir=d")
    assert command(*beside, "reference=train") == 0
    assert read_result("d")["gfid_proxy"] is not None
    assert read_result("d")["provenance"]["adm_fid"]["n_reference"] == 64
    capsys.readouterr()
    assert command("stage=report", "runs=[a,b,c,d,runs]", "run_dir=page") == 0
    assert "evaluates a run" not in capsys.readouterr().err  # files belong to none
    page = Path("page/report.html").read_text()
    for label in ("ADM FID", "ADM sFID", "ADM precision"):
        assert label in page
    assert "evaluates a run" not in page
