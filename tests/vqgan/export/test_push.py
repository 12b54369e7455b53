"""Exports on a hub: what is pushed, what is refused, and that the folder stays. The library is real, the hub is on this machine."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from codegrid.engine.errors import InputError
from tests.helpers.commands import Command, read_mistake
from tests.helpers.configs import ROOT
from tests.helpers.exports import export_folder
from tests.helpers.hub_server import GIT_ATTRIBUTES, TOKEN, HubServer
from vqgan.export.folder import CHECKSUMS
from vqgan.export.push import Destination, Push, explain_failure, list_pushed, read_export

RUN = ROOT / "tests" / "fixtures" / "run_of_0_1" / "tokenizer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export with what may lie in its folder later."""
    export_folder(tmp_path / "photos")
    (tmp_path / "photos" / "__pycache__").mkdir()
    (tmp_path / "photos" / "__pycache__" / "decoder.pyc").touch()
    (tmp_path / "photos" / "LICENSE").write_text("mine")
    return tmp_path / "photos"


def push(folder: Path, name: str = "ann/photos", **settings: Any) -> dict[str, str]:
    destination = Destination.read(name, **{"private": None, "replace": False, **settings})
    assert destination is not None
    return Push(folder, destination).run()


def read_remote(hub: HubServer, name: str = "ann/photos") -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.refs["main"]]


def list_writes(hub: HubServer) -> list[str]:
    return [line for line in hub.log if "/commit/" in line or "/create" in line]


@pytest.mark.parametrize("private", [None, True, False])
def test_a_new_repository_gets_the_files_of_the_export_in_one_commit(
    private: bool | None, hub: HubServer, folder: Path
) -> None:
    pushed = push(folder, private=private)
    repository = hub.repositories["ann/photos"]
    assert repository.private == bool(private)
    assert len(repository.commits) == 2  # the first is the hub's own
    files = read_remote(hub)
    assert files.pop(GIT_ATTRIBUTES) == b""
    assert {"README.md", "LICENSE", "config.json", "model.safetensors", CHECKSUMS} <= files.keys()
    assert files == {name: (folder / name).read_bytes() for name in files}
    assert not [name for name in files if "pyc" in name or name in ("config.yaml", "metrics.json")]
    for line in files[CHECKSUMS].decode().splitlines():
        checksum, name = line.split("  ")
        assert hashlib.sha256(files[name]).hexdigest() == checksum
    assert pushed == {
        "repository": "ann/photos",
        "url": f"{hub.url}/ann/photos",
        "commit": repository.refs["main"],
    }


def test_an_export_that_is_there_already_is_not_pushed_again(hub: HubServer, folder: Path) -> None:
    first = push(folder)
    assert push(folder) == first
    assert len(list_writes(hub)) == 2


def test_an_empty_repository_is_filled_without_replacing(hub: HubServer, folder: Path) -> None:
    hub.add("ann/photos", {})
    push(folder)
    assert "model.safetensors" in read_remote(hub)


def test_files_on_the_hub_are_replaced_only_on_demand_and_all_at_once(
    hub: HubServer, folder: Path
) -> None:
    before = hub.add("ann/photos", {"README.md": b"theirs", "old.bin": b"1"}).refs["main"]
    with pytest.raises(
        InputError,
        match=r"it has files already \(README.md, old.bin\); replace=true .*resume=\S+photos hub=ann/photos replace=true$",
    ):
        push(folder)
    assert not list_writes(hub)
    push(folder, replace=True)
    assert read_remote(hub).keys() == {GIT_ATTRIBUTES, *list_pushed(folder)}
    assert read_remote(hub)["README.md"] == (folder / "README.md").read_bytes()
    assert hub.repositories["ann/photos"].commits[before]["old.bin"] == b"1"


def test_an_edited_card_needs_replace_too(hub: HubServer, folder: Path) -> None:
    push(folder)
    with (folder / "README.md").open("a") as card:
        card.write("More.\n")
    with pytest.raises(InputError, match="it has files already"):
        push(folder)
    push(folder, replace=True)
    assert read_remote(hub)["README.md"].endswith(b"More.\n")


@pytest.mark.parametrize("is_private", [True, False])
def test_privacy_of_a_repository_that_exists_is_not_assumed(
    is_private: bool, hub: HubServer, folder: Path
) -> None:
    hub.add("ann/photos", {}, private=is_private)
    word = str(not is_private).lower()
    with pytest.raises(
        InputError, match=rf"private={word} is for a new .*resume=\S+ hub=ann/photos$"
    ):
        push(folder, private=not is_private)
    push(folder, private=is_private)


@pytest.mark.parametrize(
    ("token", "name", "reason"),
    [
        ("", "ann/photos", "no token of the hub is stored here"),
        ("wrong", "ann/photos", "the hub does not know the token"),
        (None, "bob/photos", "the token may not write there"),
    ],
)
def test_a_refusal_of_the_hub_is_a_sentence_and_the_folder_stays(
    token: str | None,
    name: str,
    reason: str,
    hub: HubServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        InputError,
        match=rf"photos is written and stays, and is not pushed to hub={name}: {reason}.*; push it with: python train.py "
        rf"stage=export resume=\S+photos hub={name}$",
    ) as refusal:
        push(folder, name)
    assert "\n" not in str(refusal.value)
    assert list_pushed(folder)
    assert not hub.repositories


