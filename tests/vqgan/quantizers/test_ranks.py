"""Two ranks with half a batch each compared to one process: equal statistics, initialisation and revival on all ranks."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from codegrid.evaluation.codebook import CodebookUse
from tests.helpers.parts import make
from tests.helpers.ranks import run_both_ranks
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.fsq import FSQ
from vqgan.quantizers.residual import Residual
from vqgan.quantizers.vq import VQ

pytestmark = pytest.mark.slow
K, DIM, STEPS = 16, 4, 6


def make_quantizers() -> dict[str, Quantizer]:
    torch.manual_seed(0)
    return {
        "ema": make(EMA, K, DIM, revive=0),
        "ema cosine": make(EMA, K, DIM, revive=0, cosine=True),
        "vq": make(VQ, K, DIM, revive=0),
        "fsq quantiles": make(FSQ, None, [2, 2, 2, 2], activation="quantiles"),
        "ema revived": make(EMA, K, DIM, revive=0.9, decay=0.5),
        "vq revived": make(VQ, K, DIM, revive=0.9, decay=0.5),
        "residual revived": make(Residual, partial(make, EMA), K, 2, DIM),
        "residual revived nested": make(Residual, partial(make, EMA), K, 4, DIM, nested=0.7),
    }


def make_batches() -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(4, DIM, 4, 4, generator=random) * (i + 1) for i in range(STEPS)]


def train(rank: int, ranks: int) -> dict[str, Any]:
    """The states after initialisation and STEPS updates on this rank's share of each batch."""
    states: dict[str, Any] = {}
    random = torch.Generator().manual_seed(2 + rank)
    for name, quantizer in make_quantizers().items():
        torch.manual_seed(100 + rank)  # ranks have different random numbers, as with different data
        quantizer.initialise(
            torch.randn(200, DIM, generator=random) if "revived" in name else torch.ones(200, DIM)
        )
        if "revived" not in name:
            quantizer.load_state_dict(make_quantizers()[name].state_dict())
        for x in make_batches():
            q = quantizer.train()(x.chunk(ranks)[rank])
            quantizer.update(q)
        states[name] = quantizer.state_dict()
    use = CodebookUse(K)
    use.update(torch.arange(8 * rank, 8 * rank + 8))  # each rank sees other codes
    states["use"] = use.compute()
    return states


def train_rank(folder: Path) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    states = train(rank, 2)
    dist.destroy_process_group()
    return states


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return run_both_ranks(train_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", list(make_quantizers()))
def test_both_ranks_hold_the_same_codebook(
    name: str, ranks: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    assert ranks[0][name].keys() == ranks[1][name].keys()
    for key, value in ranks[0][name].items():
        assert torch.equal(value, ranks[1][name][key]), key


@pytest.mark.parametrize("name", ["ema", "ema cosine", "vq"])
def test_two_halves_of_a_batch_give_the_statistics_of_the_whole(
    name: str, ranks: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    alone = train(0, 1)[name]
    for key, value in alone.items():
        torch.testing.assert_close(ranks[0][name][key], value, rtol=1e-5, atol=1e-5)


def test_perplexity_is_computed_over_all_ranks(
    ranks: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    """The mean of the two ranks' perplexities would be 8."""
    for rank in ranks:
        torch.testing.assert_close(rank["use"]["perplexity"], torch.tensor(16.0))
        assert rank["use"]["codes_used"] == 16
