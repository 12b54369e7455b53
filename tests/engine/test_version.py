"""Files carry the version and the format of the program that wrote them; those of another version are named as such."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from codegrid.engine.errors import InputError
from codegrid.engine.version import (
    FORMAT,
    STAMP,
    VERSION,
    Stamp,
    check_format,
    name_version,
    refuse_version,
    stamp_config,
)
from tests.helpers.configs import ROOT

CURRENT = Stamp(VERSION, FORMAT)
EMA = "vqgan.quantizers.ema.EMA"


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"version": "0.3.0", "format": 3, "stage": "vqgan"}, Stamp("0.3.0", 3)),
        ({"format": 1}, Stamp(None, 1)),
        ({}, Stamp(None, 1)),
        (None, Stamp(None, 1)),
        ("0.3.0", Stamp(None, 1)),
        ({"version": 0.4, "format": "two"}, Stamp("0.4", 1)),
        (OmegaConf.create({"version": VERSION, "format": FORMAT}), CURRENT),
    ],
)
def test_a_stamp_is_read_from_whatever_a_file_has(node: Any, expected: Stamp) -> None:
    assert Stamp.read(node) == expected


def test_a_file_without_a_version_is_of_the_versions_that_wrote_none() -> None:
    assert str(Stamp()) == "Codegrid 0.1 or earlier"
    assert str(Stamp("0.3.0", 3)) == "Codegrid 0.3.0"
    assert not Stamp().is_current
    assert CURRENT.is_current
    assert not Stamp("0.1.9", FORMAT).is_current


def test_a_config_begins_with_its_stamp_and_stays_as_it_was() -> None:
    written = OmegaConf.create(stamp_config("stage: vqgan\nseed: 0\n"))
    assert Stamp.read(written.pop(STAMP)) == CURRENT
    assert written == {"stage": "vqgan", "seed": 0}


@pytest.mark.parametrize("version", [None, "0.9.1"])
def test_a_newer_format_is_refused_with_the_numbers_of_both(version: str | None) -> None:
    with pytest.raises(InputError) as refusal:
        check_format("x.ckpt", Stamp(version, FORMAT + 2))
    sentence = str(refusal.value)
    assert (
        f"has format {FORMAT + 2}, this program reads up to {FORMAT}; update Codegrid" in sentence
    )
    assert ("Codegrid 0.9.1" in sentence) == (version is not None)
    check_format("x.ckpt", CURRENT)
    check_format("x.ckpt", Stamp())


@pytest.mark.parametrize(
    "settings",
    [
        {"_target_": EMA, "K": 8},  # lacks what a later version added
        {
            "_target_": "codegrid.engine.clock.Schedule",
            "warmup": 1,
            "floor": 0.1,
            "shape": "linear",
        },
        {"_target_": EMA, "K": 8, "inner": {"_target_": "vqgan.quantizers.entropy.Entropy"}},
    ],
)
def test_settings_of_another_version_are_named_as_such(settings: dict[str, Any]) -> None:
    with (
        pytest.raises(InputError, match=r"a\.ckpt was written by Codegrid 0\.1 or earlier"),
        name_version("a.ckpt", Stamp()),
    ):
        instantiate(settings)
    with (
        pytest.raises(InputError, match=r"the checkpoint has other settings than Codegrid"),
        name_version("the checkpoint", None),
    ):
        instantiate(settings)


def test_errors_that_have_nothing_to_do_with_versions_pass() -> None:
    with pytest.raises(Exception, match="missing") as failure, name_version("a.ckpt", CURRENT):
        instantiate({"_target_": EMA, "K": 8})
    assert not isinstance(failure.value, InputError)
    with pytest.raises(KeyError), name_version("a.ckpt", Stamp()):
        raise KeyError("x")


def test_a_key_that_an_earlier_config_lacks_is_named_with_its_version() -> None:
    config = OmegaConf.create({"stage": "vqgan"})
    OmegaConf.set_struct(config, True)
    with (
        pytest.raises(InputError, match="written by Codegrid 0.1.*Key 'id'"),
        name_version("c", Stamp()),
    ):
        str(config.id)


def test_the_sentence_of_another_version_says_who_wrote_the_file_and_what_to_do() -> None:
    sentence = str(refuse_version("a/last.ckpt", Stamp("0.7.0", 2), "it has no vqgan.x.X"))
    assert "a/last.ckpt was written by Codegrid 0.7.0" in sentence
    assert f"this program is {VERSION}: it has no vqgan.x.X" in sentence
    assert "or train again" in sentence
    assert "damaged" not in sentence
    assert "trust" not in sentence


def test_the_sentence_of_another_version_names_the_commit_that_reads_the_file(
    tmp_path: Path,
) -> None:
    starts = [{"git": "1111111"}, {"git": "2222222-dirty"}, {"git": None}]
    lines = "\n".join(json.dumps(start) for start in starts[:2])
    (tmp_path / "record.jsonl").write_text(lines)
    for source in (tmp_path, tmp_path / "config.yaml", tmp_path / "checkpoints" / "last.ckpt"):
        sentence = str(refuse_version(source, Stamp(), "it lacks x"))
        assert "use the version that wrote it (git checkout 2222222), or train again" in sentence
    (tmp_path / "record.jsonl").write_text(json.dumps(starts[2]))
    sentence = str(refuse_version(tmp_path, Stamp(), "it lacks x"))
    assert "(card.md in its run folder names the revision)" in sentence


def test_the_package_has_the_version_of_the_program() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic["version"] == {"attr": "codegrid.engine.version.VERSION"}
