"""Settings that are text stay text, and `~` is the home folder in all paths."""

import inspect
import os
import typing
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from codegrid.engine.aliases import upgrade_config, upgrade_names
from codegrid.engine.errors import InputError
from codegrid.engine.texts import expand_home, is_text, normalise_texts
from tests.helpers.configs import ROOT, compose_config, list_options
from tests.helpers.parts import defaults_by_target

CHOICES = {  # texts of which there are only a few
    "crop", "cache", "on_error", "held_out", "start", "net", "norm", "inner", "mode", "kind", "loss", "distance", "order",
}  # fmt: skip


def normalised(**settings: Any) -> dict[str, Any]:
    config = OmegaConf.create(settings)
    normalise_texts(config)
    plain: Any = OmegaConf.to_container(config, resolve=False)
    return dict(plain)


def test_numbers_in_files_become_texts() -> None:
    assert normalised(name=7, run_dir=5, sweep=2024, seed=3, id=1e5) == {
        "name": "7",
        "run_dir": "5",
        "sweep": "2024",
        "seed": 3,
        "id": "100000.0",
    }
    assert normalised(data={"root": 2024, "n_val": 5}) == {"data": {"root": "2024", "n_val": 5}}
    wandb = {"project": 2026, "group": True, "tags": [1, "a"]}
    assert normalised(logger={"wandb": wandb}) == {
        "logger": {"wandb": {"project": "2026", "group": "true", "tags": ["1", "a"]}}
    }
    assert normalised(evaluate={"compare_to": 7}) == {"evaluate": {"compare_to": "7"}}


def test_samples_are_a_number_or_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert normalised(samples=16, evaluate={"samples": 0}) == {
        "samples": 16,
        "evaluate": {"samples": 0},
    }
    assert normalised(samples="~/a.npz", reference="~/b.npz") == {
        "samples": "/home/me/a.npz",
        "reference": "/home/me/b.npz",
    }
    assert normalised(reference=7, rounding=None) == {"reference": "7", "rounding": None}


def test_from_is_a_file_at_the_top_alone() -> None:
    settings = normalised(**{"from": "~x", "quantizer": {"from": 0.1, "inner": {"from": 0}}})
    assert settings["quantizer"] == {"from": 0.1, "inner": {"from": 0}}
    assert normalised(**{"from": 7}) == {"from": "7"}


def test_null_stays_and_false_is_no_file() -> None:
    assert normalised(name=None, resume=False, ckpt=None) == {
        "name": None,
        "resume": None,
        "ckpt": None,
    }
    assert normalised(name=False) == {"name": "false"}


def test_references_stay_unresolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    settings = normalised(
        cache_dir="~/c", data={"cache_dir": "${cache_dir}", "root": "a/${x}"}, x=1
    )
    assert settings["data"] == {"cache_dir": "${cache_dir}", "root": "a/${x}"}


def test_references_to_numbers_and_to_home_are_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    settings = normalised(seed=0, place="~/p", name="${seed}", run_dir="${seed}", ckpt="${place}/a")
    assert (settings["name"], settings["run_dir"], settings["ckpt"]) == ("0", "0", "/home/me/p/a")
    assert normalised(name="${missing}") == {"name": "${missing}"}, "OmegaConf reports it"


def test_home_is_expanded_in_all_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for key in ("ckpt", "resume", "run_dir", "cache_dir", "compare_to", "features", "runs"):
        assert normalised(**{key: "~/x"}) == {key: "/home/me/x"}
    for group, name in (
        ("data", "root"),
        ("data", "val_root"),
        ("data", "path"),
        ("sampler", "init_image"),
    ):
        assert normalised(**{group: {name: "~/x"}}) == {group: {name: "/home/me/x"}}
    assert normalised(runs=["~/a", "b"]) == {"runs": ["/home/me/a", "b"]}
    files = {"train": "~/a.tar", "validation": "b.tar"}
    assert normalised(data={"files": files}) == {
        "data": {"files": {"train": "/home/me/a.tar", "validation": "b.tar"}}
    }
    assert normalised(name="~") == {"name": "~"}  # no path


def test_a_file_whose_name_begins_with_a_tilde_is_not_taken_for_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("~backup-of-nobody/x") == os.path.abspath("~backup-of-nobody/x")
    assert expand_home("./~") == os.path.abspath("~")
    assert expand_home("a/~") == "a/~"
    assert expand_home("s3://bucket/~x") == "s3://bucket/~x"


def test_a_list_where_one_text_belongs_is_refused() -> None:
    with pytest.raises(InputError, match="takes one text"):
        normalised(name=["a", "b"])
    with pytest.raises(InputError, match="takes one text"):
        normalised(sampler={"init_image": {"a": 1}})
    assert normalised(runs=["a"], data={"root": ["a", "b"]}) == {
        "runs": ["a"],
        "data": {"root": ["a", "b"]},
    }


def test_configs_of_earlier_runs_get_texts_and_metrics_do_not() -> None:
    assert upgrade_config({"name": 7, "data": {"root": 2024}}) == {
        "name": "7",
        "data": {"root": "2024"},
    }
    assert upgrade_names({"runs": 12, "id": 3}) == {"runs": 12, "id": 3}
    config = upgrade_config(OmegaConf.create({"seed": 0, "data": {"seed": "${seed}", "root": 5}}))
    assert config.data.root == "5"
    assert OmegaConf.to_container(config, resolve=False)["data"]["seed"] == "${seed}"  # type: ignore[index,call-overload]


@pytest.mark.parametrize("stage", list_options("stage"))
def test_every_stage_keeps_its_config(stage: str) -> None:
    config = compose_config(f"stage={stage}")
    before = OmegaConf.to_container(config, resolve=False)
    normalise_texts(config)
    assert OmegaConf.to_container(config, resolve=False) == before


def is_textual(annotation: Any) -> bool:
    """Whether an annotation allows text but no number."""
    parts = {annotation, *typing.get_args(annotation)}
    return str in parts and not parts & {int, float, bool}


def test_every_textual_setting_of_datasets_and_loggers_is_declared() -> None:
    for file in [*(ROOT / "conf/data").glob("*.yaml"), *(ROOT / "conf/logger").glob("*.yaml")]:
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        group, settings = "data", content
        if file.parent.name == "logger":
            [(name, settings)] = content.items()
            group = f"logger.{name}"
        hints = typing.get_type_hints(get_object(settings["_target_"]).__init__)
        if inspect.isfunction(get_object(settings["_target_"])):
            hints = typing.get_type_hints(get_object(settings["_target_"]))
        for key in settings.keys() & hints.keys() - CHOICES:
            if is_textual(hints[key]):
                assert is_text(f"{group}.{key}"), f"{file.name}: {key}"
    assert defaults_by_target()
