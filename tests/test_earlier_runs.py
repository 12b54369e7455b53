"""Runs of version 0.1 can be resumed, sampled from and evaluated with the current code."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks.identity import machine, state_hash
from codegrid.engine.aliases import rename_key, rename_words, upgrade_config
from codegrid.engine.errors import InputError
from codegrid.engine.sweep import config_difference
from codegrid.engine.version import Stamp
from prior.load import load_prior
from tests.helpers.commands import Command, lightning_warnings
from tests.helpers.configs import ROOT, compose_config
from vqgan.load import load_tokenizer

pytestmark = lightning_warnings

FIXTURES = ROOT / "tests" / "fixtures"
RUNS = FIXTURES / "run_of_0_1"
EXPECTED = json.loads((RUNS / "expected.json").read_text())
PLAIN = ["accelerator=cpu", "proxy=0", "inception=false", "fetch=false"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A copy of the earlier runs in the folder in which the command runs."""
    shutil.copytree(RUNS / "tokenizer", tmp_path / "runs" / "vqgan" / "tokenizer")
    shutil.copytree(RUNS / "prior", tmp_path / "runs" / "prior" / "prior")
    return tmp_path / "runs"


def test_packages_that_have_moved_are_found_and_a_users_package_of_that_name_is_theirs() -> None:
    before = {
        "data": {"_target_": "codegrid.data.folder.Folder"},
        "run": "codegrid.evaluation.report.stage.report",
    }
    now = {
        "data": {"_target_": "codegrid.data.folder.Folder"},
        "run": "codegrid.evaluation.report.stage.report",
    }
    for stamp in ({}, {"codegrid": {"version": "0.2.0.dev0", "format": 2}}):
        assert upgrade_config({**stamp, **before}) == {**stamp, **now}
    of_today = {"codegrid": {"version": "0.2.0.dev0", "format": 3}, **before}
    assert upgrade_config(of_today) == of_today
    assert upgrade_config(before, Stamp("0.2.0.dev0", 3)) == before
    assert upgrade_config({"_target_": "databank.Folder"}) == {"_target_": "databank.Folder"}


RELEASES = sorted(FIXTURES.glob("run_of_*"))


def released_versions(changelog: str) -> set[str]:
    """The versions with a heading in the changelog, without the last of their three numbers; 0.1 had none yet."""
    return {"0.1", *re.findall(r"^## v?(\d+\.\d+)\.\d+", changelog, re.MULTILINE)}


def test_every_released_version_has_its_run_folders() -> None:
    versions = {path.name.removeprefix("run_of_").replace("_", ".") for path in RELEASES}
    assert versions == released_versions((ROOT / "CHANGELOG.md").read_text())
    assert released_versions("## Unreleased\n\n## 0.2.1 (2027)\n\n## 1.10.0\n") == {
        "0.1",
        "0.2",
        "1.10",
    }


def load_release(folder: Path) -> str | None:
    """Load and use both runs in a folder; returns the sentence if they are refused."""
    try:
        tokenizer, _ = load_tokenizer(folder / "tokenizer")
        prior = load_prior(folder / "prior")
    except InputError as refusal:
        return str(refusal)
    codes = torch.zeros(1, *tokenizer.grid, tokenizer.num_codebooks, dtype=torch.int64)
    codes = codes if tokenizer.num_codebooks > 1 else codes[..., 0]
    assert prior.tokenizer.decode_indices(codes).equal(tokenizer.decode_indices(codes))
    return None


def names_commit(sentence: str) -> bool:
    """Whether a refusal says which commit reads the run."""
    return bool(re.search(r"was written by Codegrid .*\(git checkout [0-9a-f]{7}\)", sentence))


@pytest.mark.parametrize("folder", RELEASES, ids=lambda path: path.name)
def test_a_run_of_a_released_version_loads_or_a_sentence_names_its_commit(folder: Path) -> None:
    refusal = load_release(folder)
    assert refusal is None or names_commit(refusal)


