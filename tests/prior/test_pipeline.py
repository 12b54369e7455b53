"""A pipeline: the configs of its parts, its mistakes, and how it resumes."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from codegrid.engine.errors import InputError
from codegrid.engine.run import Run
from prior.pipeline import COMMON, main_scores, name_group, run_part, split_config
from prior.stages.evaluate import evaluate
from tests.helpers.commands import TINY, TINY_PRIOR, Command, lightning_warnings
from tests.helpers.configs import compose_config

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings

SMALL_PRIOR = [
    word if word.startswith("prior.") else f"stage2.{word}"
    for word in TINY_PRIOR
    if "accelerator" not in word and "logger" not in word
]
SMALL_PIPELINE = [*TINY, "loss=vqvae", *SMALL_PRIOR, "evaluate.proxy=2", "evaluate.fetch=false"]


def resolve(config: DictConfig) -> Any:
    return OmegaConf.to_container(config, resolve=True)


def test_each_part_has_the_config_that_its_own_command_has() -> None:
    parts = split_config(
        compose_config(
            "stage=pipeline",
            "quantizer.K=64",
            "loss=vqvae",
            "prior=maskgit",
            "prior/size=medium",
            "seed=3",
        )
    )
    assert resolve(parts["tokenizer"]) == resolve(
        compose_config("stage=vqgan", "quantizer.K=64", "loss=vqvae", "seed=3")
    )
    assert resolve(parts["prior"]) == resolve(
        compose_config("stage=prior", "prior=maskgit", "prior/size=medium", "seed=3")
    )
    assert resolve(parts["evaluate"]) == resolve(compose_config("stage=evaluate", "seed=3"))


def test_the_settings_that_all_stages_share_are_passed_to_each_part() -> None:
    assert set(COMMON) == set(compose_config())


def test_the_second_stage_has_settings_of_its_own_and_the_hardware_of_the_first() -> None:
    parts = split_config(
        compose_config(
            "stage=pipeline",
            "trainer.max_steps=5",
            "stage2.trainer.max_steps=7",
            "trainer.accelerator=cpu",
            "logger=csv",
        )
    )
    assert [parts[name].trainer.max_steps for name in ("tokenizer", "prior")] == [5, 7]
    assert parts["prior"].trainer.accelerator == parts["evaluate"].accelerator == "cpu"
    assert list(parts["prior"].logger) == ["csv"]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("quantizer=none", "needs a tokenizer whose codes a prior can learn"),
        ("prior.heads=3", "prior.width=16 must be an even multiple of prior.heads=3"),
        (
            "prior=lstm stage2.trainer.checkpoint_activations=true",
            "LSTM has none; use trainer.checkpoint_activations=false (in stage=pipeline the settings of stage=prior are below",
        ),
        ("evaluate.reference=gone.npz", "evaluate.reference=gone.npz is not there; give an .npz"),
        ("evaluate.samples=drawn.npz", "drawn.npz is a file, and stage=pipeline draws samples"),
        ("stage2.trainer.val_every=0", "trainer.val_every=0 must be a whole number"),
        ("stage2.trainer.max_steps=0", "trainer.max_steps=0 must be a number above 0"),
        (
            "stage2.trainer.max_stepps=1",
            "stage2.trainer.max_stepps is not a setting of this stage, did you mean stage2.trainer.max_steps",
        ),
    ],
)
def test_a_mistake_in_the_second_stage_is_reported_before_the_first_starts(
    command: Command, capsys: pytest.CaptureFixture[str], word: str, sentence: str
) -> None:
    words = [
        w for w in SMALL_PIPELINE if word != "quantizer=none" or not w.startswith("quantizer.K")
    ]
    if "lstm" in word:
        words = [w for w in words if "heads" not in w]
    assert command("stage=pipeline", *words, *word.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not Path("runs").exists()


def evaluate_quickly(config: DictConfig) -> dict[str, Any] | None:
    """stage=evaluate, with fixed figures for a tokenizer."""
    if (Path(config.ckpt) / "tokenizer.ckpt").exists():
        return evaluate(config)
    with Run.open(config) as run:
        folder = run.start("evaluated")
        return run.finish(
            {"run": str(folder), "psnr": 20.0, "perplexity": 5.0, "bits_per_image": 48.0}
        )


def break_off(config: DictConfig) -> dict[str, Any]:
    raise RuntimeError("the power failed")


def test_a_pipeline_repeats_the_reason_why_a_score_is_absent_with_the_score() -> None:
    of_tokenizer = {"psnr": 20.0, "kid": None, "sharpness": None, "absent": {"kid": "no weights"}}
    of_prior = {"gfid": None, "kid": None, "exact": True, "absent": {"gfid": "n", "kid": "other"}}
    assert main_scores(of_tokenizer, of_prior) == {
        "psnr": 20.0,
        "kid": None,
        "gfid": None,
        "exact": True,
        "absent": {"kid": "no weights", "gfid": "n"},
    }


def test_a_part_has_the_reasons_that_its_command_does_not_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_quickly(*_: Any) -> dict[str, Any]:
        figures = {"gfid": None, "absent": {"gfid": "no weights"}}
        (tmp_path / "metrics.json").write_text(json.dumps(figures))
        return {"gfid": None}

    monkeypatch.setattr("prior.pipeline.run_once", run_quickly)
    config = compose_config("stage=evaluate")
    assert run_part(config, tmp_path)["absent"] == {"gfid": "no weights"}


@pytest.mark.slow
def test_each_part_of_a_pipelines_points_runs_once(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prior.stages.evaluate.evaluate", break_off)
    line = ["-m", "experiment=pipeline", *SMALL_PIPELINE, "quantizer.K=8,16"]
    assert command(*line) == 2, "it breaks off between training and evaluation"
    monkeypatch.setattr("prior.stages.evaluate.evaluate", evaluate_quickly)
    capsys.readouterr()
    assert command(*line) == 0
    message = capsys.readouterr().err
    for point, K in (("0_quantizer.K-8", 8), ("1_quantizer.K-16", 16)):
        folder = Path("runs/sweeps/pipeline") / point
        for part in ("tokenizer", "prior"):
            assert f"{folder / part}: finished before" in message
            assert len((folder / part / "record.jsonl").read_text().splitlines()) == 1
        figures = json.loads((folder / "metrics.json").read_text())
        prior = json.loads((folder / "evaluate_prior/metrics.json").read_text())
        assert figures["K"] == K
        names = ("psnr", "perplexity", "bits_per_image")
        assert [figures[name] for name in names] == [20.0, 5.0, 48.0]
        assert figures["nats_per_token"] == prior["nats_per_token"]
        assert {name for name, v in figures.items() if v is None} <= figures["absent"].keys()
        assert (figures["tokenizer_steps"], figures["prior_steps"]) == (6, 6)
        assert all(Path(picture).is_file() for picture in figures["pictures"])
        assert (
            json.loads((folder / "prior/metrics.json").read_text())["tokenizer_of"]
            == OmegaConf.load(folder / "tokenizer/config.yaml").id
        )
    assert command(*line) == 0
    assert capsys.readouterr().err.count("finished before") == 2


@pytest.mark.slow
def test_a_single_pipeline_is_resumed(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prior.stages.evaluate.evaluate", evaluate_quickly)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power failed"):
        patch.setattr("prior.stages.train.train_prior", break_off)
        command("stage=pipeline", *SMALL_PIPELINE)
    assert command("stage=pipeline", "resume=runs/pipeline/shapes", "quantizer.K=64") == 2
    assert "quantizer.K=64 can't change" in capsys.readouterr().err
    assert command("stage=pipeline", "resume=runs/pipeline/shapes") == 0
    figures = json.loads(Path("runs/pipeline/shapes/metrics.json").read_text())
    assert figures["K"] == 16
    assert figures["id"] == OmegaConf.load("runs/pipeline/shapes/config.yaml").id


@pytest.mark.parametrize(
    ("stage", "group"), [("prior", "stage2"), ("evaluate", "evaluate"), ("vqgan", None)]
)
def test_a_mistake_in_a_part_says_where_its_settings_are(stage: str, group: str | None) -> None:
    sentence = "6 training samples don't fill one batch of 8; use batch_size=6, or less"
    with pytest.raises(InputError) as caught, name_group(stage):
        raise InputError(sentence)
    place = f" (in stage=pipeline the settings of stage={stage} are below {group}"
    assert str(caught.value).startswith(sentence + (place if group else ""))
    assert group or str(caught.value) == sentence


def test_a_mistake_that_names_no_setting_is_passed_on_as_it_is() -> None:
    with pytest.raises(InputError, match="^the disk is full$"), name_group("prior"):
        raise InputError("the disk is full")


@pytest.mark.slow
def test_the_parts_of_a_pipeline_are_announced_below_it_and_name_their_group(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["stage=pipeline", *SMALL_PIPELINE, "run_dir=all", "dry_run=true"]
    assert command(*words) == 0
    done = capsys.readouterr()
    assert "stage=vqgan would train in all/tokenizer;" in done.err
    assert "stage=prior would train in all/prior;" in done.err
    result = json.loads(done.out.strip().splitlines()[-1])
    assert [result[name]["would_write"] for name in ("tokenizer", "prior")] == [
        "all/tokenizer",
        "all/prior",
    ]
    assert command(*words, "stage2.label_drop=3") != 0
    assert "below stage2" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("all").exists()
