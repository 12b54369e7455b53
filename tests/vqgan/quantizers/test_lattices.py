"""FSQ, LFQ and BSQ against enumerations, slow versions and a published package."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.helpers.parts import make
from vqgan.quantizers.entropy import Entropy, entropy, joint_probabilities
from vqgan.quantizers.fsq import ACTIVATIONS, FSQ, PUBLISHED_LEVELS, choose_levels
from vqgan.quantizers.lattice import Lattice
from vqgan.quantizers.lfq import BSQ, LFQ


@pytest.mark.parametrize(
    "lattice",
    [
        make(FSQ, None, [5, 4, 3], activation="tanh"),
        make(FSQ, 240, activation="normal"),
        make(LFQ, 32),
        make(BSQ, 32),
    ],
    ids=lambda q: f"{type(q).__name__}{q.K}",
)
def test_the_codes_are_all_points_of_the_lattice_each_once(lattice: Lattice) -> None:
    all_indices = torch.arange(lattice.K)
    points = lattice.lookup(all_indices.view(1, 1, -1))[0, :, 0].t()
    values = [sorted({float(p) for p in points[:, i]}) for i in range(lattice.dim)]
    assert [len(v) for v in values] == lattice.levels.tolist()
    assert {tuple(p) for p in points.tolist()} == set(itertools.product(*values))
    assert torch.equal(lattice.to_index(lattice.to_digits(all_indices)), all_indices)


def test_fsq_rounds_to_the_nearest_point_of_the_bounded_grid() -> None:
    quantizer, z = make(FSQ, None, [8, 5, 4], activation="tanh"), 2 * torch.randn(3, 3, 4, 4)
    codes = quantizer.coordinates(quantizer.to_digits(torch.arange(160)))
    for b, i, j in itertools.product(range(3), range(4), range(4)):
        bounded = []
        for channel, level in enumerate([8, 5, 4]):
            reach, offset = (level - 1) * 1.001 / 2, 0.5 if level % 2 == 0 else 0.0
            shift = torch.atanh(torch.tensor(offset / reach))
            bounded.append(
                (torch.tanh(z[b, channel, i, j] + shift) * reach - offset) / (level // 2)
            )
        nearest = min(
            range(160), key=lambda k: float((codes[k] - torch.stack(bounded)).square().sum())
        )
        assert int(quantizer(z).indices[b, i, j]) == nearest


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [8, 6, 5], [3, 4]])
def test_fsq_agrees_with_vector_quantize_pytorch(levels: list[int]) -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    theirs, ours = package.FSQ(levels), make(FSQ, None, levels, activation="tanh")
    z = 2 * torch.randn(2, len(levels), 4, 4, requires_grad=True)
    other = z.detach().clone().requires_grad_()
    z_q, indices = theirs(z.movedim(1, -1).flatten(1, 2))
    q = ours(other)
    g = torch.randn_like(q.z_q)
    torch.testing.assert_close(q.z_q, z_q.unflatten(1, (4, 4)).movedim(-1, 1))
    assert torch.equal(q.indices, indices.unflatten(1, (4, 4)).long())
    one = torch.autograd.grad(z_q, z, g.movedim(1, -1).flatten(1, 2))[0]
    torch.testing.assert_close(torch.autograd.grad(q.z_q, other, g)[0], one)


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [3, 2, 4]])
@pytest.mark.parametrize(
    ("activation", "theirs", "slope"), [("normal", "normal", 1), ("logistic", "sigmoid", 1.6)]
)
def test_bins_of_a_distribution_agree_with_vector_quantize_pytorch(
    levels: list[int], activation: str, theirs: str, slope: float
) -> None:
    module = pytest.importorskip("vector_quantize_pytorch.finite_scalar_perturbation")
    package = module.FSP(levels, act_name=theirs, quantize_rate=1.0, vector_norm="none")
    ours = make(FSQ, None, levels, activation=activation)
    z = 2 * torch.randn(2, len(levels), 4, 4, requires_grad=True)
    other = z.detach().clone().requires_grad_()
    z_q, indices, *_ = package(slope * z.movedim(1, -1).flatten(1, 2))
    q = ours(other)
    g = torch.randn_like(q.z_q)
    torch.testing.assert_close(q.z_q, z_q.unflatten(1, (4, 4)).movedim(-1, 1))
    assert torch.equal(q.indices, indices.unflatten(1, (4, 4)).long())
    one = torch.autograd.grad(z_q, z, g.movedim(1, -1).flatten(1, 2))[0]
    torch.testing.assert_close(torch.autograd.grad(q.z_q, other, g)[0], one)


@pytest.mark.parametrize(
    ("activation", "alike"), [("normal", True), ("logistic", True), ("tanh", False)]
)
def test_outputs_of_the_distribution_use_all_levels_alike_and_have_the_variance_of_codes(
    activation: str, alike: bool
) -> None:
    quantizer = make(FSQ, None, [8, 5], activation=activation)
    p = (torch.arange(40_000) + 0.5) / 40_000
    normal = torch.special.ndtri(p)
    z = torch.logit(p) / 1.6 if activation == "logistic" else normal
    q = quantizer(torch.stack([z, z])[None, :, None])
    digits = quantizer.to_digits(q.indices).flatten(0, -2)
    shares = torch.bincount(digits[:, 0], minlength=8) / len(p)
    assert torch.allclose(shares, torch.full((8,), 1 / 8), atol=1e-3) == alike
    if alike:
        spread = q.z_q[0, 0].square().mean()
        torch.testing.assert_close(spread, torch.tensor(1 - 1 / 64), rtol=1e-3, atol=0)


def test_the_logistic_activation_is_that_of_ifsq() -> None:
    z, levels = torch.linspace(-4, 4, 33)[:, None], torch.tensor([7])
    bounded = ACTIVATIONS["logistic"].scale(ACTIVATIONS["logistic"].bound(z, levels), levels)
    torch.testing.assert_close(bounded / 3**0.5, 2 / (1 + torch.exp(-1.6 * z)) - 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_of_any_size_have_a_code(activation: str) -> None:
    quantizer = make(FSQ, None, [8, 5, 2], activation=activation)
    sizes = torch.tensor([0.0, 1.0, 5.0, 6.0, 40.0, 1e9, 1e30])
    z = torch.cat([-sizes, sizes]).expand(1, 3, 1, -1)
    digits = quantizer.to_digits(quantizer(z).indices)[0, 0]
    assert digits.min(0)[0].tolist() == [0, 0, 0]
    assert digits.max(0)[0].tolist() == [7, 4, 1]
    assert (digits[:, 0].unique(return_counts=True)[1] >= 1).all()


@pytest.mark.parametrize(
    ("K", "levels"),
    [
        *PUBLISHED_LEVELS.items(),
        (512, (8, 8, 8)),
        (128, (8, 4, 4)),
        (64, (8, 8)),
        (1000, (8, 5, 5, 5)),
        (7, (7,)),
    ],
)
def test_levels_are_the_published_ones_or_the_fewest_that_multiply_to_k(
    K: int, levels: tuple[int, ...]
) -> None:
    assert choose_levels(K) == levels


def test_the_k_of_fsq_is_the_product_of_its_levels() -> None:
    assert make(FSQ, 256).K == 240


def test_lfq_takes_signs_and_bsq_signs_on_the_sphere() -> None:
    z = torch.randn(2, 5, 3, 3)
    assert torch.equal(make(LFQ, 32).eval()(z).z_q, z.sign())
    torch.testing.assert_close(make(BSQ, 32).eval()(z).z_q, z.sign() / 5**0.5)
    torch.testing.assert_close(make(BSQ, 32).eval()(z).z_q.norm(dim=1), torch.ones(2, 3, 3))


def test_the_first_channel_is_the_lowest_bit() -> None:
    z = torch.tensor([1.0, -1.0, 1.0]).view(1, 3, 1, 1)
    assert make(LFQ, 8)(z).indices.item() == 0b101


def slow_entropies(codes: Tensor, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """From softmax(-d^2 / temperature) over the enumerated codes."""
    p = torch.softmax(-(torch.cdist(rows.double(), codes.double()) ** 2) / temperature, 1)
    return -(p * p.log()).sum(1).mean(), -(p.mean(0) * p.mean(0).log()).sum()


@pytest.mark.parametrize("kind", [LFQ, BSQ])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_the_entropy_of_independent_bits_is_that_of_the_enumerated_codes(
    kind: type[LFQ], temperature: float
) -> None:
    quantizer = make(
        kind, 32, beta=0.0, entropy=make(Entropy, 0.5, temperature=temperature, diversity=1.5)
    )
    z = torch.randn(4, 5, 3, 3)
    codes = quantizer.coordinates(quantizer.to_digits(torch.arange(32)))
    rows = quantizer.project(z).movedim(1, -1).reshape(-1, 5)
    sure, spread = slow_entropies(codes, rows, temperature)
    q = quantizer(z)
    torch.testing.assert_close(q.terms["entropy_sample"].double(), sure, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q.terms["entropy_codebook"].double(), spread, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q.loss.double(), 0.5 * (sure - 1.5 * spread), rtol=1e-4, atol=1e-5)


def test_the_joint_probability_of_bits_is_the_product_of_theirs() -> None:
    logits = torch.randn(6, 3)
    p = logits.sigmoid()
    joint = joint_probabilities(logits)
    for word, bits in enumerate(itertools.product([0, 1], repeat=3)):
        expected = torch.stack(
            [p[:, i] if bit else 1 - p[:, i] for i, bit in enumerate(bits)]
        ).prod(0)
        torch.testing.assert_close(joint[:, word], expected)


def test_entropy_is_log_n_for_n_equal_probabilities_and_zero_for_certainty() -> None:
    torch.testing.assert_close(entropy(torch.full((8,), 1 / 8)), torch.tensor(8.0).log())
    assert entropy(torch.tensor([1.0, 0.0])) == 0


def test_lfq_commits_with_beta_and_lfq_entropy_agrees_with_vector_quantize_pytorch() -> None:
    package = pytest.importorskip("vector_quantize_pytorch")
    theirs = package.LFQ(
        codebook_size=32,
        dim=5,
        entropy_loss_weight=0.1,
        commitment_loss_weight=0.25,
        diversity_gamma=1.0,
    )
    theirs.train()
    ours = make(LFQ, 32, beta=0.25, entropy=make(Entropy, 0.1, temperature=0.02))
    z = torch.randn(2, 5, 4, 4)
    z_q, _, loss = theirs(
        z, inv_temperature=100.0
    )  # theirs scales products of z and code, ours distances, which have an additional factor of 2
    q = ours(z)
    torch.testing.assert_close(q.z_q, z_q)
    torch.testing.assert_close(q.loss, loss, rtol=1e-2, atol=1e-3)


def test_outputs_of_any_scale_use_many_codes_after_initialisation() -> None:
    quantizer = make(FSQ, 512)
    z = 40 * torch.randn(1000, 3) - 7
    quantizer.initialise(z)
    rows = z[:64].t().reshape(1, 3, 8, 8)
    torch.testing.assert_close(quantizer.unstandardise(quantizer.standardise(rows)), rows)
    assert len(quantizer(rows).indices.unique()) > 30
