import pytest
import torch
from torch import Tensor

from data.errors import InputError
from vqgan.quantizers.base import Quantizer, flatten, nearest, straight_through
from vqgan.quantizers.ema import EMA
from vqgan.quantizers.kmeans import kmeans

K, DIM = 16, 6
QUANTIZERS = [EMA(K, DIM)]  # the contract holds for each of these


def z(n: int = 2) -> Tensor:
    return torch.randn(n, DIM, 4, 4)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: type(q).__name__)
class TestContract:
    def test_shapes_and_types(self, quantizer: Quantizer) -> None:
        q = quantizer(z())
        assert q.z_q.shape == q.z_e.shape == (2, DIM, 4, 4)
        assert q.indices.shape == (2, 4, 4)
        assert q.indices.dtype == torch.int64
        assert q.indices.min() >= 0
        assert q.indices.max() < K
        assert q.loss.ndim == 0
        assert q.loss.isfinite()
        assert (quantizer.K, quantizer.dim) == (K, DIM)

    @pytest.mark.parametrize("training", [True, False])
    def test_lookup_inverts_indices_to_the_bit(self, quantizer: Quantizer, training: bool) -> None:
        q = quantizer.train(training)(z())
        assert torch.equal(quantizer.lookup(q.indices), q.z_q)

    def test_gradient_of_z_q_reaches_the_encoder_unchanged(self, quantizer: Quantizer) -> None:
        z_e, wanted = z().requires_grad_(), z()
        (quantizer(z_e).z_q * wanted).sum().backward()
        assert z_e.grad is not None
        assert torch.equal(z_e.grad, wanted)

    def test_forward_is_pure(self, quantizer: Quantizer) -> None:
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        quantizer.train()(z())
        assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())

    def test_a_batch_in_another_order_gives_the_same_codes(self, quantizer: Quantizer) -> None:
        x, order = z(5), torch.tensor([3, 1, 4, 0, 2])
        assert torch.equal(quantizer(x).indices[order], quantizer(x[order]).indices)

    def test_bf16_autocast_chooses_the_same_codes(self, quantizer: Quantizer) -> None:
        x = z(8)
        with torch.autocast("cpu", torch.bfloat16):
            cast = quantizer(x)
        assert torch.equal(cast.indices, quantizer(x).indices)
        assert cast.z_q.dtype == torch.float32

    def test_state_dict_round_trip(self, quantizer: Quantizer) -> None:
        other = type(quantizer)(K, DIM)
        other.load_state_dict(quantizer.state_dict())
        x = z()
        assert torch.equal(other(x).indices, quantizer(x).indices)


@pytest.mark.parametrize(("k", "dim"), [(1, 4), (0, 4), (2.5, 4), ("512", 4), (8, 0)])
def test_impossible_codebooks_are_refused(k: int, dim: int) -> None:
    with pytest.raises(InputError, match=r"quantizer\.(K|dim)="):
        EMA(k, dim)


def test_nearest_is_the_argmin_of_explicit_distances() -> None:
    vectors, codebook = torch.randn(50, 5), torch.randn(9, 5)
    slow = [min(range(9), key=lambda k: float(((v - codebook[k]) ** 2).sum())) for v in vectors]
    assert nearest(vectors, codebook).tolist() == slow
    assert nearest(vectors, codebook, at_once=20).tolist() == slow  # in small parts, the same


def test_straight_through_is_exactly_z_q() -> None:
    z_e, z_q = 1e6 * torch.randn(100), 1e-3 * torch.randn(100)
    assert torch.equal(straight_through(z_e, z_q), z_q)
    assert not torch.equal(z_e + (z_q - z_e).detach(), z_q)  # the usual form rounds


def test_a_perfect_codebook_has_zero_loss() -> None:
    quantizer = EMA(K, DIM)
    q = quantizer(quantizer.lookup(torch.randint(K, (2, 4, 4))))
    assert q.loss == 0


def test_the_commitment_loss_is_beta_times_the_mean_square_and_pulls_z_e_to_its_code() -> None:
    quantizer, z_e = EMA(K, DIM, beta=0.5), z().requires_grad_()
    q = quantizer(z_e)
    q.loss.backward()
    expected = 0.5 * (z_e - q.z_q.detach()).square().sum() / z_e.numel()
    torch.testing.assert_close(q.loss, expected)
    assert z_e.grad is not None
    torch.testing.assert_close(z_e.grad, 0.5 * 2 * (z_e - q.z_q).detach() / z_e.numel())


def test_the_codebook_is_the_running_mean_of_what_was_assigned_to_it() -> None:
    quantizer = EMA(4, 2, decay=0.9, kmeans=False, revive=0)
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


