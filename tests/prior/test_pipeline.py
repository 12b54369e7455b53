import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from engine.run import open_folder, write_result
from prior.stages.evaluate import evaluate
from prior.stages.pipeline import COMMON, split_config
from tests.helpers.commands import TINY, TINY_PRIOR

Command = Callable[..., int]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec",
    "ignore:.*does not have many workers",
    "ignore:.*logging on a CPU",
    "ignore:.*batch_size.*ambiguous",
)
CONF = Path(__file__).parents[2] / "conf"
SMALL = [
    word if word.startswith("prior.") else f"stage2.{word}"
    for word in TINY_PRIOR
    if "accelerator" not in word
]
SMALL = [*TINY, "loss=vqvae", *[word for word in SMALL if "logger" not in word]]


def config(*words: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(words))


def resolved(made: DictConfig) -> Any:
    return OmegaConf.to_container(made, resolve=True)


def test_each_part_has_the_config_that_its_own_command_has() -> None:
    parts = split_config(
        config(
            "stage=pipeline",
            "quantizer.K=64",
            "loss=vqvae",
            "prior=maskgit",
            "prior/size=medium",
            "seed=3",
        )
    )
    assert resolved(parts["tokenizer"]) == resolved(
        config("stage=vqgan", "quantizer.K=64", "loss=vqvae", "seed=3")
    )
    assert resolved(parts["prior"]) == resolved(
        config("stage=prior", "prior=maskgit", "prior/size=medium", "seed=3")
    )
    assert resolved(parts["evaluate"]) == resolved(config("stage=evaluate", "seed=3"))


def test_what_every_stage_has_is_told_to_each_part() -> None:
    assert set(COMMON) == set(config())


def test_the_second_stage_has_settings_of_its_own_and_the_firsts_hardware() -> None:
    parts = split_config(
        config(
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
    ("word", "says"),
    [
        ("quantizer=none", "needs a tokenizer whose codes a prior can learn"),
        ("prior.heads=3", "prior.width=16 must be an even multiple of prior.heads=3"),
        ("stage2.trainer.val_every=0", "trainer.val_every=0 must be a whole number"),
        ("stage2.trainer.max_steps=0", "trainer.max_steps=0 must be a number above 0"),
        (
            "stage2.trainer.max_stepps=1",
            "stage2.trainer.max_stepps is not a setting of this stage, did you mean stage2.trainer.max_steps",
        ),
    ],
)
def test_a_mistake_in_the_second_stage_is_found_before_the_first(
    command: Command, capsys: pytest.CaptureFixture[str], word: str, says: str
) -> None:
    words = [w for w in SMALL if word != "quantizer=none" or not w.startswith("quantizer.K")]
    assert command("stage=pipeline", *words, word) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert says in line
    assert not Path("runs").exists()


def judged(config: DictConfig) -> dict[str, Any]:
    """stage=evaluate, with a stand-in for the judgement of a tokenizer."""
    if (Path(config.ckpt) / "tokenizer.ckpt").exists():
        return evaluate(config)
    folder = open_folder(config, "judged")
    return write_result(
        folder, {"run": str(folder), "psnr": 20.0, "perplexity": 5.0, "bits_per_image": 48.0}
    )


def broken(config: DictConfig) -> dict[str, Any]:
    raise RuntimeError("the power failed")


@pytest.mark.slow
def test_a_pipelines_points_are_chains_of_which_each_link_is_made_once(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prior.stages.evaluate.evaluate", broken)
    line = ["-m", "experiment=pipeline", *SMALL, "quantizer.K=8,16"]
    assert command(*line) == 2, "it breaks off between training and judging"
    monkeypatch.setattr("prior.stages.evaluate.evaluate", judged)
    capsys.readouterr()
    assert command(*line) == 0
    told = capsys.readouterr().err
    for point, K in (("0_quantizer.K-8", 8), ("1_quantizer.K-16", 16)):
        folder = Path("runs/sweeps/pipeline") / point
        for part in ("tokenizer", "prior"):
            assert f"{folder / part}: finished before" in told
            assert len((folder / part / "record.jsonl").read_text().splitlines()) == 1
        found = json.loads((folder / "metrics.json").read_text())
        prior = json.loads((folder / "evaluate_prior/metrics.json").read_text())
        assert (found["K"], found["psnr"], found["perplexity"], found["bits_per_image"]) == (
            K,
            20.0,
            5.0,
            48.0,
        )
        assert found["nats_per_token"] == prior["nats_per_token"]
        assert (found["tokenizer_steps"], found["prior_steps"]) == (6, 6)
        assert all(Path(picture).is_file() for picture in found["pictures"])
        assert (
            json.loads((folder / "prior/metrics.json").read_text())["tokenizer_of"]
            == OmegaConf.load(folder / "tokenizer/config.yaml").id
        )
    assert command(*line) == 0
    assert capsys.readouterr().err.count("finished before") == 2


@pytest.mark.slow
def test_a_single_pipeline_goes_on_with_resume(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("prior.stages.evaluate.evaluate", judged)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power failed"):
        patch.setattr("prior.stages.train.train_prior", broken)
        command("stage=pipeline", *SMALL)
    assert command("stage=pipeline", "resume=runs/pipeline/shapes", "quantizer.K=64") == 2
    assert "quantizer.K=64 can't change" in capsys.readouterr().err
    assert command("stage=pipeline", "resume=runs/pipeline/shapes") == 0
    found = json.loads(Path("runs/pipeline/shapes/metrics.json").read_text())
    assert found["K"] == 16
    assert found["id"] == OmegaConf.load("runs/pipeline/shapes/config.yaml").id
