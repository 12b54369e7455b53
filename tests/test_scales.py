"""Codes of several scales through the commands: quantizer=multiscale and prior=var."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from codegrid.engine.module import ClockedModule
from prior import Prior
from tests.helpers.commands import QUICK, TINY, TINY_PRIOR, Command, lightning_warnings
from tests.helpers.runs import SMALL_PRIOR, save_prior_run

pytestmark = lightning_warnings

SCALES = [*TINY, "loss=vqvae", "quantizer=multiscale", "quantizer.convolutions=2"]
VAR_PRIOR = [*(word for word in TINY_PRIOR), "prior=var", "conditional=false"]
LENGTH = 1 + 4 + 9 + 16


@pytest.mark.slow
def test_several_scales_go_through_all_stages(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(stage: str, name: str = "shapes") -> dict:
        result: dict = json.loads((tmp_path / f"runs/{stage}/{name}/metrics.json").read_text())
        assert all((tmp_path / picture).stat().st_size > 100 for picture in result["pictures"])
        return result

    assert command("stage=vqgan", *SCALES) == 0
    assert command("stage=prior", "ckpt=runs/vqgan/shapes", *VAR_PRIOR) == 0
    for stage in ("vqgan", "prior"):
        assert command("stage=evaluate", f"ckpt=runs/{stage}/shapes", *QUICK) == 0
    assert command("stage=report", "runs=runs") == 0
    tokenizer, prior = read("vqgan"), read("prior")
    assert tokenizer["grid"] == prior["grid"] == [4, 4]
    assert tokenizer["codes_per_image"] == prior["codes_per_image"] == LENGTH
    assert not [picture for picture in tokenizer["pictures"] if "atlas" in picture]
    draw = ["stage=sample", "ckpt=runs/prior/shapes", "n=3", "accelerator=cpu"]
    assert command(*draw, "run_dir=plain") == 0
    assert command(*draw, "sampler.grid=6x8", "run_dir=large") == 0
    with Image.open(next((tmp_path / "large").glob("*.png"))) as picture:
        assert picture.height >= 24
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(photo)
    assert command(*draw, f"sampler.init_image={photo}", "sampler.rows=2", "run_dir=half") == 0
    codes = torch.load(tmp_path / "half/codes.pt", weights_only=True)["codes"]
    assert codes.shape == (3, 1, LENGTH)
    assert (
        command(
            "stage=export", "ckpt=runs/prior/shapes", "run_dir=exported", "format=[safetensors,pt2]"
        )
        == 0
    )
    again = Prior.from_pretrained(tmp_path / "exported")
    here = Prior.from_pretrained(tmp_path / "runs/prior/shapes")
    assert torch.equal(again.sample(4, output="codes"), here.sample(4, output="codes"))
    capsys.readouterr()
    # To a prior in raster order the codes are a row.
    words = [word for word in TINY_PRIOR if "max_steps" not in word]
    assert (
        command(
            "stage=prior", "ckpt=runs/vqgan/shapes", *words, "trainer.max_steps=2", "run_dir=row"
        )
        == 0
    )
    row = ["stage=sample", "ckpt=row", "n=2", "accelerator=cpu"]
    assert command(*row, "run_dir=of_row") == 0
    assert command(*row, "sampler.grid=8", "run_dir=no") != 0
    assert (
        "the codes of several scales are a row to this prior; use prior=var"
        in capsys.readouterr().err
    )
    assert command("stage=prior", "ckpt=runs/vqgan/shapes", "resume=runs/prior/shapes") == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Prior:
    folder = tmp_path_factory.mktemp("scales") / "model"
    words = ["quantizer=multiscale", "quantizer.K=16", "quantizer.dim=8"]
    save_prior_run(folder, "prior=var", *SMALL_PRIOR, tokenizer_words=words)
    return Prior.from_pretrained(folder)


def test_a_prior_in_python_draws_completes_and_judges(trained: Prior) -> None:
    codes = trained.sample(4, output="codes", seed=1)
    assert codes.shape == (4, 1, LENGTH)
    assert trained.grid == (4, 4)
    image = torch.rand(3, 16, 16) * 2 - 1
    assert trained.sample(2, grid=(6, 8), output="tensor").shape == (2, 3, 24, 32)
    nats = trained.nats_of_codes(codes, per_position=True)
    assert nats.shape == codes.shape
    torch.testing.assert_close(trained.nats_of_codes(codes), nats.double().sum((1, 2)))
    assert trained.nats(image).shape == (1,)
    drawn = trained.complete(image, rows=2, n=5, output="codes", seed=2)
    known = torch.zeros(4, 4, dtype=torch.bool)
    known[:2] = True
    scales = trained.tokenizer.quantizer.scales
    touched = torch.cat([part.flatten() for part in scales.touched(known)])
    assert (drawn[:, 0, touched] == drawn[0, 0, touched]).all()
    assert (drawn[:, 0, ~touched] != drawn[0, 0, ~touched]).any()


@pytest.mark.slow
def test_both_stages_resume_to_the_bit(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = ClockedModule.tick

    def fail(self: ClockedModule) -> None:
        tick(self)
        if self.step == 4:
            raise RuntimeError("the power failed")

    def train(run_dir: str, *words: str) -> dict[str, torch.Tensor]:
        """The weights of a run, which are those of one that breaks off and is resumed."""
        assert command(*words, f"run_dir={run_dir}") == 0
        with monkeypatch.context() as patch:
            patch.setattr(ClockedModule, "tick", fail)
            with pytest.raises(RuntimeError, match="the power failed"):
                command(*words, f"run_dir={run_dir}-halves")
        origin = [word for word in words if word.startswith("ckpt=")]
        assert command(words[0], *origin, f"resume={run_dir}-halves") == 0
        whole, halves = (
            torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for run in (run_dir, f"{run_dir}-halves")
        )
        assert whole.keys() == halves.keys()
        assert all(torch.equal(value, halves[name]) for name, value in whole.items())
        return whole

    revived = ["quantizer.inner.revive=0.9", "trainer.precision=32-true"]
    weights = train("tokenizer", "stage=vqgan", *SCALES, *revived)
    assert any("scales.kernel_1" in name for name in weights)
    train("prior", "stage=prior", "ckpt=tokenizer", *VAR_PRIOR, "trainer.precision=32-true")
