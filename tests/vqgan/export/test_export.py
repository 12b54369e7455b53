"""stage=export: the folder, its card and its facts, and the sentences of what can't be exported."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from codegrid.engine.errors import InputError
from codegrid.engine.folder import CONFIG
from tests.helpers.commands import Command, read_mistake
from tests.helpers.configs import ROOT
from tests.helpers.exports import PYRAMID, make_trained
from tests.helpers.runs import save_tokenizer_run
from vqgan.export.base import compare_codes, compare_pictures, draw_images, serves_any_size
from vqgan.export.card import describe_licence, write_readme
from vqgan.export.discover import choose_exporters, list_exporters
from vqgan.export.folder import CHECKSUMS
from vqgan.export.origin import Origin
from vqgan.export.safetensors import load_decoder
from vqgan.export.writing import describe_images_for
from vqgan.load import load_tokenizer

RUN = ROOT / "tests" / "fixtures" / "run_of_0_1" / "tokenizer"


def read_metadata(readme: str) -> dict[str, object]:
    _, metadata, _ = readme.split("---\n", 2)
    return dict(yaml.safe_load(metadata))


@pytest.mark.slow
def test_an_export_has_weights_facts_a_card_pictures_and_checksums(
    command: Command, tmp_path: Path
) -> None:
    assert command("stage=export", f"ckpt={RUN}", "licence=cc-by-4.0", "run_dir=out") == 0
    folder = tmp_path / "out"
    lines = (folder / CHECKSUMS).read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)  # type: ignore[misc]
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} - {
        CHECKSUMS
    }
    assert listed == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files
    }
    assert files >= {
        "README.md",
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "decoder.py",
        CONFIG,
    }
    readme = (folder / "README.md").read_text()
    assert read_metadata(readme)["license"] == "cc-by-4.0"
    for text in (
        "| psnr | 17.72 |",
        "shapes, 64 to train on",
        "git checkout 8d470c7",
        "python train.py stage=vqgan data.n_train=64",
    ):
        assert text in readme
    for picture in ("reconstructions", "histogram", "atlas"):
        assert f"](pictures/{picture}-000006.png)" in readme
        assert f"pictures/{picture}-000006.png" in files
    tokenizer, _ = load_tokenizer(RUN)
    indices = torch.randint(tokenizer.K, (2, 4, 4, 2))
    decoded = load_decoder(folder / "decoder.py").PictureDecoder(folder)(indices)
    assert torch.equal(decoded, tokenizer.decode_indices(indices).clamp(-1, 1))
    assert not list(tmp_path.glob(".export*"))


@pytest.mark.slow
@torch.no_grad()
def test_an_export_in_several_formats_is_imported_again_to_the_bit(
    command: Command, tmp_path: Path
) -> None:
    words = [*PYRAMID, "model.start=random", "quantizer=ema"]
    tokenizer, _ = save_tokenizer_run(tmp_path / "run", *words)
    assert command("stage=export", "ckpt=run", "format=[diffusers,safetensors]", "run_dir=out") == 0
    images = ["data.image_size=16", "data.n_train=32", "data.n_val=8", "show=2", "accelerator=cpu"]
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    for source in ("out", "out/vqvae"):
        name = source.replace("/", "-")
        assert command("stage=import", f"from={source}", *images, f"run_dir=again-{name}") == 0
        again, _ = load_tokenizer(tmp_path / f"again-{name}")
        q = tokenizer.encode(x)
        assert torch.equal(again.indices(x), q.indices)
        assert torch.equal(again.decode(q.z_q), tokenizer.decode(q.z_q))
    assert command("stage=export", "ckpt=again-out", "run_dir=more") == 0
    assert "| sha256 |" in (tmp_path / "more" / "README.md").read_text()


@pytest.mark.slow
def test_an_existing_folder_is_a_sentence_and_stays(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert command("stage=export", f"ckpt={RUN}", "run_dir=out") == 2
    assert "run_dir=out exists and is not empty" in read_mistake(capsys)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["format=safetensor"], "format=safetensor does not exist, did you mean safetensors?"),
        (["format=[]"], "format=[] names no format; choose from"),
        (["format=[safetensors,safetensors]"], "format names safetensors twice"),
        (["resume=runs/x"], "stage=export writes its folder whole or not at all; leave resume"),
        (["ckpt=null"], "stage=export needs the tokenizer to export; add ckpt="),
        (["ckpt=nowhere"], "ckpt=nowhere has no checkpoint"),
    ],
)
def test_what_cannot_be_exported_is_a_sentence(
    words: list[str],
    sentence: str,
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("stage=export", f"ckpt={RUN}", *words) == 2
    assert sentence in read_mistake(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_continuous_tokenizer_is_a_sentence(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer_run(tmp_path / "kl", "quantizer=kl")
    assert command("stage=export", "ckpt=kl") == 2
    assert "ckpt=kl is continuous, and an export turns images into codes" in read_mistake(capsys)
    assert not (tmp_path / "runs").exists()


def test_every_format_of_the_package_is_known() -> None:
    assert "safetensors" in list_exporters()
    assert [each.name for each in choose_exporters(["safetensors"])] == ["safetensors"]
    with pytest.raises(InputError, match="format=tflite does not exist; there is .*safetensors"):
        choose_exporters("tflite")


def test_a_checkpoint_without_its_run_folder_is_exported_without_figures(tmp_path: Path) -> None:
    tokenizer, config = load_tokenizer(RUN)
    file = tmp_path / "mine" / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    shutil.copy(RUN / "checkpoints" / "last.ckpt", file)
    shutil.copytree(RUN, tmp_path / "whole")
    origin = Origin.read(tmp_path / "mine", config)
    assert (origin.name, origin.figures, origin.pictures) == ("mine", {}, {})
    readme = write_readme(tokenizer, origin, [], {}, None, "mine")
    assert "The command is not known" in readme
    assert "## Figures" not in readme
    whole = Origin.read(tmp_path / "whole", config)
    assert whole.figures["psnr"] > 17
    assert set(whole.pictures) == {"reconstructions", "histogram", "atlas"}
    assert all(picture.is_file() for picture in whole.pictures.values())


def test_a_folder_of_another_run_above_a_checkpoint_is_not_its_origin(tmp_path: Path) -> None:
    _, config = load_tokenizer(RUN)
    shutil.copytree(RUN, tmp_path / "run")
    assert Origin.read(tmp_path / "run", {**config, "id": "of another"}).figures == {}


def test_imported_weights_keep_their_origin_and_licence() -> None:
    figures = {"licence": "MIT | or so", "sha256": "12ab", "origin": "owner/name"}
    origin = Origin("photos", {}, {}, figures)
    readme = write_readme(make_trained("quantizer=fsq"), origin, [], {}, None, "photos")
    assert read_metadata(readme)["license_name"] == "MIT | or so"
    assert "| licence | MIT \\| or so |" in readme
    assert "| origin | owner/name |" in readme
    again = write_readme(make_trained("quantizer=fsq"), origin, [], {}, "mit", "photos")
    assert read_metadata(again)["license"] == "mit"


@pytest.mark.parametrize(
    ("licence", "metadata"),
    [
        (None, {"license": "unknown"}),
        ("apache-2.0", {"license": "apache-2.0"}),
        ("Our own: ask", {"license": "other", "license_name": "Our own: ask"}),
    ],
)
def test_a_licence_becomes_the_hubs_metadata(licence: str | None, metadata: dict[str, str]) -> None:
    assert describe_licence(licence) == metadata


@pytest.mark.parametrize(
    ("data", "edge"), [({"crop": "centre"}, 16), ({"crop": "random"}, 18), ({"resize": 20}, 20)]
)
def test_the_preprocessor_maps_pixels_to_the_range_of_the_networks(
    data: dict[str, object], edge: int
) -> None:
    facts = describe_images_for(make_trained("data.channels=1"), data)
    assert facts["size"] == {"shortest_edge": edge}
    scaled = (torch.tensor([0.0, 255.0]) * facts["rescale_factor"] - 0.5) / facts["image_std"][0]
    assert torch.equal(scaled, torch.tensor([-1.0, 1.0]))
    assert json.loads(json.dumps(facts)) == facts


def test_comparisons_refuse_what_is_not_the_tokenizers() -> None:
    codes = torch.zeros(2, 50, 50, dtype=torch.int64)
    other = codes.clone()
    other[0, 0, :5] = 1
    assert compare_codes("onnx", other, codes) == pytest.approx(0.999)
    other[0, 0, 5] = 1
    for wrong in (other, codes[:1]):
        with pytest.raises(InputError, match="format=onnx was written and read back, and only"):
            compare_codes("onnx", wrong, codes)
    pictures = torch.zeros(1, 3, 4, 4)
    assert compare_pictures("pt2", pictures + 5e-5, pictures) == pytest.approx(5e-5)
    for bad in (pictures + 2e-4, pictures * float("nan"), pictures[..., :2]):
        with pytest.raises(InputError, match="its pictures differ by"):
            compare_pictures("pt2", bad, pictures)


def test_images_of_the_checks_have_structure_of_every_size() -> None:
    images = draw_images((2, 3, 32, 48), torch.Generator().manual_seed(0))
    assert images.shape == (2, 3, 32, 48)
    assert images.abs().max() <= 1
    assert images.std() > 0.4
    assert torch.nn.functional.avg_pool2d(images, 16).std() > 0.1


def test_networks_of_one_size_are_recognised() -> None:
    tokenizer = make_trained("quantizer=ema")
    assert serves_any_size(tokenizer)
    tokenizer.encoder.layers.append(torch.nn.LayerNorm([8, 4, 4]))  # type: ignore[operator]
    assert not serves_any_size(tokenizer)
