"""Two processes with half a batch each against one with the whole: both players, the codebook and lambda, across the gate."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from tests.vqgan.test_module import Noise, fit, module
from tests.vqgan.test_module import pytestmark as warnings
from vqgan.losses.gate import Gate
from vqgan.losses.regularisers import R1, LeCam
from vqgan.losses.weight import AdaptiveWeight
from vqgan.module import VQGAN

pytestmark = [warnings, pytest.mark.slow]

STEPS = 7


def trained(batch_size: int, accumulate: int = 1, **settings: Any) -> tuple[VQGAN, list[float]]:
    """A GAN after some steps, and lambda after each. Adam would enlarge every rounding, so both players descend plainly."""
    gate, weight = Gate(start=2, ramp=2, warmup=2), AdaptiveWeight(scale=1.0, smooth=2)
    penalties = {"lecam": LeCam(0.1), "r1": R1(0.1, every=2)}
    made = module(gate, STEPS, adaptive=weight, codes_rest=False, accumulate=accumulate, **penalties)
    made.make_optimizers = dict.fromkeys((0, 1), lambda p: torch.optim.SGD(p, 0.05))
    made.tokenizer.quantizer.revive = 0.0  # type: ignore[assignment]  # which outputs are picked depends on their order
    lambdas: list[float] = []
    tick = made.tick
    made.tick = lambda: (lambdas.append(float(weight.weight)), tick())[1]  # type: ignore[method-assign,func-returns-value]
    fit(made, data=Noise(16, flip=False, cache="ram", batch_size=batch_size), **settings)
    return made, lambdas


def work(rank: int, folder: str, accumulate: int) -> None:
    torch.set_num_threads(1)
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "GROUP_RANK": 0,
        "MASTER_PORT": 29533 + accumulate,
    }
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="localhost", TORCHELASTIC_RUN_ID="test")
    made, lambdas = trained(2, accumulate, devices=2, strategy="ddp_find_unused_parameters_true", use_distributed_sampler=False)
    torch.save({"state": made.state_dict(), "lambdas": lambdas}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks hold, without and with micro-batches, whose gradients wait for the last to be shared."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder), request.param), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Tensor], list[float]]:
    made, lambdas = trained(4)
    return made.state_dict(), lambdas


def test_two_ranks_compute_one_lambda_and_it_is_that_of_the_whole_batch(
    ranks: list[dict[str, Any]], alone: tuple[dict[str, Tensor], list[float]]
) -> None:
    assert ranks[0]["lambdas"] == ranks[1]["lambdas"]
    assert ranks[0]["lambdas"][:2] == [0, 0]
    assert min(ranks[0]["lambdas"][2:]) > 0
    assert ranks[0]["lambdas"] == pytest.approx(alone[1], rel=1e-3)


def test_two_halves_of_a_batch_train_both_players_as_the_whole_does(
    ranks: list[dict[str, Any]], alone: tuple[dict[str, Tensor], list[float]]
) -> None:
    for name, value in alone[0].items():
        torch.testing.assert_close(ranks[0]["state"][name], ranks[1]["state"][name], rtol=0, atol=0)
        torch.testing.assert_close(ranks[0]["state"][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
