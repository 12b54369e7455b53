"""Codes without places through the commands: model=vit with model.grid=[1,n], as in TiTok."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import QUICK, TINY, TINY_PRIOR, Command, lightning_warnings

pytestmark = lightning_warnings

SEQUENCE = [
    *(word for word in TINY if not word.startswith("model.")), "model=vit", "model.grid=[1,6]", "model.start=random",
    "model.width=16", "model.depth=1", "model.heads=2", "model.patch=4", "loss.discriminator.width=8", "loss.gate.start=0.5",
]  # fmt: skip


@pytest.mark.slow
def test_a_sequence_of_codes_goes_through_all_stages(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(stage: str, name: str = "shapes") -> dict:
        result: dict = json.loads((tmp_path / f"runs/{stage}/{name}/metrics.json").read_text())
        assert all((tmp_path / picture).stat().st_size > 100 for picture in result["pictures"])
        return result

    assert command("stage=vqgan", *SEQUENCE) == 0
    assert command("stage=prior", "ckpt=runs/vqgan/shapes", *TINY_PRIOR) == 0
    of_sample = ["stage=sample", "ckpt=runs/prior/shapes", "n=5", "columns=4", "accelerator=cpu"]
    assert command(*of_sample) == 0
    for stage in ("vqgan", "prior"):
        assert command("stage=evaluate", f"ckpt=runs/{stage}/shapes", *QUICK) == 0
    assert command("stage=report", "runs=runs") == 0
    tokenizer, prior = read("vqgan"), read("prior")
    assert tokenizer["grid"] == prior["grid"] == [1, 6]
    assert not [picture for picture in tokenizer["pictures"] if "atlas" in picture]
    assert "it has a code for each patch" in capsys.readouterr().err
    read("sample")
    assert command(*of_sample, "sampler.grid=[1,12]") != 0
    assert "sampler.grid=[1, 12] needs codes with places" in capsys.readouterr().err
