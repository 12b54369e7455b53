"""Two processes with half a batch each train like one with the whole: both players, the codebook and lambda, across the gate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codegrid.data.form import Form
from codegrid.data.source import Source
from tests.helpers.parts import make
from tests.helpers.ranks import run_both_ranks
from tests.helpers.stage1 import (
    Grain,
    Noise,
    fit,
    lightning_warnings,
    make_module,
    paper_weight,
)
from vqgan.callbacks.doctor import TokenizerDoctor
from vqgan.losses.gate import Gate
from vqgan.losses.regularisers import R1, LeCam
from vqgan.module import VQGAN

pytestmark = [lightning_warnings, pytest.mark.slow]

STEPS = 7


def trained(batch_size: int, accumulate: int = 1, **settings: Any) -> tuple[VQGAN, list[float]]:
    """A GAN after some steps, and lambda after each. Both players use SGD, since Adam would amplify rounding errors."""
    gate, weight = Gate(start=2, ramp=2, warmup=2), paper_weight(scale=1.0, smooth=2)
    penalties = {"lecam": make(LeCam, 0.1), "r1": R1(0.1, every=2)}
    module = make_module(
        gate, STEPS, adaptive=weight, freeze_codes=False, accumulate=accumulate, **penalties
    )
    module.make_optimizers = dict.fromkeys((0, 1), lambda p: torch.optim.SGD(p, 0.05))
    module.tokenizer.quantizer.revive = 0.0  # type: ignore[assignment]  # revival picks outputs by their order, which differs
    lambdas: list[float] = []
    tick = module.tick
    module.tick = lambda: (lambdas.append(float(weight.weight)), tick())[1]  # type: ignore[method-assign,func-returns-value]
    fit(module, data=Noise(16, flip=False, cache="ram", batch_size=batch_size), **settings)
    return module, lambdas


def work(folder: Path, accumulate: int) -> dict[str, Any]:
    module, lambdas = trained(
        2,
        accumulate,
        devices=2,
        strategy="ddp_find_unused_parameters_true",
        use_distributed_sampler=False,
    )
    judged = module.trainer.validate(
        module, Noise(16, flip=False, cache="ram", batch_size=5), verbose=False
    )
    return {"state": module.state_dict(), "lambdas": lambdas, "judged": judged[0]}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of both ranks, without and with micro-batches, whose gradients are reduced in the last one."""
    return run_both_ranks(work, tmp_path_factory.mktemp("ranks"), request.param)


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Tensor], list[float], dict[str, float]]:
    module, lambdas = trained(4)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    [judged] = module.trainer.validate(
        module, Noise(16, flip=False, cache="ram", batch_size=4), verbose=False
    )
    return state, lambdas, dict(judged)


def test_two_ranks_compute_one_lambda_and_it_is_that_of_the_whole_batch(
    ranks: tuple[dict[str, Any], dict[str, Any]],
    alone: tuple[dict[str, Tensor], list[float], dict[str, float]],
) -> None:
    assert ranks[0]["lambdas"] == ranks[1]["lambdas"]
    assert ranks[0]["lambdas"][:2] == [0, 0]
    assert min(ranks[0]["lambdas"][2:]) > 0
    assert ranks[0]["lambdas"] == pytest.approx(alone[1], rel=1e-3)


def test_two_halves_of_a_batch_train_both_players_as_the_whole_does(
    ranks: tuple[dict[str, Any], dict[str, Any]],
    alone: tuple[dict[str, Tensor], list[float], dict[str, float]],
) -> None:
    for name, value in alone[0].items():
        torch.testing.assert_close(ranks[0]["state"][name], ranks[1]["state"][name], rtol=0, atol=0)
        torch.testing.assert_close(
            ranks[0]["state"][name],
            value,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_the_validation_figures_of_two_ranks_are_those_of_one(
    ranks: tuple[dict[str, Any], dict[str, Any]],
    alone: tuple[dict[str, Tensor], list[float], dict[str, float]],
) -> None:
    assert {"val/psnr", "val/ssim", "val/perplexity", "val/codes_used"} <= alone[2].keys()
    for rank in ranks:  # 24 images, which the batch size does not divide
        assert rank["judged"] == pytest.approx(alone[2], rel=1e-4)


def planted(folder: Path) -> dict[str, Any]:
    """A run with augmentation and revival."""
    module = make_module(steps=4)
    module.tokenizer.quantizer.revive = 0.9  # type: ignore[assignment]
    shown: list[Tensor] = []
    augment = module.augment_images

    def augment_and_record(images: Tensor) -> Tensor:
        x = augment(images)
        shown.append(x.clone())
        return x

    module.augment_images = augment_and_record  # type: ignore[method-assign]
    doctor = TokenizerDoctor(every=2, patience=1)
    all_means: list[dict[str, float]] = []
    doctor.examine = lambda module, means: (all_means.append(means), iter(()))[1]  # type: ignore[method-assign,assignment,func-returns-value]
    data = Same(16, flip=True, crop="random", resize=18, cache="ram", batch_size=4)
    fit(
        module,
        [doctor],
        data=data,
        devices=2,
        strategy="ddp_find_unused_parameters_true",
        use_distributed_sampler=False,
    )
    state = module.tokenizer.state_dict()
    return {"shown": torch.stack(shown), "state": state, "means": all_means}


class Copies(Grain):
    def read_image(self, index: int, form: Form) -> tuple[Any, int]:
        return super().read_image(0, form)


class Same(Noise):
    """One image, many times, so that ranks differ by augmentation alone."""

    def open_source(self, split: str) -> Source:
        return Copies(24, split)


def test_ranks_augment_differently_and_agree_on_the_codebook_and_on_what_the_doctor_sees(
    tmp_path: Path,
) -> None:
    one, two = run_both_ranks(planted, tmp_path)
    assert not torch.equal(one["shown"], two["shown"])
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name
    assert one["means"] == two["means"]
    assert len(one["means"]) == 2
