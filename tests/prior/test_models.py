import math

import pytest
import torch

from data.errors import InputError
from prior.models.bigram import bigram_nats
from prior.models.gpt import GPT
from prior.models.transformer import Cache, rotary, turn

K, DIM, GRID = 5, 3, (2, 3)


def gpt(inputs: str = "codes", **settings: int) -> GPT:
    model = GPT(torch.randn(K, DIM), GRID, inputs, **{"width": 16, "depth": 2, "heads": 2, **settings})
    for start in (model.head.weight, model.begin):  # they start at zero, where every test would pass
        torch.nn.init.normal_(start)
    return model.eval()


@pytest.mark.parametrize("inputs", ["codes", "embedding"])
class TestContract:
    def test_logits_have_one_row_a_code(self, inputs: str) -> None:
        assert gpt(inputs)(torch.randint(K, (4, 6))).shape == (4, 6, K)

    def test_changing_a_code_changes_no_logits_at_or_before_it(self, inputs: str) -> None:
        model, codes = gpt(inputs), torch.randint(K, (1, 6))
        before = model(codes)
        for t in range(6):
            changed = codes.clone()
            changed[0, t] = (codes[0, t] + 1) % K
            after = model(changed)
            assert torch.equal(after[:, : t + 1], before[:, : t + 1])
            if t + 1 < 6:
                assert not torch.allclose(after[:, t + 1 :], before[:, t + 1 :])

    def test_the_cached_logits_equal_the_uncached_ones(self, inputs: str) -> None:
        model, codes, cache = gpt(inputs), torch.randint(K, (4, 6)), Cache()
        steps = [model.step(codes[:, t - 1] if t else None, 4, t, cache) for t in range(6)]
        torch.testing.assert_close(torch.stack(steps, 1), model(codes), rtol=1e-4, atol=1e-5)

    def test_probabilities_of_all_grids_sum_to_one(self, inputs: str) -> None:
        model = GPT(torch.randn(3, DIM), (2, 2), inputs, width=16, depth=1, heads=2).eval()
        torch.nn.init.normal_(model.head.weight)
        every = torch.cartesian_prod(*[torch.arange(3)] * 4)
        logp = model(every).log_softmax(-1).gather(-1, every[..., None]).sum((1, 2))
        assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_no_label_and_minus_one_are_the_same_and_each_class_is_another() -> None:
    model, codes = gpt(classes=3), torch.randint(K, (1, 6)).expand(4, 6)
    logits = model(codes, torch.tensor([-1, 0, 1, 2]))
    assert torch.equal(logits[:1], model(codes[:1]))
    assert all(not torch.allclose(logits[a], logits[b]) for a in range(4) for b in range(a))


def test_the_label_reaches_the_first_position_and_every_other() -> None:
    model, codes = gpt(classes=2), torch.randint(K, (1, 6))
    one, other = (model(codes, torch.tensor([label])) for label in (0, 1))
    assert all(not torch.allclose(one[0, t], other[0, t]) for t in range(6))


def test_cached_logits_equal_uncached_ones_given_labels() -> None:
    model, codes, labels, cache = gpt(classes=3), torch.randint(K, (4, 6)), torch.tensor([0, 2, -1, 1]), Cache()
    steps = [model.step(codes[:, t - 1] if t else None, 4, t, cache, labels) for t in range(6)]
    torch.testing.assert_close(torch.stack(steps, 1), model(codes, labels), rtol=1e-4, atol=1e-5)


def test_an_untrained_prior_is_uniform() -> None:
    model = GPT(torch.randn(K, DIM), GRID, width=16, depth=2, heads=2)
    torch.testing.assert_close(model(torch.randint(K, (2, 6))).softmax(-1), torch.full((2, 6, K), 1 / K))


def test_codes_are_read_as_the_tokenizers_vectors() -> None:
    model = GPT(torch.zeros(K, DIM), GRID, width=16, depth=1, heads=2)  # vectors that are all alike
    torch.nn.init.normal_(model.head.weight)
    assert torch.equal(model(torch.zeros(1, 6, dtype=torch.int64)), model(torch.full((1, 6), 3)))


def test_the_codebook_is_no_parameter() -> None:
    assert "codebook" not in dict(gpt().named_parameters())


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
        GPT(torch.randn(K, DIM), GRID, **{"width": 16, "heads": 2, **settings})  # type: ignore[arg-type]


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
