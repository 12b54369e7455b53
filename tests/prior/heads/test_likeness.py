"""Digits and groups of codes, by the vectors that they are decoded from."""

import pytest
import torch

from codegrid.engine.errors import InputError
from prior.heads.likeness import group_codes, rank_codes
from tests.helpers.parts import make
from vqgan.quantizers.fsq import FSQ
from vqgan.quantizers.lattice import Lattice
from vqgan.quantizers.lfq import BSQ, LFQ

LATTICES = {
    "lfq": lambda: make(LFQ, K=16),
    "bsq": lambda: make(BSQ, K=16),
    "fsq": lambda: make(FSQ, K=None, levels=[5, 3, 4]),
}


def clusters(n: int, size: int) -> torch.Tensor:
    """n * size points in groups far from each other, shuffled; point i is of the group i % n."""
    torch.manual_seed(0)
    return 10 * torch.randn(n, 6).repeat(size, 1) + 0.1 * torch.randn(n * size, 6)


@pytest.mark.parametrize("name", LATTICES)
def test_the_digits_of_a_lattice_are_its_channels(name: str) -> None:
    quantizer: Lattice = LATTICES[name]()
    quantizer.centre.normal_()
    quantizer.spread.uniform_(0.5, 2)
    levels, ranks = rank_codes(quantizer.codebooks()[0])
    assert list(levels) == quantizer.levels.tolist()
    expected = torch.zeros(quantizer.K, dtype=torch.int64)
    for level, digit in zip(levels, quantizer.to_digits(torch.arange(quantizer.K)).T, strict=True):
        expected = expected * level + digit
    assert torch.equal(ranks, expected)


@pytest.mark.parametrize("K", [2, 3, 5, 8, 13, 100])
def test_other_codes_have_as_many_bits_as_they_need_and_each_a_rank_of_its_own(K: int) -> None:
    levels, ranks = rank_codes(torch.randn(K, 4))
    assert set(levels) == {2}
    assert 2 ** (len(levels) - 1) < K <= 2 ** len(levels)
    assert sorted(ranks.tolist()) == list(range(K))


def test_a_part_of_a_lattice_is_none() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    levels, _ = rank_codes(corners)
    assert levels == (2, 2, 2)
    levels, ranks = rank_codes(corners[:6])
    assert levels == (2, 2, 2)
    assert sorted(ranks.tolist()) == list(range(6))


def test_codes_that_are_alike_share_their_first_bits() -> None:
    _, ranks = rank_codes(clusters(8, 4))
    for i in range(8):
        assert len((ranks[i::8] // 4).unique()) == 1


def test_a_group_has_codes_that_are_alike() -> None:
    groups = group_codes(clusters(8, 4), 4)
    assert groups.bincount().tolist() == [4] * 8
    for i in range(8):
        assert len(groups[i::8].unique()) == 1
    assert group_codes(torch.randn(10, 3), 4).bincount().tolist() == [4, 4, 2]


@pytest.mark.parametrize("size", [0, 1, 3, 12, 2.0, "16"])
def test_a_size_that_is_no_power_of_two_is_a_sentence(size: object) -> None:
    with pytest.raises(InputError, match=rf"prior\.head\.group_size={size} must be a power of two"):
        group_codes(torch.randn(8, 2), size)  # type: ignore[arg-type]
