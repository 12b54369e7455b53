import torch
from torch import Tensor

from tests.helpers.parts import make
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.search import flatten, nearest

K, DIM = 16, 6


def make_z_e(n: int = 2) -> Tensor:
    return torch.randn(n, DIM, 4, 4)


def test_a_perfect_codebook_has_zero_loss() -> None:
    quantizer = make(EMA, K, DIM)
    q = quantizer(quantizer.lookup(torch.randint(K, (2, 4, 4))))
    assert q.loss == 0


def test_the_commitment_loss_is_beta_times_the_mean_square_and_pulls_z_e_to_its_code() -> None:
    quantizer, z_e = make(EMA, K, DIM, beta=0.5), make_z_e().requires_grad_()
    q = quantizer(z_e)
    q.loss.backward()
    expected = 0.5 * (z_e - q.z_q.detach()).square().sum() / z_e.numel()
    torch.testing.assert_close(q.loss, expected)
    assert z_e.grad is not None
    torch.testing.assert_close(z_e.grad, 0.5 * 2 * (z_e - q.z_q).detach() / z_e.numel())


def test_codes_are_running_means_of_their_outputs() -> None:
    quantizer = make(EMA, 4, 2, decay=0.9, kmeans=False, revive=0)
    count, total = torch.ones(4), quantizer.codebook.clone()
    for _ in range(5):
        q = quantizer(torch.randn(3, 2, 4, 4))
        quantizer.update(q)
        for k in range(4):  # one code after another, from the definition
            mine = flatten(q.z_e)[q.indices.flatten() == k]
            share = 4 / q.indices.numel()
            count[k] = 0.9 * count[k] + 0.1 * len(mine) * share
            total[k] = 0.9 * total[k] + 0.1 * mine.sum(0) * share
    torch.testing.assert_close(quantizer.codebook, total / count[:, None])
    torch.testing.assert_close(quantizer.counts, count)


def test_codes_without_outputs_stay_in_place() -> None:
    # If counts started at 0, the first update would divide them by almost nothing.
    quantizer = make(EMA, K, DIM, kmeans=False, revive=0)
    before = quantizer.codebook.clone()
    x = before[0].view(1, DIM, 1, 1).expand(1, DIM, 4, 4)
    quantizer.update(quantizer(x))
    torch.testing.assert_close(quantizer.codebook, before)


def revive_codes(split: float) -> tuple[EMA, Tensor, Tensor]:
    """A quantizer in which all codes but number 3 died, that code, and the encoder outputs."""
    quantizer = make(EMA, K, DIM, decay=0.5, revive=0.3, split=split)
    x = quantizer.codebook[3].view(1, DIM, 1, 1) + 0.01 * torch.randn(2, DIM, 4, 4)
    for _ in range(2):  # after two halvings the others count a quarter
        quantizer.update(quantizer(x))
    return quantizer, quantizer.codebook[3], flatten(x)


def test_dead_codes_move_to_encoder_outputs_under_jukeboxs_rule() -> None:
    quantizer, _, outputs = revive_codes(split=1.0)
    assert all(
        (outputs - quantizer.codebook[k]).abs().sum(1).min() < 1e-6 for k in range(K) if k != 3
    )


def test_dead_codes_split_a_cluster_at_a_fraction_of_the_way_to_an_output() -> None:
    quantizer, code, outputs = revive_codes(split=0.25)
    places = code + 0.25 * (outputs - code)
    assert all(
        (places - quantizer.codebook[k]).abs().sum(1).min() < 1e-6 for k in range(K) if k != 3
    )


def test_a_revived_code_counts_as_average_and_its_sum_agrees() -> None:
    quantizer, _, _ = revive_codes(split=0.25)
    assert torch.equal(quantizer.counts[[k for k in range(K) if k != 3]], torch.ones(K - 1))
    torch.testing.assert_close(quantizer.sums, quantizer.codebook * quantizer.counts[:, None])


def test_in_many_dimensions_a_split_wins_more_of_a_cluster_than_a_code_at_an_output() -> None:
    points = torch.randn(4000, 64)
    shares = [
        nearest(points, torch.stack([torch.zeros(64), split * points[0]])).float().mean()
        for split in (0.2, 1.0)
    ]
    assert shares[0] > 0.15
    assert shares[1] < 0.002


def test_revival_off_moves_nothing() -> None:
    quantizer = make(EMA, K, DIM, decay=0.5, revive=0)
    dead = quantizer.codebook[5].clone()
    for _ in range(20):
        quantizer.update(quantizer(quantizer.codebook[3].view(1, DIM, 1, 1).expand(2, DIM, 4, 4)))
    torch.testing.assert_close(quantizer.codebook[5], dead)


def test_initialise_sets_codes_by_kmeans_with_consistent_statistics() -> None:
    quantizer = make(EMA, K, DIM)
    points = torch.randn(400, DIM)
    quantizer.initialise(points)
    assert (points - quantizer.codebook[nearest(points, quantizer.codebook)]).square().mean() < 0.6
    torch.testing.assert_close(quantizer.sums, quantizer.codebook * quantizer.counts[:, None])
    before = quantizer.codebook.clone()
    make(EMA, K, DIM, kmeans=False).initialise(points)
    assert torch.equal(quantizer.codebook, before)
