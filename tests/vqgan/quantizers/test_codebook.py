"""Formulas of the learned codebooks against slow versions and a published package, and known mistakes of the field."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.errors import InputError
from tests.helpers.parts import make
from vqgan.quantizers.codebook import Codebook
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.entropy import Entropy
from vqgan.quantizers.ibq import IBQ
from vqgan.quantizers.search import flatten, nearest
from vqgan.quantizers.simvq import SimVQ
from vqgan.quantizers.vq import VQ

K, DIM = 16, 6


def make_z_e(n: int = 2) -> Tensor:
    return torch.randn(n, DIM, 4, 4)


def slow_vq_loss(z_e: Tensor, codebook: Tensor, indices: Tensor, beta: float) -> float:
    """The mean over elements of |sg(z_e) - e|^2 + beta |z_e - sg(e)|^2, in plain Python."""
    rows, total = flatten(z_e).tolist(), 0.0
    for row, index in zip(rows, indices.flatten().tolist(), strict=True):
        total += sum(
            (1 + beta) * (a - b) ** 2 for a, b in zip(row, codebook[index].tolist(), strict=True)
        )
    return total / z_e.numel()


def test_the_loss_is_the_codes_plus_beta_times_the_commitment() -> None:
    quantizer, z_e = make(VQ, K, DIM, beta=0.3), make_z_e()
    q = quantizer(z_e)
    assert float(q.loss.detach()) == pytest.approx(
        slow_vq_loss(z_e, quantizer.codebook.detach(), q.indices, 0.3), rel=1e-5
    )


def test_beta_weighs_the_commitment_and_not_the_codes() -> None:
    """With beta on the codes instead, as in legacy code, the encoder commits four times as strongly."""
    grads = {}
    for beta in (0.0, 0.25, 1.0):
        torch.manual_seed(0)
        quantizer, z_e = make(VQ, K, DIM, beta=beta), make_z_e().requires_grad_()
        quantizer(z_e).loss.backward()
        grads[beta] = (quantizer.codebook.grad, z_e.grad)
    assert torch.equal(grads[0.0][0], grads[1.0][0])  # the codes' gradient does not depend on beta
    assert not grads[0.0][1].any()
    torch.testing.assert_close(grads[0.25][1], grads[1.0][1] / 4)


def test_only_chosen_codes_get_a_gradient_and_it_points_from_their_outputs() -> None:
    quantizer, z_e = make(VQ, K, DIM), make_z_e()
    q = quantizer(z_e)
    q.loss.backward()
    for k in range(K):
        mine = flatten(z_e)[q.indices.flatten() == k]
        expected = (2 * (quantizer.codebook[k] - mine).sum(0) / z_e.numel()).detach()
        torch.testing.assert_close(quantizer.codebook.grad[k], expected)


def test_the_decoders_gradient_does_not_move_the_codes_of_vq() -> None:
    quantizer = make(VQ, K, DIM)
    quantizer(make_z_e().requires_grad_()).z_q.sum().backward()
    assert quantizer.codebook.grad is None


@pytest.mark.parametrize("kind", [VQ, EMA])
def test_the_decoders_gradient_reaches_z_e_unchanged(kind: Any) -> None:
    quantizer, z_e, g = make(kind, K, DIM), make_z_e().requires_grad_(), make_z_e()
    quantizer(z_e).z_q.backward(g)
    assert torch.equal(z_e.grad, g)


def test_no_code_is_nearer_than_the_chosen_one() -> None:
    """An argmax of distances, as some listings have it, would choose the farthest."""
    quantizer, z_e = make(VQ, K, DIM), make_z_e()
    distances = torch.cdist(flatten(z_e), quantizer.codebook.detach())
    chosen = distances.gather(1, quantizer(z_e).indices.view(-1, 1))
    assert (chosen <= distances + 1e-5).all()


@pytest.mark.parametrize("kind", [VQ, EMA, SimVQ, IBQ])
def test_cosine_compares_losses_and_looks_up_vectors_of_length_one(kind: Any) -> None:
    """If codes were normalised after the losses, or not in `lookup`, a prior would decode vectors unknown in training."""
    quantizer, z_e = make(kind, K, DIM, cosine=True).eval(), 5 * make_z_e()
    q = quantizer(z_e)
    torch.testing.assert_close(q.z_e.norm(dim=1), torch.ones(2, 4, 4))
    torch.testing.assert_close(quantizer.lookup(q.indices).norm(dim=1), torch.ones(2, 4, 4))
    cosines = flatten(F.normalize(z_e, dim=1)) @ F.normalize(quantizer.codes(), dim=1).t()
    assert torch.equal(q.indices.flatten(), cosines.argmax(1))
    torch.testing.assert_close(q.terms["commitment"], (2 - 2 * cosines.max(1).values).mean() / DIM)


def test_cosine_ema_codes_stay_of_length_one_and_consistent() -> None:
    quantizer = make(EMA, K, DIM, cosine=True)
    for _ in range(5):
        quantizer.update(quantizer(make_z_e()))
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(K))
    torch.testing.assert_close(F.normalize(quantizer.sums, dim=1), quantizer.codebook)


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_initialises_vq_and_ema_alike(cosine: bool) -> None:
    points = torch.randn(400, DIM)
    one, two = make(VQ, K, DIM, cosine=cosine), make(EMA, K, DIM, cosine=cosine)
    one.initialise(points)
    two.initialise(points)
    torch.testing.assert_close(one.codes().detach(), two.codes())
    torch.testing.assert_close(one.counts, two.counts)


def test_revival_replaces_dead_codes_of_vq_by_encoder_outputs_under_jukeboxs_rule() -> None:
    quantizer = make(VQ, K, DIM, decay=0.5, revive=0.3, split=1.0, kmeans=False)
    used = quantizer.codebook[3].detach().clone()
    x = used.view(1, DIM, 1, 1) + 0.01 * torch.randn(2, DIM, 4, 4)
    for _ in range(2):
        quantizer.update(quantizer(x))
    distances = (quantizer.codebook.detach()[:, None] - flatten(x)).abs().sum(2)
    assert torch.equal(quantizer.codebook[3], used)
    assert distances[[k for k in range(K) if k != 3]].min(1).values.max() < 1e-5
    assert torch.equal(quantizer.counts[4:], torch.ones(K - 4))


@pytest.mark.parametrize(("rate", "moved"), [(1.0, True), (0.2, True), (0.05, False)])
def test_dead_codes_stay_in_place_once_the_learning_rate_has_fallen(
    rate: float, moved: bool
) -> None:
    quantizer = make(EMA, K, DIM, revive=0.5, kmeans=False)
    before = quantizer.codebook[5].clone()
    quantizer.set_codes(torch.tensor([5]), before[None], torch.tensor([0.2]))  # of an average of 1
    quantizer.update(quantizer(quantizer.codebook[3].view(1, DIM, 1, 1).expand(2, DIM, 4, 4)), rate)
    assert bool((quantizer.codebook[5] - before).norm() > 0.1) == moved


def test_with_a_temperature_codes_are_sampled_by_their_distance() -> None:
    quantizer = make(VQ, 4, 2, temperature=1.5)
    point = torch.tensor([0.3, -0.2])
    x = point.view(1, 2, 1, 1).expand(50, 2, 20, 20)
    frequencies = torch.bincount(quantizer.train()(x).indices.flatten(), minlength=4) / 20_000
    expected = torch.softmax(-(quantizer.codebook.detach() - point).square().sum(1) / 1.5, 0)
    torch.testing.assert_close(frequencies, expected, atol=0.015, rtol=0)
    assert len(quantizer.eval()(x).indices.unique()) == 1


def test_kmeans_initialises_simvq_at_the_centres_of_the_encoder_outputs() -> None:
    points = torch.randn(500, DIM) @ torch.randn(DIM, DIM) + 3
    one, two = make(SimVQ, K, DIM), make(VQ, K, DIM)
    one.initialise(points)
    two.initialise(points)
    torch.testing.assert_close(one.codes().detach(), two.codes().detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.basis.std(), torch.tensor(1.0), rtol=0.2, atol=0)


def test_one_step_moves_all_codes_of_simvq_but_not_their_basis() -> None:
    quantizer = make(SimVQ, K, DIM)
    before, basis = quantizer.codes().detach(), quantizer.basis.clone()
    quantizer(make_z_e()).loss.backward()
    with torch.no_grad():
        for p in quantizer.parameters():
            p -= p.grad
    assert ((quantizer.codes() - before).abs().sum(1) > 1e-4).all()
    assert torch.equal(quantizer.basis, basis)


def test_ibq_reaches_every_code_by_the_decoders_gradient() -> None:
    quantizer = make(IBQ, K, DIM, kmeans=False).train()
    with torch.no_grad():
        quantizer.codebook *= 0.1  # so close together that no softmax weight vanishes
    q = quantizer(make_z_e().requires_grad_())
    assert len(q.indices.unique()) < K or K <= 16
    (q.z_q * make_z_e()).sum().backward()
    assert (quantizer.codebook.grad.abs().sum(1) > 0).all()


def test_ibq_chooses_as_vq_does() -> None:
    one, two = make(IBQ, K, DIM), make(VQ, K, DIM)
    two.load_state_dict(one.state_dict())
    x = make_z_e()
    assert torch.equal(one(x).indices, two(x).indices)


@pytest.mark.parametrize("training", [False, True])
def test_ibq_by_inner_product_chooses_the_largest_one_by_one(training: bool) -> None:
    quantizer = make(IBQ, K, DIM, score="inner_product").train(training)
    with torch.no_grad():
        quantizer.codebook *= torch.linspace(0.5, 3, K)[:, None]  # length decides, too
    z_e = make_z_e()
    q = quantizer(z_e)
    scores = (flatten(z_e) @ quantizer.codebook.detach().t()).tolist()
    slow = [max(range(K), key=row.__getitem__) for row in scores]
    assert q.indices.flatten().tolist() == slow
    assert q.indices.flatten().tolist() != nearest(flatten(z_e), quantizer.codebook).tolist()
    assert torch.equal(q.z_q, quantizer.lookup(q.indices))


def test_ibq_by_inner_product_has_the_gradient_of_its_softmax() -> None:
    quantizer = make(IBQ, K, DIM, score="inner_product", beta=0.0).train()
    z_e, weights = make_z_e(), make_z_e()
    (slope,) = torch.autograd.grad(
        (quantizer(z := z_e.clone().requires_grad_()).z_q * weights).sum(), z
    )
    codes = quantizer.codebook.detach()
    rows = flatten(z_e).requires_grad_()
    mixed = torch.softmax(rows @ codes.t(), 1) @ codes
    (slow,) = torch.autograd.grad((mixed * flatten(weights)).sum(), rows)
    torch.testing.assert_close(flatten(slope), slow)


def test_the_entropies_of_ibq_by_inner_product_are_those_of_its_softmax() -> None:
    entropy = make(Entropy, weight=0.1, temperature=0.5)
    quantizer = make(IBQ, K, DIM, score="inner_product", entropy=entropy)
    z_e = make_z_e()
    terms = quantizer(z_e).terms
    p = torch.softmax(2 * flatten(z_e) @ quantizer.codebook.detach().t() / 0.5, 1)
    per_sample, of_codebook = slow_entropies(p)
    assert float(terms["entropy_sample"]) == pytest.approx(per_sample, abs=1e-4)
    assert float(terms["entropy_codebook"]) == pytest.approx(of_codebook, abs=1e-4)


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(
        InputError, match="quantizer.score=cosine must be one of nearest, inner_product"
    ):
        make(IBQ, K, DIM, score="cosine")


def slow_entropies(p: Tensor) -> tuple[float, float]:
    """mean_n H(p_n) and H(mean_n p_n) of rows of probabilities, term by term."""
    rows = p.double().tolist()
    each = [
        -sum(v * torch.log(torch.tensor(v, dtype=torch.float64)).item() for v in row if v > 0)
        for row in rows
    ]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return sum(each) / len(each), -sum(
        v * torch.log(torch.tensor(v, dtype=torch.float64)).item() for v in mean if v > 0
    )


def test_the_entropies_of_distances_are_those_of_the_softmax() -> None:
    squared = 5 * torch.rand(30, K)
    sure, spread = make(Entropy, 0.1, temperature=0.7).from_distances(squared)
    expected = slow_entropies(torch.softmax(-squared / 0.7, 1))
    assert (float(sure), float(spread)) == pytest.approx(expected, rel=1e-5)


def test_entropy_enters_the_loss_with_its_weight_and_schedule() -> None:
    x = make_z_e()
    without = make(VQ, K, DIM, entropy=None)
    for updates, weight in ((0, 0.3), (50, 0.2), (100, 0.1), (500, 0.1)):
        quantizer = make(
            VQ, K, DIM, entropy=make(Entropy, 0.1, first=0.3, updates=100, diversity=2.0)
        )
        quantizer.load_state_dict(without.state_dict())
        quantizer.updates.fill_(updates)
        q = quantizer(x)
        sure, spread = slow_entropies(
            torch.softmax(-(torch.cdist(flatten(x), quantizer.codebook.detach()) ** 2), 1)
        )
        at = 0.3 * (1 / 3) ** (min(updates, 100) / 100)
        assert at == pytest.approx(weight, abs=0.03)
        assert float((q.loss - without(x).loss).detach()) == pytest.approx(
            at * (sure - 2 * spread), rel=1e-3
        )


def test_an_entropy_term_uses_more_codes() -> None:
    """Outputs cluster at one place and codes have only gradients: the term pulls unused codes there."""
    used = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        quantizer = make(
            VQ, K, DIM, kmeans=False, revive=0, entropy=make(Entropy, weight, temperature=1.0)
        )
        optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
        outputs = 0.3 * torch.randn(8, DIM, 4, 4) + 2
        for _ in range(150):
            optimizer.zero_grad()
            quantizer(outputs).loss.backward()
            optimizer.step()
        used[weight] = len(quantizer(outputs).indices.unique())
    assert used[1.0] > used[0.0]


class TestAgainstVectorQuantizePytorch:
    """Both agree to the number where they define the same thing."""

    def theirs(self, **settings: Any) -> Any:
        package = pytest.importorskip("vector_quantize_pytorch")
        return package.VectorQuantize(dim=DIM, codebook_size=K, accept_image_fmap=True, **settings)

    def test_ema_chooses_and_moves_alike(self) -> None:
        theirs = self.theirs(
            decay=0.9,
            eps=0.0,
            threshold_ema_dead_code=0,
            rotation_trick=False,
            commitment_weight=0.25,
        )
        ours = make(EMA, K, DIM, decay=0.9, beta=0.25, revive=0)
        book = theirs._codebook
        per_code = 2 * 4 * 4 / K  # our counts are 1 on average, theirs are outputs per batch
        book.embed_avg.data.copy_(ours.codebook[None] * per_code)
        book.embed.data.copy_(ours.codebook[None])
        book.cluster_size.data.fill_(per_code)
        theirs.train()
        for _ in range(5):
            x = make_z_e()
            z_q, indices, loss = theirs(x)
            q = ours(x)
            assert torch.equal(q.indices, indices)
            torch.testing.assert_close(q.z_q, z_q)
            torch.testing.assert_close(q.loss, loss.squeeze())
            ours.update(q)
            torch.testing.assert_close(ours.codebook, book.embed[0], rtol=1e-4, atol=1e-5)

    def test_the_rotation_tricks_gradient_is_alike(self) -> None:
        theirs = self.theirs(rotation_trick=True).eval()
        ours = make(VQ, K, DIM, gradient="rotation")
        ours.codebook.data.copy_(theirs._codebook.embed[0])
        x, g = make_z_e(), make_z_e()
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        theirs.train()
        theirs.freeze_codebook = True
        z_q = theirs(one, freeze_codebook=True)[0]
        z_q.backward(g)
        ours(two).z_q.backward(g)
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)


def test_every_learned_codebook_has_all_switches() -> None:
    """A quantizer that failed to pass one on would silently ignore it."""
    settings = {
        "beta": 0.5,
        "cosine": True,
        "gradient": "rotation",
        "temperature": 0.5,
        "decay": 0.9,
        "codebook_lr": 3.0,
    }
    for kind in (VQ, EMA, IBQ, SimVQ):
        quantizer: Codebook = make(kind, K, DIM, **settings)
        assert {name: getattr(quantizer, name) for name in settings} == settings
