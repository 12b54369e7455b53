"""Tokenizer.from_pretrained: runs, exports, weights of other programs and hub ids give the same tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.engine.errors import InputError
from tests.helpers.exports import PYRAMID, export_folder
from tests.helpers.hub_server import TOKEN, HubServer
from tests.helpers.public import PUBLIC, read_arrays
from tests.helpers.runs import save_tokenizer_run
from vqgan.formats.files import open_public
from vqgan.tokenizer import Tokenizer

DIFFUSERS = [*PYRAMID, "model.start=random", "quantizer=ema"]


def list_files(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@torch.no_grad()
def assert_same(tokenizer: Tokenizer, expected: Tokenizer) -> None:
    assert not tokenizer.training
    x = torch.rand(2, expected.encoder.channels, 16, 16) * 2 - 1
    q, other = expected.encode(x), tokenizer.encode(x)
    assert torch.equal(other.indices, q.indices)
    assert torch.equal(tokenizer.decode(other.z_q), expected.decode(q.z_q))
    assert tokenizer.grid == expected.grid


@pytest.mark.parametrize(
    ("words", "formats", "inner"),
    [
        (["quantizer=residual"], "safetensors", ""),
        (DIFFUSERS, "safetensors,diffusers", ""),
        (DIFFUSERS, "diffusers", ""),
        (["quantizer=fsq"], "safetensors", "model.safetensors"),
        (["data.channels=1", "quantizer.cosine=true"], "safetensors", ""),
    ],
)
def test_an_export_is_read_back_to_the_bit(
    words: list[str], formats: str, inner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = export_folder(tmp_path / "photos", *words, formats=formats)
    assert_same(Tokenizer.from_pretrained(tmp_path / "photos" / inner), expected)
    assert capsys.readouterr().err == ""


def test_images_are_read_as_in_the_training_of_an_export(tmp_path: Path) -> None:
    pixels = np.full((16, 16, 4), 40, np.uint8)
    pixels[:, 8:, :3] = 90
    pixels[..., 3] = 10
    codes = []
    for alpha in ("white", "ignore"):
        torch.manual_seed(0)  # the same weights
        expected = export_folder(tmp_path / alpha, alpha=alpha)
        tokenizer = Tokenizer.from_pretrained(tmp_path / alpha)
        expected.rules = tokenizer.rules
        assert tokenizer.rules.alpha == alpha
        codes.append(tokenizer.encode_images(pixels))
    opaque = Tokenizer.from_pretrained(tmp_path / "white").encode_images(pixels[..., :3])
    assert torch.equal(codes[1], opaque)
    assert not torch.equal(codes[0], opaque)


def test_an_export_that_says_no_reading_reads_as_always(tmp_path: Path) -> None:
    export_folder(tmp_path / "photos")
    facts = json.loads((tmp_path / "photos" / "config.json").read_text())
    del facts["reading"]
    (tmp_path / "photos" / "config.json").write_text(json.dumps(facts))
    assert Tokenizer.from_pretrained(tmp_path / "photos").rules.alpha == "white"


@pytest.mark.parametrize("as_file", [False, True])
def test_a_run_is_read_as_before(as_file: bool, tmp_path: Path) -> None:
    expected, _ = save_tokenizer_run(tmp_path / "run")
    source = tmp_path / "run" / ("checkpoints/last.ckpt" if as_file else "")
    assert_same(Tokenizer.from_pretrained(source), expected)


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("taming_vq/last.ckpt", {}),
        ("maskgit_vqgan", {}),
        ("open_muse", {}),
        ("vq_diffusion", {}),
        ("movqgan/movqgan_tiny.ckpt", {}),
        ("open_magvit2/tiny.ckpt", {"ema": False}),
        ("ibq/tiny.ckpt", {"ema": False, "config": PUBLIC / "ibq" / "tiny.yaml"}),
        ("diffusers_vq", {"image_size": 32}),
        ("diffusers_vq_bin", {"image_size": 32, "pixels": (-1, 1)}),
        ("llamagen/vq_tiny.pt", {"image_size": 32, "cosine": True}),
    ],
)
@torch.no_grad()
def test_weights_of_other_programs_need_no_import(source: str, settings: dict[str, Any]) -> None:
    path = PUBLIC / source
    tokenizer = Tokenizer.from_pretrained(path, **settings)
    arrays = path / "reference.npz" if path.is_dir() else path.with_suffix(".npz")
    reference = read_arrays(arrays)
    x = reference["images"]  # in the range of its networks
    x = 2 * x - 1 if tokenizer.pixels == (0, 1) else x
    assert torch.equal(tokenizer.indices(x), reference["indices"])
    assert tokenizer.encoder.image_size == (32, 32)
    uint8 = Image.new("RGB", (50, 40))
    assert tokenizer.encode_images(uint8).shape[1:3] == tokenizer.grid


def test_what_was_assumed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Tokenizer.from_pretrained(PUBLIC / "diffusers_vq", image_size=32)
    assert "pixels=[0,1] is the other reading" in capsys.readouterr().err
    Tokenizer.from_pretrained(PUBLIC / "diffusers_vq", image_size=32, pixels=(-1, 1))
    assert capsys.readouterr().err == ""


def test_a_size_that_nobody_says_is_not_guessed() -> None:
    """diffusers' config says sample_size=32, the default that aMUSEd's has for images of 256 pixels too."""
    for name in ("diffusers_vq", "llamagen/vq_tiny.pt"):
        with pytest.raises(InputError, match=r"does not say the size of its .*; add image_size="):
            Tokenizer.from_pretrained(PUBLIC / name)
    with pytest.raises(InputError, match=r"image_size=31 is not divisible by f=2"):
        Tokenizer.from_pretrained(PUBLIC / "diffusers_vq", image_size=31)


@pytest.mark.parametrize("formats", ["safetensors", "diffusers"])
def test_a_repository_is_read_by_its_name(
    formats: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = export_folder(tmp_path / "local", *DIFFUSERS, formats=formats)
    hub.add("ann/photos", list_files(tmp_path / "local"), private=True)
    assert_same(Tokenizer.from_pretrained("ann/photos"), expected)
    downloads = [line for line in hub.log if line.startswith("GET /ann")]
    assert {Path(line).name for line in downloads} <= {
        "README.md", "config.json", "config.yaml", "metrics.json", "preprocessor_config.json", "model.safetensors",
        "diffusion_pytorch_model.safetensors",
    }  # fmt: skip


def test_a_revision_is_a_branch_a_tag_or_a_commit(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = export_folder(tmp_path / "old", "quantizer=fsq")
    new = export_folder(tmp_path / "new", "quantizer=vq")
    repository = hub.add("ann/photos", list_files(tmp_path / "old"))
    first = repository.refs["v1"] = repository.refs["main"]
    repository.commit(list_files(tmp_path / "new"))
    assert_same(Tokenizer.from_pretrained("ann/photos"), new)
    for revision in ("v1", first):
        assert_same(Tokenizer.from_pretrained("ann/photos", revision=revision), old)
    assert open_public("ann/photos", None, None, "v1").origin.endswith(f"@{first}")
    with pytest.raises(InputError, match=r"ckpt=ann/photos is no .* the hub does not give it"):
        Tokenizer.from_pretrained("ann/photos", revision="v2")
    with pytest.raises(InputError, match=r"revision=v1 is of a .* and from=old is here; leave"):
        open_public("old", None, None, "v1")


def test_without_a_network_the_copy_in_the_cache_is_used(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    old = export_folder(tmp_path / "old", "quantizer=fsq")
    repository = hub.add("ann/photos", list_files(tmp_path / "old"))
    commit = repository.refs["main"]
    Tokenizer.from_pretrained("ann/photos")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert_same(Tokenizer.from_pretrained("ann/photos"), old)
    assert_same(Tokenizer.from_pretrained("ann/photos", revision=commit), old)
    assert f"ann/photos is the copy of commit {commit} in the cache" in capsys.readouterr().err
    for name, revision in (("ann/other", None), ("ann/photos", "v1")):
        with pytest.raises(InputError, match=r"the hub does not give it \(ConnectError: "):
            Tokenizer.from_pretrained(name, revision=revision)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    repository.commit({**repository.commits[commit], "more": b""})
    Tokenizer.from_pretrained("ann/photos")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"the cache has 2 commits of it; choose one with revis"):
        Tokenizer.from_pretrained("ann/photos")
    assert_same(Tokenizer.from_pretrained("ann/photos", revision=commit), old)


def test_a_repository_that_is_not_to_be_read_is_a_sentence(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("ann/photos", {"config.json": b"{}"}, private=True)
    monkeypatch.setenv("HF_TOKEN", f"not-{TOKEN}")
    for name in ("ann/photos", "ann/none"):
        with pytest.raises(InputError, match=f"ckpt={name} is no file or folder here") as refusal:
            Tokenizer.from_pretrained(name)
        assert "\n" not in str(refusal.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(InputError, match="ann/photos has no weights"):
        Tokenizer.from_pretrained("ann/photos")


def test_mistakes_are_one_sentence_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tokenizer_run(tmp_path / "run")
    export_folder(tmp_path / "out", "quantizer=fsq")
    shutil.copytree(tmp_path / "out", tmp_path / "onnx")
    (tmp_path / "onnx" / "model.safetensors").unlink()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").touch()
    for source, settings, sentence in [
        ("nowhere", {}, "ckpt=nowhere does not exist; give a file, a folder, or a hub id"),
        ("./a/b", {}, "ckpt=./a/b does not exist"),
        ("run", {"revision": "v1"}, "revision=v1 is of a repository on the hub, and ckpt=run is a"),
        ("out", {"revision": "v1"}, "revision=v1 is of a repository on the hub, and ckpt=out is"),
        ("run", {"image_size": 8}, "image_size=8 is for weights of other programs, and ckpt=run"),
        ("out", {"pixels": (0, 1)}, "can't be chosen"),
        ("out", {"image_size": 18}, "takes a multiple of 4; use data.image_size=16"),
        ("onnx", {}, "ckpt=onnx is an export without weights that can be read back"),
        ("begun", {}, "ckpt=begun has no checkpoint"),
        ("run", {"trust": ["os.system"]}, "trust=os.system is part of Python itself"),
    ]:
        with pytest.raises(InputError) as refusal:
            Tokenizer.from_pretrained(source, **settings)  # type: ignore[arg-type]
        assert sentence in str(refusal.value)


def test_a_class_of_the_users_own_is_admitted_by_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_of_trust.py").write_text(
        "from vqgan.quantizers.vq import VQ\nclass Mine(VQ):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    expected, _ = save_tokenizer_run(tmp_path / "run", "quantizer=vq")
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    content["codegrid"]["config"]["quantizer"]["_target_"] = "mine_of_trust.Mine"
    torch.save(content, file)
    with pytest.raises(InputError, match=r"add trust=\[mine_of_trust\.Mine\]"):
        Tokenizer.from_pretrained(tmp_path / "run")
    assert_same(Tokenizer.from_pretrained(tmp_path / "run", trust=["mine_of_trust.Mine"]), expected)
