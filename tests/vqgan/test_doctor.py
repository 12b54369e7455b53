"""Each planted fault raises its alarm; a healthy run raises none."""

import copy
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from codegrid.engine.callbacks.checkpointing import Checkpoints
from codegrid.engine.checkpoint import make_header, read_checkpoint
from codegrid.engine.errors import InputError
from codegrid.evaluation.codebook import CodebookUse
from tests.helpers.parts import make
from tests.helpers.stage1 import (
    fit,
    lightning_warnings,
    make_module,
    make_tokenizer,
    paper_weight,
)
from vqgan.callbacks.doctor import TokenizerDoctor, list_remedies
from vqgan.discriminators.base import Judgement
from vqgan.losses.adversarial import LeastSquares, NonSaturating
from vqgan.losses.gate import Gate
from vqgan.losses.weight import AdaptiveWeight, ConstantWeight
from vqgan.module import VQGAN
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.fsq import FSQ
from vqgan.quantizers.residual import Residual
from vqgan.quantizers.simvq import SimVQ
from vqgan.quantizers.vq import VQ

pytestmark = lightning_warnings

__all__ = ["pytestmark"]  # the warnings that training on a CPU brings

OPEN = Gate(start=0, ramp=0, warmup=0)


def examine(
    trained: VQGAN, folder: Path, callbacks: Sequence[Callback] = (), **settings: Any
) -> list[str]:
    """The doctor's alarms in this run."""
    doctor = make(TokenizerDoctor, **{"every": 4, "patience": 2, **settings})
    fit(trained, [*callbacks, doctor], default_root_dir=folder)
    return doctor.alarms


def test_a_healthy_run_hears_nothing(tmp_path: Path) -> None:
    assert (
        examine(
            make_module(Gate(start=8, ramp=4, warmup=4), steps=40, freeze_codes=False), tmp_path
        )
        == []
    )
    assert not (tmp_path / "doctor.txt").exists()


class Collapse(Callback):
    """From step 8 on all codes but one are where no output ever is."""

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(module, VQGAN)
        if batch_idx >= 8:
            module.tokenizer.quantizer.codebook.data[1:] = 1e3  # type: ignore[union-attr]


def test_a_collapsed_codebook_is_found_with_the_step_and_a_cure(tmp_path: Path) -> None:
    [alarms] = examine(make_module(steps=40), tmp_path, [Collapse()])
    assert alarms.startswith(
        "step 16: the codebook has collapsed: 1 of 16 codes in use, perplexity 1.0, since step 8; try "
    )
    assert "quantizer.revive=0.5" in alarms
    assert (tmp_path / "doctor.txt").read_text() == alarms + "\n"


def test_a_collapse_is_found_where_several_looks_are_needed_to_count_the_codes(
    tmp_path: Path,
) -> None:
    alarms = examine(
        make_module(steps=24), tmp_path, [Collapse()], every=1, patience=4
    )  # a look is of 64 tokens, 160 are needed
    assert len(alarms) == 1
    assert "1 of 16 codes in use" in alarms[0]


