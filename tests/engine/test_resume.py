"""Resuming: the earlier config is used as it was, with what the command may change."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from codegrid.engine import resume
from codegrid.engine.checkpoint import save_atomically
from codegrid.engine.errors import InputError
from codegrid.engine.folder import CONFIG, LAST
from codegrid.engine.resume import read_stamp, resolve_resumed, resume_command, write_places
from codegrid.engine.sweep import config_difference
from codegrid.engine.version import FORMAT, STAMP, stamp_config
from tests.helpers.configs import compose_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run with a checkpoint."""
    config = compose_config("stage=vqgan", "quantizer.K=16", "trainer.max_steps=5", "logger=csv")
    config.id = "0a1b2c3d"
    (tmp_path / CONFIG).write_text(OmegaConf.to_yaml(config, resolve=True))
    save_atomically({"weight": torch.zeros(1)}, tmp_path / LAST)
    return tmp_path


def resolve(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, has_parts: bool = False
) -> Any:
    """The config of `python train.py stage=vqgan resume=<folder> <overrides>`."""
    words = ["stage=vqgan", f"resume={folder}", *overrides]
    monkeypatch.setattr(resume, "read_overrides", lambda: words)
    config = compose_config("stage=vqgan", *overrides)
    config.resume = str(folder)  # no word, so that equal words are composed once
    return resolve_resumed(config, has_parts)


def test_a_resumed_run_has_its_earlier_settings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(folder, monkeypatch)
    assert config.quantizer.K == 16
    assert config.trainer.max_steps == 5
    assert config.id == "0a1b2c3d"
    assert config.resume == config.run_dir == str(folder)


def test_the_trainer_and_the_loggers_may_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(folder, monkeypatch, "trainer.max_steps=9", "logger=tensorboard")
    assert config.trainer.max_steps == 9
    assert list(config.logger) == ["tensorboard"]
    assert config.quantizer.K == 16


def test_any_other_change_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError,
        match=r"quantizer\.K=64 can't change; only trainer\.\*, logger\.\* and where things are can",
    ):
        resolve(folder, monkeypatch, "quantizer.K=64")


def test_a_setting_of_the_trainer_that_the_run_lacks_has_todays_value(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier: Any = OmegaConf.load(folder / CONFIG)
    del earlier.trainer["compile"]
    OmegaConf.save(earlier, folder / CONFIG)
    assert resolve(folder, monkeypatch).trainer.compile is False


def test_a_folder_without_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"is not a run folder .*give one such as"):
        resolve(tmp_path, monkeypatch)


@pytest.mark.parametrize("text", ["a: [", "just words", "stage: vqgan\n"])
def test_a_damaged_config_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(InputError, match=r"is damaged.*restore the file"):
        resolve(folder, monkeypatch)


def test_a_run_of_another_stage_is_refused_with_the_right_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config("stage=prior", f"resume={folder}")
    with pytest.raises(InputError, match=r"is a run of stage=vqgan; say stage=vqgan resume="):
        resolve_resumed(config, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer._target_", "os.system"), ("run", "os.system"), ("data.root", "${oc.env:HOME}")],
)
def test_a_config_that_asks_for_other_code_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    earlier: Any = OmegaConf.load(folder / CONFIG)
    OmegaConf.update(earlier, key, value, force_add=True)
    OmegaConf.save(earlier, folder / CONFIG)
    with pytest.raises(InputError, match="don't trust the file"):
        resolve(folder, monkeypatch)


def change_config(folder: Path, **changes: Any) -> None:
    """Change config.yaml; None takes an entry out."""
    earlier: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    changed = {k: v for k, v in {**earlier, **changes}.items() if v is not None}
    OmegaConf.save(OmegaConf.create(changed), folder / CONFIG)


def test_the_stamp_of_a_config_is_no_setting_of_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / CONFIG).write_text(stamp_config((folder / CONFIG).read_text()))
    assert read_stamp(folder / CONFIG).is_current
    assert STAMP not in resolve(folder, monkeypatch)
    config = compose_config("stage=vqgan")
    stamped = OmegaConf.create(stamp_config(OmegaConf.to_yaml(config, resolve=True)))
    assert config_difference(config, stamped) is None