def test_codes_that_nobody_chose_stay_where_they_are() -> None:
    # From counts of 0, the first update would divide them by almost nothing and throw them out of reach.
    quantizer = EMA(K, DIM, kmeans=False, revive=0)
    before = quantizer.codebook.clone()
    x = before[0].view(1, DIM, 1, 1).expand(1, DIM, 4, 4)
    quantizer.update(quantizer(x))
    torch.testing.assert_close(quantizer.codebook, before)


def revived(split: float) -> tuple[EMA, Tensor, Tensor]:
    """A quantizer whose other codes died while code 3 was used alone, the code as it was chosen, and the outputs."""
    quantizer = EMA(K, DIM, decay=0.5, revive=0.3, split=split)
    x = quantizer.codebook[3].view(1, DIM, 1, 1) + 0.01 * torch.randn(2, DIM, 4, 4)
    for _ in range(2):  # after two halvings the others count a quarter
        quantizer.update(quantizer(x))
    return quantizer, quantizer.codebook[3], flatten(x)


def test_dead_codes_move_to_encoder_outputs_under_jukeboxs_rule() -> None:
    quantizer, _, outputs = revived(split=1.0)
    assert all((outputs - quantizer.codebook[k]).abs().sum(1).min() < 1e-6 for k in range(K) if k != 3)


def test_dead_codes_split_a_cluster_at_the_share_of_the_way_to_an_output() -> None:
    quantizer, code, outputs = revived(split=0.25)
    places = code + 0.25 * (outputs - code)
    assert all((places - quantizer.codebook[k]).abs().sum(1).min() < 1e-6 for k in range(K) if k != 3)


def test_a_revived_code_counts_as_average_and_its_sum_agrees() -> None:
    quantizer, _, _ = revived(split=0.25)
    assert torch.equal(quantizer.counts[[k for k in range(K) if k != 3]], torch.ones(K - 1))
    torch.testing.assert_close(quantizer.sums, quantizer.codebook * quantizer.counts[:, None])


def test_a_code_on_an_output_wins_less_of_a_cluster_in_many_dimensions_than_one_that_splits_it() -> None:
    points = torch.randn(4000, 64)
    shares = [nearest(points, torch.stack([torch.zeros(64), split * points[0]])).float().mean() for split in (0.2, 1.0)]
    assert shares[0] > 0.15
    assert shares[1] < 0.002


def test_revival_off_moves_nothing() -> None:
    quantizer = EMA(K, DIM, decay=0.5, revive=0)
    dead = quantizer.codebook[5].clone()
    for _ in range(20):
        quantizer.update(quantizer(quantizer.codebook[3].view(1, DIM, 1, 1).expand(2, DIM, 4, 4)))
    torch.testing.assert_close(quantizer.codebook[5], dead)


def test_kmeans_finds_the_clusters() -> None:
    centres = 10 * torch.randn(5, 3)
    points = centres.repeat(40, 1) + 0.01 * torch.randn(200, 3)
    found, counts = kmeans(points, 5)
    assert counts.tolist() == [40] * 5
    assert torch.cdist(centres, found).min(1).values.max() < 0.05


def test_kmeans_gives_every_centre_points_even_where_most_points_are_one() -> None:
    points = torch.cat([torch.zeros(1000, 4), torch.randn(200, 4)])
    _, counts = kmeans(points, 64)
    assert (counts > 0).sum() >= 60


def test_kmeans_lowers_the_error_of_its_start() -> None:
    points = torch.randn(500, 4)
    errors = [(points - c[nearest(points, c)]).square().sum() for c, _ in (kmeans(points, 16, n) for n in (0, 1, 10))]
    assert errors[0] > errors[1] > errors[2]


def test_kmeans_with_fewer_points_than_codes_still_fills_the_codebook() -> None:
    found, counts = kmeans(torch.randn(3, 4), 8)
    assert found.shape == (8, 4)
    assert found.isfinite().all()
    assert counts.sum() == 3


def test_start_places_the_codes_by_kmeans_and_keeps_the_statistics_consistent() -> None:
    quantizer = EMA(K, DIM)
    points = torch.randn(400, DIM)
    quantizer.start(points)
    assert (points - quantizer.codebook[nearest(points, quantizer.codebook)]).square().mean() < 0.6
    torch.testing.assert_close(quantizer.sums, quantizer.codebook * quantizer.counts[:, None])
    before = quantizer.codebook.clone()
    EMA(K, DIM, kmeans=False).start(points)
    assert torch.equal(quantizer.codebook, before)