@pytest.mark.parametrize("ending", ["/commit/main", "/validate-yaml", "/api/models/ann/photos"])
def test_an_answer_that_fails_leaves_no_half_a_push(
    ending: str, hub: HubServer, folder: Path
) -> None:
    hub.broken[ending] = 422
    with pytest.raises(InputError, match="photos is written and stays, and is not pushed"):
        push(folder)
    hub.broken.clear()
    push(folder)
    assert len(hub.repositories["ann/photos"].commits) == 2


def test_without_a_network_the_sentence_says_so(hub: HubServer, folder: Path) -> None:
    from huggingface_hub import constants

    hub.server_close()
    with pytest.raises(InputError, match=r"the hub can't be reached \([A-Z]\w+Error: "):
        push(folder)
    constants.HF_HUB_OFFLINE, before = True, constants.HF_HUB_OFFLINE
    try:
        with pytest.raises(InputError, match=r"the hub can't be reached \(.*offline mode"):
            push(folder)
    finally:
        constants.HF_HUB_OFFLINE = before


def test_a_commit_of_somebody_else_meanwhile_is_a_sentence(hub: HubServer, folder: Path) -> None:
    hub.add("ann/photos", {})
    mine = Push(folder, Destination("ann/photos", None, False))
    info = mine._open_repository()
    hub.repositories["ann/photos"].commit({"theirs": b""})
    with pytest.raises(InputError, match="somebody committed to it at this moment"):
        mine._commit(list_pushed(folder), [], info.sha)
    assert read_remote(hub) == {"theirs": b""}


def test_a_changed_file_is_not_pushed(hub: HubServer, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(InputError, match=r"model\.safetensors is not what the export wrote"):
        push(folder)
    assert not hub.log


def test_ctrl_c_says_how_to_push_later(
    folder: Path,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Push, "_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        push(folder, private=True)
    assert "was not pushed; push it with: python train.py stage=export" in capsys.readouterr().err
    assert list_pushed(folder)


@pytest.mark.parametrize(
    "name",
    ["photos", "ann/", "ann/a b", "ann/a--b", "ann/a..b", "ann/-a", "ann/a-", "ann-/a", "ann/a.git", "a/b/c", "ann/é", 12,
     "ann/" + "a" * 97, "https://huggingface.co/ann/a"],
)  # fmt: skip
def test_a_name_that_the_hub_has_not_is_refused_before_anything(name: Any) -> None:
    from huggingface_hub.utils import validate_repo_id

    with pytest.raises(InputError, match=r"must be owner/name, each of letters"):
        Destination.read(name, None, False)
    if name not in ("photos", "ann/", "ann/é"):  # which the library leaves to the hub
        with pytest.raises(ValueError, match=r".+"):
            validate_repo_id(name)


@pytest.mark.parametrize("name", ["ann/photos", "Ann_B/p.1-x_", "0/9", "ann/" + "a" * 96])
def test_names_of_the_hub_are_admitted(name: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(name)
    assert Destination.read(name, None, False) == Destination(name, None, False)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"private": "yes"}, "private=yes must be true, false or null"),
        ({"replace": None}, "replace=None must be true or false"),
        ({"private": True}, "private=true is about a repository; add hub="),
        ({"replace": True}, "replace=true is about a repository; add hub="),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Destination.read(None, **{"private": None, "replace": False, **settings})
    assert Destination.read(None, None, False) is None


def test_without_the_library_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r'hub=ann/a needs .*; pip install "codegrid\[hf\]"$'):
        Destination.read("ann/a", None, False)


def test_an_error_of_the_library_keeps_its_words() -> None:
    assert (
        explain_failure(ValueError("Invalid metadata in README.md"))
        == "Invalid metadata in README.md"
    )


def test_what_is_no_export_is_not_pushed_later(folder: Path) -> None:
    assert read_export(folder, "nowhere")["run"] == str(folder)
    with pytest.raises(InputError, match=r"is an export of another run than ckpt="):
        read_export(folder, str(RUN))
    (folder / CHECKSUMS).unlink()
    with pytest.raises(InputError, match=r"is no whole export, for \S+SHA256SUMS is missing"):
        read_export(folder, "nowhere")


@pytest.mark.slow
def test_the_command_exports_first_and_pushes_later_what_it_has_written(
    command: Command, tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first = ("stage=export", f"ckpt={RUN}", "run_dir=out")
    assert command(*first, "hub=ann--x") == 2
    assert "hub=ann--x must be owner/name" in read_mistake(capsys)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_TOKEN", "")
    assert command(*first, "hub=ann/photos") == 2
    assert "python train.py stage=export resume=out hub=ann/photos" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert command("stage=export", "resume=out", "format=onnx") == 2
    assert "holds a run with format=safetensors" in read_mistake(capsys)
    assert command("stage=export", "resume=out", "hub=ann/other", "private=true") == 0
    pushed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert pushed["hub"]["repository"] == "ann/other"
    assert hub.repositories["ann/other"].private
    assert {file: file.read_bytes() for file in before} == before
    assert command(*first, "hub=ann/photos") == 2
    assert "run_dir=out exists and is not empty" in read_mistake(capsys)
    assert command("stage=export", "resume=out", "hub=null") == 2
    assert "resume=out is a whole export; add hub=" in read_mistake(capsys)
