"""stage=export: the folder, its card and its facts, and the sentences of what can't be exported."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from codegrid.data.form import Form
from codegrid.data.pixels import PixelRules
from codegrid.engine.errors import InputError
from codegrid.engine.folder import CONFIG
from tests.helpers.commands import Command, read_mistake
from tests.helpers.configs import ROOT
from tests.helpers.exports import PYRAMID, export_folder, make_trained
from tests.helpers.runs import save_tokenizer_run
from vqgan.export.base import compare_codes, compare_pictures, draw_images, serves_any_size
from vqgan.export.card import write_readme
from vqgan.export.discover import choose_exporters, list_exporters
from vqgan.export.folder import CHECKSUMS
from vqgan.export.licences import HUB_LICENCES, describe_licence
from vqgan.export.origin import Origin
from vqgan.export.safetensors import load_decoder
from vqgan.export.writing import UNLISTED, describe_images_for
from vqgan.formats.base import Choices
from vqgan.formats.files import open_public
from vqgan.formats.load import load_public
from vqgan.load import load_tokenizer
from vqgan.tokenizer import Tokenizer

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
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert listed == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in files - {CHECKSUMS, *UNLISTED}
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
        (["resume=runs/x"], "resume=runs/x is not a run folder"),
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
    readme = write_readme(tokenizer, origin, [], {}, None, "mine", None)
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
    readme = write_readme(make_trained("quantizer=fsq"), origin, [], {}, None, "photos", None)
    assert read_metadata(readme)["license_name"] == "mit-or-so"
    assert "| licence | MIT \\| or so |" in readme
    assert "| origin | owner/name |" in readme
    again = write_readme(make_trained("quantizer=fsq"), origin, [], {}, "mit", "photos", None)
    assert read_metadata(again)["license"] == "mit"


def test_a_card_is_one_of_the_hub_and_shows_how_to_load_the_tokenizer_by_its_name() -> None:
    tokenizer, exporters = make_trained("quantizer=residual"), choose_exporters(["safetensors"])
    origin = Origin("photos", {})
    readme = write_readme(tokenizer, origin, exporters, {}, "MIT", "photos", "ann/photos")
    card = ModelCard(readme)
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "codegrid",
        "tags": ["vqgan", "image-tokenizer", "discrete", "residual"],
    }
    assert 'Tokenizer.from_pretrained("ann/photos")\n' in card.text
    assert "-> int64 (1, 4, 4, 4)" in card.text
    assert "hf download ann/photos" in card.text
    diffusers = choose_exporters(["diffusers"])
    readme = write_readme(tokenizer, origin, diffusers, {}, None, "photos", "ann/photos")
    assert 'VQModel.from_pretrained("ann/photos", subfolder="vqvae")' in readme
    local = write_readme(tokenizer, origin, exporters, {}, "Ask me: 1 | 2", "photos", None)
    assert 'Tokenizer.from_pretrained(".")   # this folder, or its name on the hub' in local
    assert ModelCard(local).data.license_name == "ask-me-1-2"
    assert "Licence: Ask me: 1 | 2\n" in local
    onnx = choose_exporters(["onnx"])
    assert "from_pretrained" not in write_readme(tokenizer, origin, onnx, {}, None, "p", None)


def test_a_card_does_not_name_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    start = {"command": "/opt/train.py data.root=/home/ann/photos ckpt=/home/anna/x", "git": None}
    origin = Origin("photos", {}, start, {"origin": "/home/ann/last.ckpt", "licence": "mit"})
    readme = write_readme(make_trained(), origin, [], {}, None, "photos", None)
    assert "python train.py data.root=~/photos ckpt=/home/anna/x" in readme
    assert "| origin | ~/last.ckpt |" in readme
    assert "/home/ann/" not in readme


@pytest.mark.parametrize(
    ("licence", "metadata"),
    [
        (None, {"license": "unknown"}),
        ("apache-2.0", {"license": "apache-2.0"}),
        ("MIT", {"license": "mit"}),
        ("openrail++", {"license": "openrail++"}),
        ("Our own: ask!", {"license": "other", "license_name": "our-own-ask"}),
        ("my-own-1.0", {"license": "other", "license_name": "my-own-1.0"}),
        ("許諾", {"license": "other", "license_name": "unknown"}),
    ],
)
def test_a_licence_becomes_the_hubs_metadata(licence: str | None, metadata: dict[str, str]) -> None:
    assert describe_licence(licence) == metadata
    assert metadata["license"] in HUB_LICENCES


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


UNITS = PixelRules(((-2.0, 2.0), (0.0, 0.5)), depth=16, number_type="float32")


@pytest.mark.parametrize(
    ("rules", "channels", "ends"),
    [
        (PixelRules(), 4, ([0.0] * 4, [255.0] * 4)),
        (PixelRules((0, 4095), depth=16, number_type="uint16"), 5, ([0.0] * 5, [4095.0] * 5)),
        (UNITS, 2, ([-2.0, 0.0], [2.0, 0.5])),
    ],
)
def test_the_preprocessor_maps_the_range_of_the_data(
    rules: PixelRules, channels: int, ends: tuple[list[float], ...]
) -> None:
    tokenizer = make_trained(f"data.channels={channels}")
    tokenizer.rules = rules
    facts = describe_images_for(tokenizer, {})
    mean, std = (torch.tensor(facts[name]) for name in ("image_mean", "image_std"))
    for values, expected in zip(ends, (-1.0, 1.0), strict=True):
        scaled = (torch.tensor(values) * facts["rescale_factor"] - mean) / std
        assert torch.equal(scaled, torch.full((channels,), expected))
    assert facts["do_convert_rgb"] is False
    assert json.loads(json.dumps(facts)) == facts


def test_the_preprocessor_of_a_rectangle_names_both_sides() -> None:
    tokenizer = make_trained("data.image_size=[16,24]", "model.grid=[4,6]")
    tokenizer.fit = "pad"
    facts = describe_images_for(tokenizer, {"crop": "centre"})
    assert facts["size"] == facts["crop_size"] == {"height": 16, "width": 24}
    assert (facts["fit"], facts["do_center_crop"]) == ("pad", False)


def test_a_card_says_what_the_numbers_and_the_pictures_of_bands_are() -> None:
    tokenizer = make_trained("data.channels=5", "data.image_size=[16,24]", "model.grid=[4,6]")
    tokenizer.rules = PixelRules((0, 4095), depth=16, show=(3, 2, 1), number_type="uint16")
    exporters = choose_exporters(["safetensors"])
    readme = write_readme(tokenizer, Origin("scans", {}), exporters, {}, None, "scans", None)
    assert "An image tokenizer: 16x24 5-channel images become 4x6 codes" in readme
    assert "0 to 4,095 in the units of the data (uint16)" in readme
    assert "Pictures show channels 3, 2, 1 of 5. `preprocessor_config.json`" in readme
    assert 'encode_images(["a.tif"])' in readme


@pytest.mark.parametrize("words", [[], [*PYRAMID, "model.start=random"]], ids=["conv", "pyramid"])
@torch.no_grad()
def test_rectangles_of_bands_come_back_with_their_rules(tmp_path: Path, words: list[str]) -> None:
    shape = ["data.channels=5", "data.image_size=[24,16]", "model.grid=[6,4]", "quantizer=ema"]
    formats = "safetensors,diffusers" if words else "safetensors"
    data = {
        "range": [0, 4095],
        "depth": 16,
        "show": [3, 2, 1],
        "number_type": "uint16",
        "fit": "pad",
    }
    tokenizer = export_folder(tmp_path / "out", *words, *shape, formats=formats, **data)
    again = Tokenizer.from_pretrained(tmp_path / "out")
    assert again.rules == PixelRules((0, 4095), depth=16, show=(3, 2, 1), number_type="uint16")
    assert again.form == Form((24, 16), 5, "pad")
    x = torch.rand(2, 5, 24, 16) * 2 - 1
    codes = tokenizer.indices(x)
    assert torch.equal(again.indices(x), codes)
    assert torch.equal(again.decode_indices(codes), tokenizer.decode_indices(codes))
    values = again.decode_codes(codes, output="array")
    assert (values.dtype, values.shape) == (np.uint16, (2, 24, 16, 5))
    assert again.encode_images(values).shape == (2, 6, 4)


@torch.no_grad()
def test_an_export_of_three_channels_serves_bands(tmp_path: Path) -> None:
    tokenizer = export_folder(tmp_path / "out")
    file = open_public(str(tmp_path / "out"), None, None).file
    imported = load_public(file, Choices((16, 32), 5))
    grey = torch.rand(1, 1, 16, 32) * 2 - 1
    z_e = imported.tokenizer.encode(grey.expand(-1, 5, -1, -1)).z_e
    expected = tokenizer.encode(grey.expand(-1, 3, -1, -1)).z_e
    torch.testing.assert_close(z_e, expected, atol=1e-4, rtol=1e-4)
    assert "has 3 channels and the images 5: the first and the last" in imported.plan.remarks[-1]


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