def test_a_run_of_a_released_version_that_no_longer_loads_names_its_commit(tmp_path: Path) -> None:
    """As if today's encoder had no layer that the one of then had."""
    shutil.copytree(RUNS, tmp_path / "old")
    file = tmp_path / "old" / "tokenizer" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["average"]["encoder.stem"] = torch.zeros(1)
    torch.save(checkpoint, file)
    refusal = load_release(tmp_path / "old")
    assert refusal is not None
    assert names_commit(refusal)
    assert "git checkout 8d470c7" in refusal


@pytest.mark.parametrize(("stage", "name"), [("vqgan", "tokenizer"), ("prior", "prior")])
def test_an_earlier_run_resumes_to_the_bit(
    runs: Path, command: Command, stage: str, name: str
) -> None:
    folder = runs / stage / name
    assert command(f"stage={stage}", f"resume=runs/{stage}/{name}", "trainer.max_steps=9") == 0
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["clock"]["step"] == 9
    if machine() == EXPECTED["machine"]:
        assert state_hash(checkpoint) == EXPECTED["resumed to step 9"][name]
    result = json.loads((folder / "metrics.json").read_text())
    assert (result["psnr"] if stage == "vqgan" else result["nats_per_token"]) == pytest.approx(
        EXPECTED["psnr" if stage == "vqgan" else "nats_per_token of step 9"], abs=2e-3
    )


def test_an_earlier_prior_is_sampled_from(runs: Path, command: Command) -> None:
    line = ["stage=sample", "ckpt=runs/prior/prior", "n=6", "accelerator=cpu", "run_dir=samples"]
    assert command(*line) == 0
    codes = torch.load(runs.parent / "samples" / "codes.pt", weights_only=True)["codes"]
    assert codes.shape == (6, 4, 4, 2)
    assert codes.flatten()[:16].tolist() == EXPECTED["first codes of seed 0"]


@pytest.mark.parametrize(
    ("name", "score", "more"),
    [
        ("vqgan/tokenizer", "psnr", ["lpips=null", "references=false"]),
        ("prior/prior", "nats_per_token", ["samples=4", "neighbours=false"]),
    ],
)
def test_earlier_runs_are_evaluated_to_the_same_scores(
    runs: Path, command: Command, name: str, score: str, more: list[str]
) -> None:
    assert command("stage=evaluate", f"ckpt=runs/{name}", "run_dir=judged", *PLAIN, *more) == 0
    result = json.loads((runs.parent / "judged" / "metrics.json").read_text())
    assert result[score] == pytest.approx(EXPECTED[score], abs=2e-3)


def test_a_report_reads_earlier_runs(runs: Path, command: Command) -> None:
    assert command("stage=report", "runs=runs", "run_dir=report") == 0
    result = json.loads((runs.parent / "report" / "metrics.json").read_text())
    assert result["runs"] == 2
    assert result["unused"] == {}


@pytest.mark.parametrize(
    ("key", "new"),
    [
        ("quantizer.books", "quantizer.num_codebooks"),
        ("stage2.sampler.choice", "stage2.sampler.choice_temperature"),
        ("evaluate.beside", "evaluate.compare_to"),
        ("data.value_range", "data.range"),
        ("stage1.data.value_range", "stage1.data.range"),
        ("value_range", "value_range"),
        ("quantizer.K", "quantizer.K"),
        ("my_quantizer.books", "my_quantizer.books"),
    ],
)
def test_a_renamed_key_is_recognised_at_any_depth(key: str, new: str) -> None:
    assert rename_key(key) == new


def test_pixels_of_earlier_runs_have_eight_bits() -> None:
    images = {"_target_": "a.B", "num_workers": 0, "cache": "disk", "image_size": 64}
    earlier = {"data": {**images, "value_range": [0, 4095]}}
    upgraded = upgrade_config(earlier)["data"]
    assert upgraded["depth"] == 8
    assert upgraded["range"] == [0, 4095]
    assert "value_range" not in upgraded
    assert upgrade_config({"data": {**images, "depth": None}})["data"]["depth"] is None


