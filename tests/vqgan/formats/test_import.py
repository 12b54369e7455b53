"""stage=import: a run folder on which all later stages stand, and nothing written where a file can't be taken."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from codegrid.engine.errors import InputError
from codegrid.engine.folder import LAST
from tests.helpers.commands import (
    QUICK,
    TINY_PRIOR,
    Command,
    lightning_warnings,
    read_mistake,
)
from tests.helpers.public import PUBLIC, read_arrays
from vqgan import Tokenizer

TAMING = PUBLIC / "taming_vq" / "last.ckpt"
IMAGES = ["data.n_train=16", "data.n_val=6", "data.image_size=32", "accelerator=cpu"]
IMPORT = ["stage=import", *IMAGES, "name=public"]


def test_a_file_that_can_not_be_taken_leaves_nothing_behind(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, "other.ckpt")
    for words, sentence in (
        ([], "stage=import needs the weights; add from=<file, folder or hub id>"),
        (["from=other.ckpt"], "other.ckpt"),
        (["from=missing.ckpt"], "missing.ckpt"),
        ([f"from={TAMING}", "pixels=[0,255]"], "pixels=[0, 255] must be [-1,1] or [0,1]"),
        ([f"from={TAMING}", "data.image_size=30"], "data.image_size=30"),
        ([f"from={TAMING}", "quantizer.K=8"], "quantizer.K is not a setting of this stage"),
        ([f"from={PUBLIC / 'titok' / 'tokenizer.bin'}"], "add head_width=8, for example"),
    ):
        capsys.readouterr()
        assert command(*IMPORT, *words) == 2
        assert sentence in read_mistake(capsys)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_an_import_describes_itself_and_gives_its_own_codes_codes(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*IMPORT, f"from={TAMING}") == 0
    printed = capsys.readouterr()
    folder = Path("runs/import/public")
    result = json.loads((folder / "metrics.json").read_text())
    assert result["origin"] == str(TAMING)
    assert len(result["sha256"]) == 64
    assert (result["K"], result["grid"], result["licence"]) == (64, [8, 8], "unknown")
    assert result["code_grid"] == "8x8 for images of 32 pixels, 6 bits each"
    assert "optimizer" in result["left_out"]
    card = (folder / "card.md").read_text()
    for text in (result["sha256"], result["format"], result["left_out"], "1,468,947 weights"):
        assert text in card
    assert "next: python train.py stage=evaluate ckpt=runs/import/public" in printed.err
    reference = read_arrays(TAMING.with_suffix(".npz"))
    tokenizer = Tokenizer.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(tokenizer.indices(reference["images"]), reference["indices"])
    assert torch.load(folder / LAST, weights_only=True)["codegrid"]["stage"] == "vqgan"


@pytest.mark.slow
def test_an_import_is_not_repeated_once_it_is_finished(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["stage=import", *IMAGES, f"from={TAMING}", "show=0", "run_dir=mine"]
    assert command(*words) == 0
    assert not Path("mine/pictures").exists()
    before = torch.load(Path("mine", LAST), weights_only=True)["state_dict"]
    Path("mine/metrics.json").unlink()  # as if it had been killed at its end
    assert command(*words) == 0
    after = torch.load(Path("mine", LAST), weights_only=True)["state_dict"]
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    capsys.readouterr()
    assert command(*words) == command("stage=import", "resume=mine") == 0
    assert capsys.readouterr().err.count("finished before") == 2
    other = PUBLIC / "ldm_vq" / "f8.ckpt"
    assert command(*words[:-2], f"from={other}", "run_dir=mine") == 2
    assert "holds a run with from=" in read_mistake(capsys)
    assert command("stage=vqgan", "resume=mine") == 2
    assert "init=mine" in read_mistake(capsys)


@pytest.mark.slow
def test_a_sweep_imports_several_files_and_skips_those_that_it_has(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ",".join(str(PUBLIC / name) for name in ("taming_vq/last.ckpt", "llamagen/vq_tiny.pt"))
    words = ["-m", "stage=import", *IMAGES, "show=0", f"from={files}", "sweep=public"]
    assert command(*words) == 0
    results = [json.loads(file.read_text()) for file in Path("runs/sweeps").rglob("metrics.json")]
    assert len({result["format"] for result in results}) == 2
    capsys.readouterr()
    assert command(*words) == 0
    assert capsys.readouterr().err.count("finished before") == 2


@pytest.mark.slow
@lightning_warnings
@pytest.mark.parametrize("name", ["taming_vq/last.ckpt", "maskgit_vqgan/pytorch_model.bin"])
def test_every_later_stage_takes_an_import_as_any_other_run(
    name: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*IMPORT, f"from={PUBLIC / name}") == 0
    ckpt = "ckpt=runs/import/public"
    assert command("stage=evaluate", ckpt, *QUICK, "proxy=0", "lpips=null", "inception=false") == 0
    assert command("stage=extract", ckpt, "accelerator=cpu", "export=npz") == 0
    assert np.load("runs/extract/shapes/codes-val.npz")["indices"].shape[-2:] == (8, 8)
    assert command("stage=prior", ckpt, *TINY_PRIOR, "trainer.val_every=6") == 0
    assert command("stage=prior", "resume=runs/prior/shapes", "trainer.max_steps=7") == 0
    sample = ["stage=sample", "ckpt=runs/prior/shapes", "accelerator=cpu", "n=2"]
    assert command(*sample, "sampler.grid=10x12", "save=[npz]") == 0
    assert np.load("runs/sample/shapes/samples.npz")["arr_0"].shape == (2, 40, 48, 3)
    capsys.readouterr()
    assert command("stage=report", "runs=runs") == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (report["runs"], report["evaluated"], report["unused"]) == (2, 1, {})


def test_tokenizers_are_ready_to_use_from_a_run_folder(tmp_path: Path) -> None:
    from tests.helpers.runs import save_tokenizer_run

    trained, _ = save_tokenizer_run(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert not tokenizer.training
    x = torch.rand(2, 3, 20, 12) * 2 - 1
    indices = tokenizer.indices(x)
    assert indices.shape == (2, 5, 3)
    assert torch.equal(indices, trained.indices(x))
    z_q = tokenizer.encode(x).z_q
    assert torch.equal(tokenizer.decode(z_q), tokenizer.decode_indices(indices))


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((1, 3, 18, 16), "images of 18x16 pixels must have sides that f=4 divides; .* 16x16"),
        ((1, 1, 16, 16), r"must be floats \(B, 3, H, W\) in \[-1, 1\]"),
        ((3, 16, 16), r"images of shape \[3, 16, 16\] and type float32 must be"),
    ],
)
def test_images_that_do_not_fit_get_a_sentence(
    shape: tuple[int, ...], sentence: str, tmp_path: Path
) -> None:
    from tests.helpers.runs import save_tokenizer_run

    tokenizer, _ = save_tokenizer_run(tmp_path)
    with pytest.raises(InputError, match=sentence):
        tokenizer.indices(torch.zeros(shape))
    with pytest.raises(InputError, match="type uint8 must be floats"):
        tokenizer.indices(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
