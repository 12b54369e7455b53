"""stage=evaluate of priors: likelihoods, heat maps, and whole commands."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.data.samples import ArraySamples
from codegrid.engine.errors import InputError
from codegrid.evaluation.scores import ScoreSheet
from prior.judging import exp_or_infinity, heat_map_pictures, iterate_samples, measure_nats
from prior.likelihood import negative_log_likelihood, weighted_mean
from tests.helpers.commands import QUICK, TINY_PRIOR
from tests.helpers.priors import PRIORS, UNLABELLED, make_prior
from tests.helpers.shared import share_tiny_runs

K = 5


def grids(n: int, shape: tuple[int, ...], labels: int = 2) -> ArraySamples:
    random = np.random.default_rng(0)
    return ArraySamples(
        random.integers(0, K, (n, *shape)).astype(np.uint16), random.integers(-1, labels, n)
    )


@pytest.mark.parametrize("name", PRIORS)
class TestEveryPrior:
    def test_codes_are_predicted_in_raster_order(self, name: str) -> None:
        model = make_prior(name)
        codes = torch.randint(K, (4, model.L))
        assert torch.equal(model.judge(codes, None).targets, codes)

    def test_nats_are_those_of_the_models_prediction_whatever_the_batches(self, name: str) -> None:
        model = make_prior(name, classes=0 if name in UNLABELLED else 2)
        # VAR's codes are a row of all scales: 1x1, 1x2 and 2x3.
        shape = (1, 1 + 2 + 6, 1) if name == "var" else (2, 3, model.num_codebooks)
        codes = grids(7, shape)
        nats = measure_nats(model, codes, 3)
        labels = torch.from_numpy(codes.labels) if model.classes else None
        prediction = model.judge(torch.from_numpy(codes.values.astype(int)).flatten(1), labels)
        assert nats.shape == (7, *shape)
        assert nats.mean().item() == pytest.approx(
            weighted_mean(negative_log_likelihood(prediction), prediction).item(), rel=1e-5
        )
        torch.testing.assert_close(
            nats.flatten(1),
            negative_log_likelihood(prediction) * prediction.weights,
            rtol=1e-4,
            atol=1e-5,
        )


def test_each_code_has_its_nats_at_its_place() -> None:
    model = make_prior("gpt", grid=(2, 3))
    codes = grids(1, (2, 3))
    before = measure_nats(model, codes, 1)[0, :, :, 0]
    codes.values[0, 1, 1] = (codes.values[0, 1, 1] + 1) % K
    changed = measure_nats(model, codes, 1)[0, :, :, 0] != before
    assert changed.tolist() == [
        [False, False, False],
        [False, True, True],
    ]  # its own and those that depend on it


def test_images_of_more_classes_than_the_prior_knows_are_refused() -> None:
    with pytest.raises(InputError, match="the images are of 6 classes, and the prior learned 2"):
        measure_nats(make_prior("gpt", classes=2), grids(40, (2, 3), labels=6), 8)


def test_heat_maps_go_from_black_over_red_and_yellow_to_white() -> None:
    pictures = heat_map_pictures(torch.tensor([[[0.0, 1 / 3, 2 / 3, 1.0, 2.0]]]), 2)
    assert pictures.shape == (1, 3, 2, 10)
    assert pictures[0, :, 1, ::2].t().tolist() == [
        [0, 0, 0],
        [255, 0, 0],
        [255, 255, 0],
        [255, 255, 255],
        [255, 255, 255],
    ]


@pytest.mark.parametrize(
    ("nats", "perplexity"),
    [(0.0, 1.0), (709.0, math.exp(709)), (710.0, None), (math.inf, None), (math.nan, None)],
)
def test_a_perplexity_beyond_all_floats_is_absent(nats: float, perplexity: float | None) -> None:
    scores = ScoreSheet({})
    scores.add("perplexity", exp_or_infinity(nats))
    assert scores.values["perplexity"] == (perplexity and pytest.approx(perplexity, rel=1e-4))
    assert ("perplexity" in scores.absent) == (perplexity is None)


Command = Callable[..., int]
SCORES = ("kid", "inception_score", "precision", "recall", "density", "coverage")


def result(folder: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
    return content


@pytest.fixture
def trained(
    command: Command,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """The command, in a folder with a prior and its tokenizer."""
    shutil.copytree(share_tiny_runs(tmp_path_factory), tmp_path, dirs_exist_ok=True)
    capsys.readouterr()
    return command


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec", "ignore:.*does not have many workers", "ignore:.*logging on a CPU"
)
class TestTheCommand:
    def test_samples_are_compared_with_the_images_and_each_score_says_how(
        self, trained: Command, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert (
            trained(
                "stage=evaluate", "ckpt=runs/prior/shapes", *QUICK, "samples=12", "run_dir=judged"
            )
            == 0
        )
        evaluation, prior = result("judged"), result("runs/prior/shapes")
        assert (evaluation["of"], evaluation["of_stage"], evaluation["tokenizer_of"]) == (
            prior["id"],
            "prior",
            prior["tokenizer_of"],
        )
        assert (evaluation["n"], evaluation["samples"], evaluation["split"]) == (16, 12, "val")
        for name in ("gfid", *SCORES):
            assert evaluation[name] is None
            assert "fetch=false" in evaluation["absent"][name]
            about = evaluation["provenance"][f"{name}_proxy"]
            assert evaluation[f"{name}_proxy"] >= (-1 if name == "kid" else 0)
            assert (about["n"], about["n_reference"], about["reference"], about["judged"]) == (
                12,
                16,
                "originals of val",
                "samples",
            )
            assert (about["sampler"]["temperature"], about["seed"]) == (1.0, 0)
        ratio = evaluation["gfid_proxy"] / evaluation["gfid_real_proxy"]
        assert evaluation["gfid_ratio_proxy"] == pytest.approx(ratio, rel=1e-3)
        assert evaluation["provenance"]["gfid_ratio_proxy"]["real"]["n"] == 12
        assert evaluation["provenance"]["nats_per_token"]["exact"] is True
        assert evaluation["nearest_rmse"] > 0
        for file in evaluation["pictures"]:
            with Image.open(file) as sheet:
                assert sheet.size > (30, 30)
        lines = capsys.readouterr().err.splitlines()
        assert any(
            line.startswith("absent ") and "gfid" in line and "fetch=false" in line
            for line in lines
        )
        assert any(line.startswith("coverage_proxy ") for line in lines)

    def test_the_same_command_gives_the_same_scores_and_another_temperature_is_not_comparable(
        self, trained: Command, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = ["stage=evaluate", "ckpt=runs/prior/shapes", *QUICK, "neighbours=false"]
        assert trained(*line, "run_dir=one") == 0
        assert trained(*line, "run_dir=two", "batch_size=5", "compare_to=one") == 0
        assert "can't be compared" not in capsys.readouterr().err
        first, second = result("one"), result("two")
        assert {key: second[key] for key in first["provenance"]} == pytest.approx(
            {key: first[key] for key in first["provenance"]}
        )
        capsys.readouterr()
        assert trained(*line, "run_dir=hot", "sampler.temperature=2", "compare_to=one") == 0
        terminal = capsys.readouterr().err
        assert "gfid_proxy of hot and of one can't be compared: sampler is" in terminal
        assert "+0" in next(
            line for line in terminal.splitlines() if line.startswith("nats_per_token")
        )

    def test_without_samples_there_are_only_likelihoods(self, trained: Command) -> None:
        assert (
            trained(
                "stage=evaluate", "ckpt=runs/prior/shapes", *QUICK, "samples=0", "run_dir=judged"
            )
            == 0
        )
        evaluation = result("judged")
        assert evaluation["nats_per_token"] > 0
        assert evaluation["gfid_proxy"] is None
        assert set(evaluation["absent"].values()) == {"no samples are drawn with samples=0"}
        assert not list(Path("cache").glob("proxy-*"))

    def test_impossible_evaluations_are_refused_before_anything_is_written(
        self, trained: Command, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (Path("other")).mkdir()
        (Path("other") / "metrics.json").write_text('{"of_stage": "vqgan"}')
        for words, message in {
            "sampler.grid=5x5": "judges whole samples of the prior's own grid; leave sampler.grid out",
            "sampler.guidance=2": "train one with conditional=true",
            "compare_to=other": "is no evaluation of a run of stage=prior",
            "features=nothing.pt": "features=nothing.pt is not there",
            "run_dir=other": "run_dir=other is not empty",
        }.items():
            capsys.readouterr()
            assert trained("stage=evaluate", "ckpt=runs/prior/shapes", *QUICK, words) != 0
            assert message in capsys.readouterr().err
            assert not Path("runs/evaluate").exists()

    def test_a_prior_of_classes_draws_samples_of_the_images_classes(
        self, trained: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert (
            trained(
                "stage=prior",
                "ckpt=runs/vqgan/shapes",
                "conditional=true",
                "name=classes",
                *TINY_PRIOR,
            )
            == 0
        )
        calls = []
        monkeypatch.setattr(
            "prior.judging.iterate_samples",
            lambda *arguments: calls.append(arguments) or iterate_samples(*arguments),
        )
        line = [
            "stage=evaluate",
            "ckpt=runs/prior/classes",
            *QUICK,
            "neighbours=false",
            "run_dir=judged",
        ]
        assert trained(*line, "sampler.guidance=1.5") == 0
        assert calls[0][3].tolist() == np.load("judged/likelihoods.npz")["labels"].tolist()
