"""Codebooks that take over a smaller one: its codes stay, and new ones split the crowded clusters."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.codebook import Codebook, pick_members, split_crowded
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.fsq import FSQ
from vqgan.quantizers.gumbel import Gumbel
from vqgan.quantizers.ibq import IBQ
from vqgan.quantizers.product import Product
from vqgan.quantizers.residual import Residual
from vqgan.quantizers.search import nearest
from vqgan.quantizers.simvq import SimVQ
from vqgan.quantizers.vq import VQ


def make_vectors(n: int = 4000) -> Tensor:
    """Most vectors are close to the first of four centres."""
    centres = 4 * torch.eye(8)[:4]
    crowded = torch.multinomial(torch.tensor([0.7, 0.15, 0.1, 0.05]), n, replacement=True)
    return centres[crowded] + torch.randn(n, 8) / 2


def make_pair(
    kind: type[Codebook], K: int = 4, larger: int = 12, **switches: Any
) -> tuple[Any, Any, Tensor]:
    small, z = make(kind, K, 8, **switches).eval(), make_vectors()
    small.initialise(z)
    small.updates += 7
    grown = make(kind, larger, 8, **switches)
    grown.grow_from(small, z)
    return small, grown.eval(), z


@torch.no_grad()
def distortion(quantizer: Codebook, z: Tensor) -> float:
    z, codes = quantizer.project(z), quantizer.codes()
    return float((z - codes[nearest(z, codes)]).square().sum(1).mean())


@pytest.mark.parametrize("kind", [VQ, EMA, IBQ])
@pytest.mark.parametrize("cosine", [False, True])
def test_old_codes_keep_their_numbers_to_the_bit(kind: type[Codebook], cosine: bool) -> None:
    small, grown, _ = make_pair(kind, cosine=cosine)
    assert grown.K == 12
    assert torch.equal(grown.codebook[:4], small.codebook)
    assert grown.updates == small.updates == 7


@pytest.mark.parametrize("kind", [VQ, EMA])
@pytest.mark.parametrize("cosine", [False, True])
def test_growing_lowers_the_error_and_uses_the_new_codes(
    kind: type[Codebook], cosine: bool
) -> None:
    small, grown, z = make_pair(kind, cosine=cosine)
    assert distortion(grown, z) < 0.97 * distortion(small, z)
    used = torch.bincount(nearest(grown.project(z), grown.codes()), minlength=12)
    assert (used > 0).all()


def test_the_running_counts_are_one_on_average_and_halve_with_each_split() -> None:
    small, grown, z = make_pair(EMA)
    shares = torch.bincount(nearest(z, small.codes()), minlength=4) / len(z)
    assert grown.counts.mean() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(grown.sums, grown.codebook * grown.counts[:, None])
    # A cluster and its children keep its share together.
    parents, _ = split_crowded(torch.bincount(nearest(z, small.codes()), minlength=4), 12)
    for code in range(4):
        family = [code, *(4 + i for i, parent in enumerate(parents.tolist()) if parent == code)]
        assert float(grown.counts[family].sum()) / 12 == pytest.approx(
            float(shares[code]), rel=1e-3
        )


def test_the_most_crowded_code_is_split_first_and_again_while_it_is() -> None:
    counts = torch.tensor([40, 9, 0, 12])
    parents, after = split_crowded(counts, 8)
    assert parents.tolist() == [0, 0, 0, 3]  # 40; 20 and 20; then 12 before the four of 10
    assert after.tolist() == [10, 9, 0, 6, 10, 10, 10, 6]
    assert split_crowded(counts, 4)[0].tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_splitting_equals_a_slow_version(seed: int) -> None:
    torch.manual_seed(seed)
    counts = torch.randint(0, 1000, (6,)) * 64 + torch.arange(6)  # no ties
    families = {code: [float(n)] for code, n in enumerate(counts.tolist())}
    for _ in range(9):
        code = max(families, key=lambda c: max(families[c]))
        largest = max(families[code])
        families[code].remove(largest)
        families[code] += [largest / 2, largest / 2]
    parents, _ = split_crowded(counts, 15)
    children = Counter(parents.tolist())
    assert {code: len(sizes) - 1 for code, sizes in families.items()} == {
        code: children[code] for code in range(6)
    }


def test_members_are_of_their_parents_cluster_and_differ() -> None:
    indices = torch.tensor([2, 0, 2, 2, 1, 2, 0])
    z = torch.arange(7.0)[:, None]
    members = pick_members(z, indices, torch.tensor([2, 2, 0, 2, 2]))[:, 0].long().tolist()
    assert [int(indices[m]) for m in members] == [2, 2, 0, 2, 2]
    assert len({m for m in members if m in (0, 2, 3, 5)}) == 4


@pytest.mark.parametrize("kind", [Residual, Product])
def test_each_codebook_of_several_grows(kind: Any) -> None:
    extra = {"nested": 0.0} if kind is Residual else {}
    small = kind(lambda K, dim: make(EMA, K, dim), 4, 2, 8, **extra).eval()
    z = make_vectors()
    small.initialise(z)
    grown = kind(lambda K, dim: make(EMA, K, dim), 10, 2, 8, **extra)
    grown.grow_from(small, z)
    grown.eval()
    for new, old in zip(grown.inner_quantizers, small.inner_quantizers, strict=True):
        assert torch.equal(new.codebook[:4], old.codebook)

    def error(quantizer: Quantizer) -> float:
        return float((quantizer(z[:, :, None, None]).z_q[:, :, 0, 0] - z).square().mean())

    assert error(grown) < 0.97 * error(small)


def test_a_codebook_without_encoder_outputs_for_its_codes_still_grows() -> None:
    small = make(VQ, 4, 8).eval()
    grown = make(VQ, 9, 8)
    grown.grow_from(small, torch.randn(1, 8))
    assert grown.codebook.isfinite().all()


@pytest.mark.parametrize(
    "quantizer",
    [
        make(FSQ, 64),
        make(SimVQ, 8, 4),
        make(Gumbel, 8, 4),
        Product(lambda K, dim: make(SimVQ, K, dim), 4, 2, 8),
    ],
    ids=["fsq", "simvq", "gumbel", "product of simvq"],
)
def test_others_say_that_they_can_not(quantizer: Quantizer) -> None:
    assert not quantizer.grows
    with pytest.raises(InputError, match="can't grow; leave grow out"):
        quantizer.grow_from(quantizer, torch.randn(4, quantizer.in_dim))
