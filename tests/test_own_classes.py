"""Classes of one's own, outside this repository, work in every stage if the command admits them."""

from pathlib import Path

import pytest

from tests.helpers.commands import (
    QUICK,
    TINY,
    TINY_PRIOR,
    Command,
    lightning_warnings,
    read_mistake,
)

pytestmark = [lightning_warnings, pytest.mark.slow]

MODULE = """
import numpy as np
from lightning.pytorch.callbacks import Callback

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.source import Source
from vqgan.quantizers.ema import EMA


class StripeSource(Source):
    def __init__(self, n, stream):
        super().__init__(n, {"stripes": 1, "n": n, "stream": stream})
        self.stream = stream

    def read_image(self, index, form):
        row = np.random.default_rng((*self.stream, index)).integers(0, 256, form.size[1])
        return np.broadcast_to(row, form.shape).astype(np.uint8), index % 2


class Stripes(ImageDataModule):
    classes = ["even", "odd"]

    def __init__(self, n_train, n_val, **settings):
        super().__init__(**settings)
        self.sizes = {"train": n_train, "val": n_val}

    def open_source(self, split):
        return StripeSource(self.sizes[split], (self.seed, int(split == "val")))


class Codes(EMA):
    pass


class Watch(Callback):
    pass
"""

DATA = """
defaults:
  - /images@_here_: default
  - _self_
_target_: mylab.Stripes
n_train: 64
n_val: 16
"""

QUANTIZER = """
defaults:
  - ema
  - _self_
_target_: mylab.Codes
"""

AGAIN = ["--config-dir", "myconf", "data=stripes", "quantizer=codes"]
TRUST = "trust=[mylab.Stripes,mylab.Codes]"
PRIOR = ["stage=prior", "ckpt=runs/vqgan/stripes", *TINY_PRIOR]


@pytest.fixture
def lab(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Commands in a folder with a module and configs of its own, and a tokenizer that was trained with them."""
    (tmp_path / "mylab.py").write_text(MODULE)
    for group, name, text in (("data", "stripes", DATA), ("quantizer", "codes", QUANTIZER)):
        (tmp_path / "myconf" / group).mkdir(parents=True)
        (tmp_path / "myconf" / group / f"{name}.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert command(*AGAIN, "stage=vqgan", "+callbacks.watch._target_=mylab.Watch", *TINY) == 0
    return command


def test_every_later_stage_admits_what_the_command_trusts_or_chooses_again(
    lab: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert lab(*PRIOR) == 2
    assert "add trust=[mylab.Codes], else don't trust the file" in read_mistake(capsys)
    assert lab(*PRIOR, "trust=[mylab.Codes]") == 2
    assert "add trust=[mylab.Stripes], else don't trust the file" in read_mistake(capsys)
    assert not Path("runs/prior").exists()
    assert lab(*PRIOR, TRUST) == 0
    assert lab(*AGAIN, *PRIOR, "name=again") == 0
    assert lab(*AGAIN, "stage=extract", "ckpt=runs/vqgan/stripes", "accelerator=cpu") == 0
    ckpt = "ckpt=runs/prior/stripes"
    assert lab("stage=sample", ckpt, TRUST, "accelerator=cpu", "n=2", "save=[grid,neighbours]") == 0
    assert lab(*AGAIN, "stage=evaluate", ckpt, "samples=4", *QUICK) == 0
    capsys.readouterr()
    assert lab(*AGAIN[:2], *PRIOR, "data=cifar10", "quantizer=codes") == 2
    assert "the checkpoint has mylab.Stripes, which stays" in read_mistake(capsys)


def test_a_run_with_ones_own_classes_resumes_with_trust_or_its_choices(
    lab: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ["stage=vqgan", "resume=runs/vqgan/stripes"]
    before = Path("runs/vqgan/stripes/card.md").read_bytes()
    capsys.readouterr()
    assert lab(*resume, "trainer.max_steps=8") == 2
    everything = "trust=[mylab.Codes,mylab.Stripes,mylab.Watch]"
    assert f"add {everything}, else don't trust the file" in read_mistake(capsys)
    assert Path("runs/vqgan/stripes/card.md").read_bytes() == before
    assert lab(*resume, "trainer.max_steps=8", everything) == 0
    assert lab(*AGAIN, *resume, "trainer.max_steps=9", "trust=[mylab.Watch]") == 0
    assert f"later stages need {everything}" in Path("runs/vqgan/stripes/card.md").read_text()


def test_a_pipeline_with_ones_own_classes_admits_them_in_all_its_parts(lab: Command) -> None:
    prior = [f"stage2.{word}" for word in TINY_PRIOR if word.startswith(("batch", "trainer.max"))]
    sizes = [word for word in TINY_PRIOR if word.startswith("prior.")]
    quick = ["evaluate.proxy=0", "evaluate.fetch=false", "evaluate.samples=4"]
    assert lab(*AGAIN, "stage=pipeline", *TINY, *prior, *sizes, *quick) == 0
    assert lab("stage=pipeline", "resume=runs/pipeline/stripes", TRUST) == 0