def test_a_complaint_is_made_once_and_again_after_it_was_gone(tmp_path: Path) -> None:
    class Sometimes(Collapse):
        def on_train_batch_start(
            self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            assert isinstance(module, VQGAN)
            if batch_idx == 0:
                self.good = copy.deepcopy(module.tokenizer.quantizer.state_dict())
            if batch_idx == 24:
                module.tokenizer.quantizer.load_state_dict(self.good)
            if not 24 <= batch_idx < 40:
                super().on_train_batch_start(trainer, module, batch, batch_idx)

    alarms = examine(make_module(steps=64), tmp_path, [Sometimes()])
    assert [alarm.split(":")[0] for alarm in alarms] == ["step 16", "step 48"]


def test_scales_with_codebooks_of_their_own_are_judged_when_the_coarsest_has_enough_codes() -> None:
    """Four images show at most four codes of a grid of 1x1, however many places all scales have together."""
    module, doctor = make_module(), make(TokenizerDoctor, every=1, patience=1)
    use = doctor._codes = CodebookUse(64, lengths=[1, 256])
    use.update(torch.randint(64, (4, 1, 257)))
    assert not list(doctor.examine_codes(module))
    assert not doctor.codebook_figures
    use.update(torch.randint(64, (640, 1, 257)))
    assert not list(doctor.examine_codes(module))
    assert doctor.codebook_figures["usage"] == 1
    rows = torch.randint(64, (640, 1, 257))
    rows[..., 0] = 7
    use.update(rows)
    [sign] = doctor.examine_codes(module)
    assert "1 of 64 codes in use" in sign.observation


@pytest.mark.parametrize(
    ("quantizer", "remedies"),
    [
        (make(EMA, 16, 8), ["quantizer.kmeans=true quantizer.revive=0.5"]),
        (make(SimVQ, 16, 8), ["quantizer.kmeans=true"]),
        (make(FSQ, 16), []),
        (
            make(Residual, partial(make, VQ), 16, 2, 8),
            ["quantizer.inner.kmeans=true quantizer.inner.revive=0.5"],
        ),
    ],
)
def test_remedies_are_settings_that_the_quantizer_has(
    quantizer: Quantizer, remedies: list[str]
) -> None:
    assert list_remedies(make_module(tokenizer=make_tokenizer(quantizer=quantizer))) == remedies


class Growing(AdaptiveWeight):
    """A weight that is `rate` times the last after each update."""

    def __init__(self, rate: float) -> None:
        super().__init__(1.0, max_weight=1e4, delta=1e-6, smooth=1, anchor=0, growth=10.0)
        self.rate = rate

    def ratio(self) -> Tensor:
        return 1e-3 * self.rate ** self.calls.float()


@pytest.mark.parametrize(("rate", "what"), [(2.0, "lambda explodes"), (0.5, "lambda vanishes")])
def test_a_lambda_that_runs_away_is_found(tmp_path: Path, rate: float, what: str) -> None:
    alarms = examine(
        make_module(OPEN, steps=24, adaptive=Growing(rate), perceptual=None),
        tmp_path,
        least_share=0.0,
    )
    assert len([s for s in alarms if what in s and "since step 8" in s]) == 1, alarms


def test_a_lambda_at_its_cap_is_found(tmp_path: Path) -> None:
    alarms = examine(
        make_module(OPEN, steps=16, adaptive=paper_weight(max_weight=1e-6), perceptual=None),
        tmp_path,
        least_share=0.0,
    )
    assert any("lambda is at its cap" in s for s in alarms), alarms


@pytest.mark.parametrize("game", [None, NonSaturating(), LeastSquares()])
def test_a_discriminator_that_learns_nothing_is_found(tmp_path: Path, game: Any) -> None:
    blind = make_module(
        OPEN, steps=16, adversarial=game, adaptive=ConstantWeight(0.1), perceptual=None
    )
    nn.init.zeros_(blind.discriminator.last.weight)
    nn.init.zeros_(blind.discriminator.last.bias)
    blind.make_optimizers[1] = lambda p: torch.optim.SGD(p, 0.0)
    alarms = examine(blind, tmp_path, least_share=0.0)
    assert any("the discriminator is dead" in s and "since step 0" in s for s in alarms), alarms


class Knowing(nn.Module):
    """Reconstructions of noise are paler than noise: a discriminator that knows this and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.sure = nn.Parameter(torch.tensor(1e4))

    def forward(self, x: Tensor) -> Judgement:
        return Judgement(self.sure * (x.float().std((1, 2, 3)) - 0.5)[:, None, None, None], [])


def test_a_discriminator_that_is_sure_of_everything_is_found(tmp_path: Path) -> None:
    sure = make_module(
        OPEN, steps=16, discriminator=Knowing(), perceptual=None, adaptive=ConstantWeight(0.0)
    )
    alarms = examine(sure, tmp_path)
    assert any(
        "the discriminator is saturated: its loss is 0, a blind one's 1;" in s for s in alarms
    ), alarms


def test_a_loss_term_without_influence_is_found(tmp_path: Path) -> None:
    [alarms] = examine(make_module(OPEN, steps=16, perceptual_weight=1e-9), tmp_path)
    assert "the loss term perceptual is without influence" in alarms
    assert "try a larger loss.perceptual_weight" in alarms


@pytest.mark.parametrize(
    ("shares", "signs"),
    [
        ({"share_rec": 0.0}, []),  # blank images without error: no term has a gradient
        ({"share_rec": 0.0, "share_perceptual": 0.0, "share_adversarial": 0.0}, []),
        ({"share_rec": 1.0, "share_perceptual": 0.0}, ["perceptual"]),
        ({"share_rec": 0.0, "share_adversarial": 1.0}, ["rec"]),
        ({}, []),
    ],
)
def test_no_term_is_without_influence_where_nothing_was_lost(
    shares: dict[str, float], signs: list[str]
) -> None:
    doctor = make(TokenizerDoctor)
    assert [sign.name for sign in doctor.examine_shares(shares)] == signs


def test_a_term_whose_weight_is_zero_is_nobodys_fault(tmp_path: Path) -> None:
    assert examine(make_module(OPEN, steps=16, perceptual_weight=0.0), tmp_path) == []


class Spoil(Callback):
    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 7:
            module.tokenizer.decoder.last.weight.data[0] = float("nan")  # type: ignore[union-attr,index,operator]


def test_a_loss_that_is_no_number_ends_the_run_and_the_checkpoint_from_before_is_kept(
    tmp_path: Path,
) -> None:
    trained = make_module(steps=40)
    checkpoints = Checkpoints(make_header("vqgan", {}), 6)
    with pytest.raises(
        InputError,
        match=r"no number \(NaN or Inf\) since step 7; the last checkpoint, from before that, is kept",
    ):
        examine(trained, tmp_path, [Spoil(), checkpoints], every=10)
    assert trained.step == 10
    checkpoint = read_checkpoint(tmp_path, "vqgan")
    assert checkpoint["clock"]["step"] == 6
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_without_a_doctor_no_broken_model_is_saved_either(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="since step 7"):
        fit(
            make_module(steps=40),
            [
                Spoil(),
                Checkpoints(make_header("vqgan", {}), 6),
            ],
            default_root_dir=tmp_path,
        )
    assert read_checkpoint(tmp_path, "vqgan")["clock"]["step"] == 6


@pytest.mark.parametrize(
    "wrong",
    [{"every": 0}, {"patience": 0}, {"least_used": 2}, {"factor": 0.5}, {"least_share": -1}],
)
def test_a_doctor_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"callbacks.doctor."):
        make(TokenizerDoctor, **wrong)


@pytest.mark.slow
def test_a_healthy_run_of_shapes_hears_nothing(command: Callable[..., int], tmp_path: Path) -> None:
    code = command(
        "stage=vqgan", "data.n_train=500", "data.n_val=50", "data.image_size=16", "model.grid=4", "model.width=8",
        "model.decoder.depth=1", "quantizer.K=64", "loss.discriminator.width=8", "trainer.accelerator=cpu",
        "trainer.max_steps=200", "trainer.val_every=200", "callbacks.doctor.every=10", "logger=csv", "run_dir=run",
    )  # fmt: skip
    assert code == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["alarms"] == []