def test_a_config_in_a_later_format_is_refused_as_such(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(folder, codegrid={"version": "0.9.0", "format": FORMAT + 1}, data=None)
    with pytest.raises(InputError, match=r"config.yaml was written by Codegrid 0.9.0.*update"):
        resolve(folder, monkeypatch)


@pytest.mark.parametrize("version", [None, "0.1.4"])
def test_an_earlier_run_with_a_class_that_is_gone_is_of_another_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    stamp = {"version": version, "format": 1} if version else None
    for change in (
        {"optimizer": {"_target_": "codegrid.engine.optimizers.Lamb"}},
        {"run": "vqgan.stages.fit.fit_tokenizer"},
        {"callbacks": {"doctor": {"_target_": "vqgan.callbacks.doctor.OldDoctor"}}},
    ):
        before = (folder / CONFIG).read_text()
        change_config(folder, codegrid=stamp, **change)
        with pytest.raises(InputError, match="was written by Codegrid 0.1.*it has no ") as refusal:
            resolve(folder, monkeypatch)
        assert "trust" not in str(refusal.value)
        (folder / CONFIG).write_text(before)


def test_single_settings_that_an_earlier_run_lacks_have_todays_value(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(folder, trust=None, id=None, objective=None, cache_dir=None)
    config = resolve(folder, monkeypatch)
    assert config.id is None
    assert config.cache_dir == "cache"
    assert config.quantizer.K == 16


OWN = {"_target_": "mydata.Mine", "n_train": 3}


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module mydata with a class Mine and a class Lion."""
    (tmp_path / "modules").mkdir()
    text = "class Mine:\n    place_settings = ('root',)\n\n\nclass Lion:\n    pass\n"
    (tmp_path / "modules" / "mydata.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.mark.usefixtures("own_module")
def test_a_run_with_ones_own_class_resumes_if_it_is_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(folder, data=OWN, trust=["mydata.Mine"])
    with pytest.raises(InputError, match=r"add trust=\[mydata.Mine\], else don't trust the file"):
        resolve(folder, monkeypatch)
    config = resolve(folder, monkeypatch, "trust=[mydata.Mine]", "trainer.max_steps=9")
    assert config.data == OWN
    assert config.trust == ["mydata.Mine"]


@pytest.mark.usefixtures("own_module")
def test_the_choice_of_ones_own_class_again_is_no_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(folder, optimizer={"_target_": "mydata.Lion", "_partial_": True, "lr": 0.5})
    config = resolve(folder, monkeypatch, "optimizer._target_=mydata.Lion")
    assert config.optimizer.lr == 0.5
    for word in ("optimizer._target_=torch.optim.SGD", "optimizer=adamw", "optimizer.lr=0.1"):
        with pytest.raises(InputError, match="can't change|asks for mydata.Lion"):
            resolve(folder, monkeypatch, word)


def test_the_command_that_resumes_a_run_trusts_its_own_classes(folder: Path) -> None:
    change_config(folder, trust=["mydata.Mine", "my.Lion"])
    words = shlex.split(resume_command(folder).removeprefix("resume with: python train.py "))
    assert words == ["stage=vqgan", f"resume={folder}", "trust=[mydata.Mine,my.Lion]"]


def test_a_run_without_a_checkpoint_is_refused_unless_it_has_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / LAST).unlink()
    with pytest.raises(InputError, match="has no checkpoint to resume from"):
        resolve(folder, monkeypatch)
    assert resolve(folder, monkeypatch, has_parts=True).quantizer.K == 16


def test_the_command_that_resumes_a_run_is_that_of_the_whole_it_belongs_to(folder: Path) -> None:
    expected = f"resume with: python train.py stage=vqgan resume={folder}"
    assert resume_command(folder) == expected
    part = folder / "tokenizer"
    part.mkdir()
    (part / CONFIG).write_text("stage: prior\n")
    assert resume_command(part) == expected


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """The folder of a run on images in /old, whose config lacks what this version has added."""
    config = compose_config("stage=vqgan", "data=folder", "data.root=/old", "cache_dir=/ram")
    OmegaConf.set_struct(config, False)
    del config.data["on_error"]
    (tmp_path / CONFIG).write_text(OmegaConf.to_yaml(config, resolve=True))
    save_atomically({"weight": torch.zeros(1)}, tmp_path / LAST)
    return tmp_path


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("++data.root=/new", "data.root", "/new"),
        ("++data.val_root=/new", "data.val_root", "/new"),
        ("cache_dir=/disk", "cache_dir", "/disk"),
        ("cache_dir=/disk", "data.cache_dir", "/disk"),
        ("data.cache_dir=/disk", "data.cache_dir", "/disk"),
        ("data.num_workers=3", "data.num_workers", 3),
        ("data.cache=none", "data.cache", "none"),
        ("data.on_error=skip", "data.on_error", "skip"),
    ],
)
def test_where_things_are_may_change(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, word: str, key: str, value: Any
) -> None:
    config = resolve(photographs, monkeypatch, word)
    assert OmegaConf.select(config, key) == value
    assert config.data._target_ == "codegrid.data.folder.Folder"
    if key != "data.root":
        assert config.data.root == "/old"


@pytest.mark.parametrize(
    "word", ["data.image_size=32", "++data.n_val=3", "data=hf", "data=mnist", "++data.shards=x"]
)
def test_which_images_a_run_has_may_not_change(
    photographs: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    with pytest.raises(InputError) as caught:
        resolve(photographs, monkeypatch, word)
    message = str(caught.value)
    assert f"{word.lstrip('+')} can't change" in message
    assert "where things are can: cache_dir, data.root, data.val_root" in message


def test_the_whole_earlier_command_may_be_repeated_with_another_place(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["data=folder", "data.root=/new", "cache_dir=/ram", "trainer.max_steps=9"]
    config = resolve(photographs, monkeypatch, *words)
    assert (config.data.root, config.trainer.max_steps) == ("/new", 9)
    with pytest.raises(InputError, match=r"data\.image_size=8 can't change"):
        resolve(photographs, monkeypatch, *words, "data.image_size=8")


def test_a_mapping_of_files_is_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_config("stage=vqgan", "data=hf", "data.path=parquet", "data.files={train: a}")
    (tmp_path / CONFIG).write_text(OmegaConf.to_yaml(config, resolve=True))
    save_atomically({"weight": torch.zeros(1)}, tmp_path / LAST)
    word = "++data.files={train: b, validation: c}"
    config = resolve(tmp_path, monkeypatch, word)
    assert config.data.files == {"train": "b", "validation": "c"}
    with pytest.raises(InputError, match=r"data\.train=all can't change"):
        resolve(tmp_path, monkeypatch, "++data.train=all")


def test_a_run_that_a_sweep_continues_has_the_places_of_the_whole_command(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["stage=vqgan", "data=folder", "data.root=/new", "data.num_workers=1"]
    monkeypatch.setattr(resume, "read_overrides", lambda: words)
    config = compose_config(*words)
    config.resume = str(photographs)
    config = resolve_resumed(config, False)
    assert (config.data.root, config.data.num_workers) == ("/new", 1)
    assert config.cache_dir == config.data.cache_dir == "cache", "conf/'s, as in the whole command"


def test_the_later_stages_of_a_pipeline_follow_a_change_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config("stage=pipeline", "trainer.accelerator=gpu", "logger=wandb")
    (tmp_path / CONFIG).write_text(OmegaConf.to_yaml(config, resolve=True))
    words = ["stage=pipeline", f"resume={tmp_path}", "trainer.accelerator=cpu", "logger=csv"]
    monkeypatch.setattr(resume, "read_overrides", lambda: words)
    config = resolve_resumed(compose_config(*words), True)
    assert config.stage2.trainer.accelerator == config.evaluate.accelerator == "cpu"
    assert list(config.stage2.logger) == ["csv"]


def test_a_prior_of_an_earlier_version_takes_places_that_it_did_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config("stage=prior", "ckpt=runs/vqgan/x", "cache_dir=/ram")
    OmegaConf.set_struct(config, False)
    config.data = {"root": None, "cache": None, "num_workers": None}
    (tmp_path / CONFIG).write_text(OmegaConf.to_yaml(config, resolve=True))
    save_atomically({"weight": torch.zeros(1)}, tmp_path / LAST)
    words = ["stage=prior", f"resume={tmp_path}", "data.val_root=/new", "trainer.accelerator=cpu"]
    monkeypatch.setattr(resume, "read_overrides", lambda: words)
    config = resolve_resumed(compose_config(*words), False)
    assert (config.data.val_root, config.data.cache_dir) == ("/new", "/ram")


def test_a_resumed_run_writes_down_where_things_are_now_and_nothing_else(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: Any = OmegaConf.load(photographs / CONFIG)
    config = resolve(photographs, monkeypatch, "++data.root=/new", "trainer.max_steps=9")
    write_places(photographs, config)
    after: Any = OmegaConf.load(photographs / CONFIG)
    assert after.data.root == "/new"
    after.data.root = "/old"
    assert after == before


@pytest.mark.parametrize("word", ["trainer=default", "seed=0", "quantizer=ema", "quantizer.K=16"])
def test_a_word_that_repeats_the_earlier_value_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    config = resolve(folder, monkeypatch, "data.image_size=64", "quantizer.K=16", word)
    assert (config.quantizer.K, config.trainer.max_steps, config.seed) == (16, 5, 0)


def test_a_group_with_other_settings_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for word in ("quantizer=fsq", "loss=vqvae", "loss/discriminator=style", "experiment=grid_by_K"):
        with pytest.raises(InputError, match=f"{word} can't change"):
            resolve(folder, monkeypatch, word)
