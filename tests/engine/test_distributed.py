"""Two processes with half a batch each against one with the whole: both players, the codebook and lambda, across the gate."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from data.source import Source
from tests.helpers.commands import free_port
from tests.helpers.parts import make
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
    """A GAN after some steps, and lambda after each. Adam would enlarge every rounding, so both players descend plainly."""
    gate, weight = Gate(start=2, ramp=2, warmup=2), paper_weight(scale=1.0, smooth=2)
    penalties = {"lecam": make(LeCam, 0.1), "r1": R1(0.1, every=2)}
    module = make_module(
        gate, STEPS, adaptive=weight, freeze_codes=False, accumulate=accumulate, **penalties
    )
    module.make_optimizers = dict.fromkeys((0, 1), lambda p: torch.optim.SGD(p, 0.05))
    module.tokenizer.quantizer.revive = 0.0  # type: ignore[assignment]  # which outputs are picked depends on their order
    lambdas: list[float] = []
    tick = module.tick
    module.tick = lambda: (lambdas.append(float(weight.weight)), tick())[1]  # type: ignore[method-assign,func-returns-value]
    fit(module, data=Noise(16, flip=False, cache="ram", batch_size=batch_size), **settings)
    return module, lambdas


def join(rank: int, port: int) -> None:
    """Be one of two processes, as torchrun would have started it."""
    torch.set_num_threads(1)
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "GROUP_RANK": 0,
        "MASTER_PORT": port,
    }
    os.environ.update(
        {name: str(value) for name, value in ranks.items()},
        MASTER_ADDR="localhost",
        TORCHELASTIC_RUN_ID="test",
    )


def work(rank: int, folder: str, accumulate: int, port: int) -> None:
    join(rank, port)
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
    torch.save(
        {"state": module.state_dict(), "lambdas": lambdas, "judged": judged[0]},
        f"{folder}/{rank}.pt",
    )


@pytest.fixture(scope="module", params=[1, 2])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What both ranks hold, without and with micro-batches, whose gradients wait for the last to be shared."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder), request.param, free_port()), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Tensor], list[float], dict[str, float]]:
    module, lambdas = trained(4)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    [judged] = module.trainer.validate(
        module, Noise(16, flip=False, cache="ram", batch_size=4), verbose=False
    )
    return state, lambdas, dict(judged)


def test_two_ranks_compute_one_lambda_and_it_is_that_of_the_whole_batch(
    ranks: list[dict[str, Any]], alone: tuple[dict[str, Tensor], list[float], dict[str, float]]
) -> None:
    assert ranks[0]["lambdas"] == ranks[1]["lambdas"]
    assert ranks[0]["lambdas"][:2] == [0, 0]
    assert min(ranks[0]["lambdas"][2:]) > 0
    assert ranks[0]["lambdas"] == pytest.approx(alone[1], rel=1e-3)


def test_two_halves_of_a_batch_train_both_players_as_the_whole_does(
    ranks: list[dict[str, Any]], alone: tuple[dict[str, Tensor], list[float], dict[str, float]]
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
    ranks: list[dict[str, Any]], alone: tuple[dict[str, Tensor], list[float], dict[str, float]]
) -> None:
    assert {"val/psnr", "val/ssim", "val/perplexity", "val/codes_used"} <= alone[2].keys()
    for rank in ranks:  # of 24 images, in batches that do not divide them
        assert rank["judged"] == pytest.approx(alone[2], rel=1e-4)


def planted(rank: int, folder: str, port: int) -> None:
    """A run with augmentation and revival."""
    join(rank, port)
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
    torch.save(
        {"shown": torch.stack(shown), "state": module.tokenizer.state_dict(), "means": all_means},
        f"{folder}/{rank}.pt",
    )


class Copies(Grain):
    def read_image(self, index: int, side: int, channels: int) -> tuple[Any, int]:
        return super().read_image(0, side, channels)


class Same(Noise):
    """One image, many times: what differs between ranks comes from the augmentation alone."""

    def open_source(self, split: str) -> Source:
        return Copies(24, split)


def test_ranks_augment_differently_and_agree_on_the_codebook_and_on_what_the_doctor_sees(
    tmp_path: Path,
) -> None:
    mp.spawn(planted, (str(tmp_path), free_port()), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not torch.equal(one["shown"], two["shown"])
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name
    assert one["means"] == two["means"]
    assert len(one["means"]) == 2
