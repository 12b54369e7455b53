"""Weights on the hub, with a hub that lies in a folder."""

import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from codegrid.engine.errors import InputError
from vqgan.formats.files import open_public

PUBLIC = Path(__file__).parents[2] / "fixtures" / "public"


class FakeHub(ModuleType):
    """The two calls of huggingface_hub that are used, on a folder of repositories; notes what is downloaded."""

    def __init__(self, root: Path) -> None:
        super().__init__("huggingface_hub")
        self.root = root
        self.downloads: list[str] = []

    def HfApi(self) -> "FakeHub":
        return self

    def model_info(self, repository: str) -> SimpleNamespace:
        folder = self.root / repository
        if not folder.is_dir():
            raise ConnectionError("404 Client Error\nRepository Not Found")
        files = [
            file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
        ]
        siblings = [SimpleNamespace(rfilename=name) for name in files]
        return SimpleNamespace(sha="abc123", siblings=siblings)

    def hf_hub_download(self, repository: str, name: str, revision: str) -> str:
        assert revision == "abc123"
        self.downloads.append(name)
        return str(self.root / repository / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return hub


def test_a_repository_is_read_and_only_what_is_needed_is_downloaded(hub: FakeHub) -> None:
    folder = hub.root / "owner" / "pipeline"
    shutil.copytree(PUBLIC / "diffusers_vq", folder / "vqvae")
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "unet").mkdir()
    (folder / "unet" / "model.safetensors").write_bytes(b"large")
    contents = open_public("owner/pipeline", None, None)
    weights = "vqvae/diffusion_pytorch_model.safetensors"
    assert contents.origin == f"hub:owner/pipeline/{weights}@abc123"
    assert contents.licence == "mit"
    assert contents.file.target == "VQModel"
    assert hub.downloads == [weights, "vqvae/config.json", "README.md"]


def test_of_several_files_one_has_to_be_named(hub: FakeHub) -> None:
    folder = hub.root / "owner" / "llamagen"
    folder.mkdir(parents=True)
    for name in ("vq_tiny.pt", "training.pt"):
        shutil.copy(PUBLIC / "llamagen" / name, folder)
    with pytest.raises(
        InputError, match=r"give one .*: owner/llamagen/training\.pt, owner/llamagen/vq_tiny\.pt"
    ):
        open_public("owner/llamagen", None, None)
    assert hub.downloads == []
    assert len(open_public("owner/llamagen/vq_tiny.pt", None, None).file.tensors) == 184
    with pytest.raises(InputError, match=r"owner/llamagen/vq\.pt has no weights"):
        open_public("owner/llamagen/vq.pt", None, None)


def test_a_repository_that_the_hub_does_not_give_is_one_sentence(hub: FakeHub) -> None:
    with pytest.raises(
        InputError,
        match=r"from=owner/none is no file or folder here, and .* give the path of a copy$",
    ) as refusal:
        open_public("owner/none", None, None)
    assert "\n" not in str(refusal.value)


def test_without_the_library_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r'huggingface_hub; pip install "codegrid\[hf\]"'):
        open_public("owner/model", None, None)


def test_a_local_folder_comes_before_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(PUBLIC / "diffusers_vq", tmp_path / "owner" / "model")
    contents = open_public("owner/model", None, None)
    assert contents.origin == str(
        tmp_path / "owner" / "model" / "diffusion_pytorch_model.safetensors"
    )
    assert hub.downloads == []
