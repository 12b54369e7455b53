import math

import pytest
import torch

from data.errors import InputError
from prior.models.bigram import bigram_nats
from prior.models.gpt import GPT
from prior.models.transformer import rotary, turn
from tests.prior.priors import made, stirred

K, DIM, GRID = 5, 3, (2, 3)


def test_codes_are_read_as_the_tokenizers_vectors() -> None:
    model = stirred(GPT(torch.zeros(1, K, DIM), GRID, width=16, depth=1, heads=2))  # vectors that are all alike
    assert torch.equal(model(torch.zeros(1, 6, dtype=torch.int64)), model(torch.full((1, 6), 3)))


def test_the_codebook_is_no_parameter() -> None:
    assert "read.vectors" not in dict(made("gpt").named_parameters())


def test_rotary_scores_depend_on_the_distance_between_places_alone() -> None:
    angles = rotary((4, 4), 8)
    q, k = torch.randn(2, 1, 1, 16, 8)
    q, k = q[:, :, :1].expand(-1, -1, 16, -1), k[:, :, :1].expand(-1, -1, 16, -1)  # the same vectors at every place
    scores = (turn(q, angles) @ turn(k, angles).mT)[0, 0].view(4, 4, 4, 4)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 1, 3, 3])
    torch.testing.assert_close(scores[1, 2, 0, 0], scores[3, 3, 2, 1])
    assert not torch.allclose(scores[0, 0, 1, 2], scores[0, 0, 2, 1])  # rows are not columns


def test_rotary_keeps_lengths_and_leaves_the_first_place_alone() -> None:
    x = torch.randn(1, 2, 6, 8)
    turned = turn(x, rotary((2, 3), 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])


@pytest.mark.parametrize(
    ("settings", "message"), [({"inputs": "pixels"}, "prior.inputs=pixels"), ({"heads": 3}, "prior.width=16 must be")]
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GPT(torch.randn(1, K, DIM), GRID, **{"width": 16, "heads": 2, **settings})  # type: ignore[arg-type]


def test_the_bigram_of_a_cycle_knows_almost_everything() -> None:
    cycle = torch.arange(12).view(1, 12).repeat(200, 1) % 3
    assert bigram_nats(cycle, cycle, 3) < 0.01


def test_the_bigram_of_noise_knows_nothing() -> None:
    noise = torch.randint(4, (2000, 10))
    assert bigram_nats(noise[:1500], noise[1500:], 4) == pytest.approx(math.log(4), abs=0.01)


def test_the_bigram_agrees_with_counting_by_hand() -> None:
    train, val = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1]]), torch.tensor([[0, 1, 1, 0]])
    unigram = [4 / 10, 6 / 10]  # counts 3 and 5, plus one each
    pairs = {(2, 0): 2, (0, 1): 3, (1, 0): 1, (1, 1): 2}
    total = {2: 2, 0: 3, 1: 3}

    def nats(strength: float) -> float:
        logs = [(2, 0), (0, 1), (1, 1), (1, 0)]
        return -sum(math.log((pairs[a, b] + strength * unigram[b]) / (total[a] + strength)) for a, b in logs) / 4

    best = min(nats(10 ** (-2 + 6 * i / 24)) for i in range(25))
    assert bigram_nats(train, val, 2) == pytest.approx(best)
