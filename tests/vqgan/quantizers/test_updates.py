"""What an update of a bottleneck does without a look at the device: counts, schedules, and the revival of so many rows."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch

from codegrid.engine.collectives import seeded_generator, share_seed
from codegrid.evaluation.code_counts import count_uses
from tests.helpers.parts import make
from vqgan.quantizers.anneal import Anneal
from vqgan.quantizers.codebook import Codebook, max_revived
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.gumbel import Gumbel
from vqgan.quantizers.residual import Residual
from vqgan.quantizers.vq import VQ

K, DIM = 128, 4


def test_codes_are_counted_as_bincount_counts_them() -> None:
    indices = torch.randint(5, (40,))
    assert torch.equal(count_uses(indices, 7), torch.bincount(indices, minlength=7))


def set_in_inference(quantizer: VQ) -> None:
    """As a validation exchanges weights and their average."""
    with torch.inference_mode():
        quantizer.updates.copy_(torch.tensor(9))


WAYS: dict[str, Callable[[VQ], Any]] = {
    "fill": lambda quantizer: quantizer.updates.fill_(9),
    "add": lambda quantizer: quantizer.updates.add_(6),
    "load": lambda quantizer: quantizer.load_state_dict(
        {**quantizer.state_dict(), "updates": torch.tensor(9)}
    ),
    "inference": set_in_inference,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_number_of_updates_follows_whatever_sets_it(way: str) -> None:
    quantizer = make(VQ, K, DIM)
    for _ in range(3):
        quantizer.update(quantizer(torch.randn(1, DIM, 4, 4)))
    assert quantizer.num_updates == 3
    WAYS[way](quantizer)
    assert quantizer.num_updates == 9
    quantizer.update(quantizer(torch.randn(1, DIM, 4, 4)))
    assert quantizer.num_updates == quantizer.updates == 10


def test_a_copy_has_the_number_of_updates_of_its_own_buffer() -> None:
    quantizer = make(VQ, K, DIM)
    quantizer.updates.fill_(7)
    copied = deepcopy(quantizer)
    assert copied.num_updates == 7
    copied.updates += 1
    assert (copied.num_updates, quantizer.num_updates) == (8, 7)


def test_a_quantizer_moves_to_a_device_with_the_number_of_its_updates() -> None:
    quantizer = make(VQ, K, DIM)
    quantizer.update(quantizer(torch.randn(1, DIM, 4, 4)))
    assert quantizer.to("meta").num_updates == 1  # there, no value can be read


def test_an_annealed_temperature_follows_the_number_of_updates() -> None:
    quantizer = make(Gumbel, K, DIM, temperature=Anneal(1.0, 0.25, 2))
    temperatures = []
    for _ in range(3):
        q = quantizer(torch.randn(1, DIM, 4, 4))
        temperatures.append(float(q.terms["temperature"]))
        quantizer.update(q)
    assert temperatures == pytest.approx([1.0, 0.5, 0.25])


@pytest.mark.parametrize("kind", [VQ, EMA])
@pytest.mark.parametrize("cosine", [False, True])
def test_revival_leaves_codes_that_live_as_they_are_to_the_bit(kind: Any, cosine: bool) -> None:
    quantizer: Codebook = make(kind, K, DIM, cosine=cosine, kmeans=False)
    z = quantizer.project(torch.randn(64, DIM))
    indices = quantizer.choose(z, quantizer.codes().detach())
    quantizer.counts.uniform_(0.2, 1.8)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    is_dead = before["counts"] < 0.5
    with torch.no_grad():
        quantizer.revive_codes(z, indices, 0.5)
    assert 0 < is_dead.sum() < max_revived(K)
    for name, value in quantizer.state_dict().items():
        if value.dim():
            assert torch.equal(value[~is_dead], before[name][~is_dead]), name
            assert (value[is_dead] != before[name][is_dead]).any(-1).all(), name
    assert (quantizer.counts[is_dead] == 1).all()


def test_an_update_revives_the_least_used_and_the_next_ones_the_rest() -> None:
    quantizer = make(VQ, K, DIM, kmeans=False)
    quantizer.counts.copy_(torch.linspace(0.01, 0.2, K)[torch.randperm(K)])
    z, indices = torch.randn(64, DIM), torch.zeros(64, dtype=torch.int64)
    order = quantizer.counts.argsort()
    n = max_revived(K)
    assert n == 64
    with torch.no_grad():
        quantizer.revive_codes(z, indices, 0.5)
        assert (quantizer.counts[order[:n]] == 1).all()
        assert (quantizer.counts[order[n:]] < 0.5).all()
        quantizer.revive_codes(z, indices, 0.5)
    assert (quantizer.counts == 1).all()


def test_the_random_numbers_of_an_update_do_not_depend_on_how_many_codes_are_dead() -> None:
    drawn = []
    for count in (0.1, 1.0):
        quantizer = make(VQ, K, DIM, kmeans=False)
        quantizer.counts.fill_(count)
        torch.manual_seed(3)
        quantizer.update(quantizer(torch.randn(1, DIM, 4, 4)))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize(("K", "n"), [(2, 2), (64, 64), (512, 64), (4096, 128), (2**18, 2**13)])
def test_more_codes_can_be_revived_than_die_without_any_use(K: int, n: int) -> None:
    """By the default decay of 0.99, a count of 1 falls below 0.5 within 69 updates."""
    assert max_revived(K) == n
    assert n >= K / 69


def test_ranks_draw_the_same_by_one_seed_and_other_numbers_at_other_moments() -> None:
    def draw(*numbers: int) -> list[float]:
        drawn: list[float] = torch.rand(4, generator=seeded_generator(*numbers)).tolist()
        return drawn

    assert draw(1, 20, 3) == draw(1, 20, 3)
    assert len({tuple(draw(*moment)) for moment in ((1, 20, 3), (1, 2, 3), (12, 0, 3))}) == 3


def test_one_process_cuts_by_its_own_random_numbers() -> None:
    quantizer = make(Residual, partial(make, EMA), 8, 4, DIM, nested=0.5).train()
    torch.manual_seed(5)
    starts = torch.rand(20).tolist()
    torch.manual_seed(5)
    users = [quantizer.count_users(1, torch.device("cpu")) for _ in range(20)]
    depths = [sum(n is None for n in counts) for counts in users]
    assert depths == [4 if start < 0.5 else 3 - int(6 * (start - 0.5)) for start in starts]
    assert share_seed(torch.device("cpu")) is None


def test_the_rows_of_the_main_rank_are_revived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal counts, ranks on other hardware may choose others."""
    quantizer = make(EMA, K, DIM)
    quantizer.counts.zero_()
    quantizer.counts[5] = 9.0
    chosen = torch.arange(max_revived(K))
    monkeypatch.setattr(
        "vqgan.quantizers.codebook.broadcast", lambda x: x if x.is_floating_point() else chosen
    )
    before = quantizer.codes().clone()
    quantizer.revive_codes(torch.randn(50, DIM), torch.randint(K, (50,)), 0.5)
    changed = (quantizer.codes() != before).any(1).nonzero().flatten().tolist()
    assert changed == [row for row in chosen.tolist() if row != 5]
    assert quantizer.counts[5] == 9