def test_samplers_of_earlier_runs_have_the_order_of_their_prior() -> None:
    sampler = {"_target_": "prior.decoding.sampling.Sampler", "steps": 8}
    added = {"order": None, "corrector": 0, "remask": 0.0, "parallel": 1}
    assert upgrade_config({"evaluate": {"sampler": sampler}}) == {
        "evaluate": {"sampler": {**added, **sampler}}
    }
    chosen = {**sampler, "order": "halton", "corrector": 1, "remask": 0.1, "parallel": 8}
    assert upgrade_config({"sampler": chosen}) == {"sampler": chosen}


def test_a_renamed_key_on_the_command_line_gets_a_sentence() -> None:
    words, sentences = rename_words(
        ["-m", "stage=vqgan", "quantizer.books=2,4", "+loss.codes_rest=false"]
    )
    assert words == ["-m", "stage=vqgan", "quantizer.num_codebooks=2,4", "+loss.freeze_codes=false"]
    assert len(sentences) == 2
    assert sentences[0].startswith("quantizer.books is called quantizer.num_codebooks now")


def test_an_earlier_name_on_the_command_line_still_works(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["stage=vqgan", "quantizer=residual", "quantizer.books=3", "--cfg", "job"]
    assert command(*line) == 0
    printed = capsys.readouterr()
    assert "num_codebooks: 3" in printed.out
    assert "quantizer.books is called quantizer.num_codebooks now" in printed.err


def test_upgrading_a_current_config_changes_nothing() -> None:
    codes = {"_target_": "vqgan.quantizers.vq.VQ", "K": 8, "from": 0}
    config = {"quantizer": codes, "callbacks": [{"a": 1}]}
    assert upgrade_config(config) == config


def test_an_earlier_pipeline_resumes_without_the_judge_of_shapes() -> None:
    config = OmegaConf.to_container(compose_config("stage=pipeline"), resolve=True)
    assert isinstance(config, dict)
    assert upgrade_config(config) == config
    earlier = {**config, "evaluate": {**config["evaluate"]}}
    assert earlier["evaluate"].pop("validity") > 0
    assert upgrade_config(earlier)["evaluate"]["validity"] == 0


def test_upgrading_an_import_adds_nothing_that_only_a_training_has() -> None:
    config = OmegaConf.to_container(compose_config("stage=import", "from=x"), resolve=True)
    assert upgrade_config(config) == config


def test_upgrading_renames_keys_and_targets_at_any_depth() -> None:
    old = {"quantizer": {"inner": {"K": 2}, "books": 4}, "run": "vqgan.stages.train"}
    assert upgrade_config(old) == {
        "quantizer": {"inner": {"K": 2}, "num_codebooks": 4},
        "run": "vqgan.stages.train.train_tokenizer",
    }


def test_images_of_earlier_runs_get_todays_time_limit_and_overrides_stay_empty() -> None:
    default = compose_config("stage=vqgan").data.reader_timeout
    data = {"_target_": "codegrid.data.folder.Folder", "num_workers": None, "cache": "disk"}
    later = {"root": None, "cache": None, "num_workers": None}
    upgraded = upgrade_config({"data": data, "stage2": {"data": later}})
    assert upgraded["data"]["reader_timeout"] == default
    assert upgraded["stage2"]["data"]["reader_timeout"] is None
    assert upgrade_config(upgraded) == upgraded
    own = upgrade_config({"data": {**data, "reader_timeout": 5}})
    assert own["data"]["reader_timeout"] == 5


NEW_SETTINGS = (  # of images, which configs of some earlier versions lack
    "reader_timeout", "fit", "tiles", "range", "depth", "number_type", "show", "labels", "val_labels", "label", "file_column",
    "column_names", "columns", "mismatch",
)  # fmt: skip


@pytest.mark.parametrize("stage", ["vqgan", "prior", "pipeline", "evaluate"])
@pytest.mark.parametrize("dataset", ["shapes", "folder", "ffhq"])
def test_a_point_of_an_earlier_sweep_is_still_the_same_run(stage: str, dataset: str) -> None:
    data = [] if stage in ("prior", "sample", "evaluate") else [f"data={dataset}"]
    config = compose_config(f"stage={stage}", "seed=0", *data)
    earlier = OmegaConf.create(OmegaConf.to_yaml(config, resolve=True))
    for node in (
        earlier.get("data"),
        OmegaConf.select(earlier, "stage2.data"),
        OmegaConf.select(earlier, "evaluate.data"),
    ):
        if node is not None:
            for name in NEW_SETTINGS:
                node.pop(name, None)
    for name in ("init", "learn", "lora", "grow"):
        earlier.pop(name, None)
    assert config_difference(config, upgrade_config(earlier)) is None


def test_an_earlier_quantizer_ibq_chooses_the_nearest_code_at_any_depth() -> None:
    ibq = {"_target_": "vqgan.quantizers.ibq.IBQ", "K": 8, "from": 0}
    upgraded = upgrade_config({"quantizer": {"inner": ibq}})
    assert upgraded["quantizer"]["inner"] == {**ibq, "score": "nearest"}
    other = {**ibq, "score": "inner_product"}
    assert upgrade_config({"quantizer": other})["quantizer"] == other


@pytest.mark.parametrize(
    ("word", "now"),
    [
        ("quantizer.rotation=true", "quantizer.gradient=rotation"),
        ("+quantizer.inner.rotation=True,false", "+quantizer.inner.gradient=rotation,straight_through"),
        ("stage1.quantizer.rotation=1", "stage1.quantizer.gradient=1"),  # refused there
        ("image.rotation=true", "image.rotation=true"),
    ],
)  # fmt: skip
def test_the_earlier_switch_for_the_rotation_trick_names_a_gradient(word: str, now: str) -> None:
    words, sentences = rename_words([word])
    assert words == [now]
    assert len(sentences) == (word != now)


def test_an_earlier_quantizer_has_the_gradient_that_its_switch_chose_at_any_depth() -> None:
    def upgrade(**settings: Any) -> dict[str, Any]:
        node = {"_target_": "vqgan.quantizers.ema.EMA", "K": 8, **settings}
        inner: dict[str, Any] = upgrade_config({"quantizer": {"inner": node}})["quantizer"]["inner"]
        return inner

    assert upgrade(rotation=True)["gradient"] == "rotation"
    assert upgrade(rotation=False)["gradient"] == "straight_through"
    assert "rotation" not in upgrade(rotation=False)
    assert upgrade(gradient="diveq")["gradient"] == "diveq"
    other = {"_target_": "mine.Quantizer", "K": 8, "rotation": True}
    assert upgrade_config({"quantizer": other})["quantizer"] == other


@pytest.mark.parametrize("quantizer", ["fsq", "ema", "residual", "kl"])
def test_the_codes_of_earlier_configs_come_into_use_at_once(quantizer: str) -> None:
    config = compose_config("stage=vqgan", f"quantizer={quantizer}", "seed=0")
    earlier = OmegaConf.create(OmegaConf.to_yaml(config, resolve=True))
    for node in (earlier.quantizer, earlier.quantizer.get("inner") or {}):
        names = ("from", "activation", "gradient", "decay")
        for name in names if "levels" in node else names[:3]:
            node.pop(name, None)
        if "beta" in node:
            node["rotation"] = False
    upgraded = upgrade_config(earlier)
    if quantizer == "fsq":
        assert upgraded.quantizer.activation == "tanh"
        upgraded.quantizer.activation = config.quantizer.activation
    assert config_difference(config, upgraded) is None


def test_the_networks_of_earlier_configs_have_their_place_of_today() -> None:
    model = {"encoder": {"_target_": "vqgan.encoder.Encoder"}}
    upgraded = upgrade_config({"model": model})
    assert upgraded["model"]["encoder"]["_target_"] == "vqgan.networks.encoder.Encoder"
