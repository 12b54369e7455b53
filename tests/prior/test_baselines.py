import io
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from codegrid.engine.errors import InputError
from prior.baselines import BASELINES, baselines
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.models import counted
from prior.models.bigram import Bigram
from prior.models.counted import Counted, count_pairs
from prior.models.uniform import Uniform
from prior.models.unigram import Unigram
from prior.module import negative_log_likelihood, weighted_mean
from tests.helpers.priors import every_grid, likelihoods

K, GRID = 4, (2, 3)


def sorted_codes(n: int, L: int, seed: int, K: int = K) -> np.ndarray:
    """Codes (n, L) in ascending order, so that each says something about the next."""
    return np.sort(np.random.default_rng(seed).integers(0, K, (n, L)), 1)


def count_sorted(kind: type[Counted], num_codebooks: int = 1, n: int = 200) -> Counted:
    model = kind(torch.empty(num_codebooks, K, 2), GRID)
    model.count(sorted_codes(n, model.L, 0), sorted_codes(50, model.L, 1))
    return model


def test_the_bigram_of_a_cycle_knows_almost_everything() -> None:
    cycle = np.arange(12)[None].repeat(200, 0) % 3
    assert baselines(cycle, cycle, 3)["bigram_nats_per_token"] < 0.01


def test_of_noise_nobody_knows_anything() -> None:
    noise = np.random.default_rng(0).integers(0, 4, (2000, 10))
    assert list(baselines(noise[:1500], noise[1500:], 4).values()) == pytest.approx(
        [math.log(4)] * 3, abs=0.01
    )


def test_each_baseline_knows_more_than_the_one_before() -> None:
    nats = baselines(sorted_codes(500, 6, 0), sorted_codes(100, 6, 1), K)
    assert list(nats) == [
        "uniform_nats_per_token",
        "unigram_nats_per_token",
        "bigram_nats_per_token",
    ]
    often = np.minimum(sorted_codes(500, 6, 0), 2)  # one code half of the time, one never
    uniform, unigram, bigram = baselines(often, often, K).values()
    assert bigram + 0.1 < unigram < uniform - 0.1


def test_the_uniform_needs_log_K_nats() -> None:
    assert baselines(sorted_codes(5, 6, 0), sorted_codes(5, 6, 1), K)[
        "uniform_nats_per_token"
    ] == pytest.approx(math.log(K))


def test_the_unigram_and_the_bigram_agree_with_counting_by_hand() -> None:
    train, val = np.array([[0, 1, 0, 1], [0, 1, 1, 1]]), np.array([[0, 1, 1, 0]])
    unigram = [4 / 10, 6 / 10]  # counts 3 and 5, plus one each
    followed = {(2, 0): 2, (0, 1): 3, (1, 0): 1, (1, 1): 2}  # 2 stands before the first
    total = {2: 2, 0: 3, 1: 3}

    def needed(strength: float) -> float:
        logs = [(2, 0), (0, 1), (1, 1), (1, 0)]
        return (
            -sum(
                math.log((followed[a, b] + strength * unigram[b]) / (total[a] + strength))
                for a, b in logs
            )
            / 4
        )

    nats = baselines(train, val, 2)
    assert nats["unigram_nats_per_token"] == pytest.approx(
        -(2 * math.log(0.4) + 2 * math.log(0.6)) / 4
    )
    assert nats["bigram_nats_per_token"] == pytest.approx(
        min(needed(10 ** (-2 + 6 * i / 24)) for i in range(25))
    )


@pytest.mark.parametrize("num_codebooks", [1, 2, 3])
def test_a_bigrams_rows_are_its_formula_in_each_codebook(num_codebooks: int) -> None:
    model = count_sorted(Bigram, num_codebooks, n=5)
    train = sorted_codes(5, model.L, 0).reshape(5, -1, num_codebooks)
    codes = torch.from_numpy(sorted_codes(3, model.L, 2))
    p = model(codes).softmax(-1).view(3, model.T, num_codebooks, K)
    for book in range(num_codebooks):
        alone = {
            b: ((train[..., book] == b).sum() + 1) / (train[..., book].size + K) for b in range(K)
        }
        followed: Counter[tuple[int, int]] = Counter()
        for row in train[..., book].tolist():
            followed.update(pairwise([-1, *row]))
        for i, row in enumerate(codes.view(3, -1, num_codebooks)[..., book].tolist()):
            for t, a in enumerate([-1, *row[:-1]]):
                n, s = sum(followed[a, b] for b in range(K)), float(model.s)  # type: ignore[arg-type]
                expected = [(followed[a, b] + s * alone[b]) / (n + s) for b in range(K)]
                assert p[i, t, book].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_codebooks", [1, 2])
@pytest.mark.parametrize("kind", BASELINES.values())
def test_nats_of_pairs_are_those_of_the_logits(kind: type[Counted], num_codebooks: int) -> None:
    model, codes = count_sorted(kind, num_codebooks), sorted_codes(20, 6 * num_codebooks, 2)
    prediction = model.judge(torch.from_numpy(codes), None)
    assert model.nats(count_pairs(codes, K, num_codebooks)) == pytest.approx(
        weighted_mean(negative_log_likelihood(prediction), prediction).item(), rel=1e-5
    )


def test_a_codebook_that_copies_its_neighbour_is_followed_by_itself_alone() -> None:
    random = np.random.default_rng(0).integers(0, 8, (2000, 10))
    same = np.stack([random, random], 2).reshape(
        2000, 20
    )  # the second book repeats the first at each position
    assert baselines(same[:1500], same[1500:], 8, num_codebooks=2)[
        "bigram_nats_per_token"
    ] == pytest.approx(math.log(8), abs=0.02)


@pytest.mark.parametrize("kind", BASELINES.values())
def test_with_one_codebook_probabilities_of_all_grids_sum_to_one(kind: type[Counted]) -> None:
    model = count_sorted(kind)
    assert likelihoods(model, every_grid(model)).sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", [Unigram, Bigram])
def test_what_has_not_counted_is_uniform(kind: type[Counted]) -> None:
    model = kind(torch.empty(2, K, 2), GRID)
    assert torch.equal(
        model(torch.randint(K, (3, 12))),
        Uniform(torch.empty(2, K, 2), GRID)(torch.randint(K, (3, 12))),
    )


def test_a_uniform_draws_each_code_equally_often() -> None:
    codes = sample(Uniform(torch.empty(1, K, 2), GRID), Sampler.unmodified(), 2000, seed=0)
    assert (
        codes.flatten(1).T.contiguous().flatten().bincount() / codes.numel()
    ).tolist() == pytest.approx([1 / K] * K, abs=0.02)


def test_the_strength_is_the_one_that_suits_the_validation_set() -> None:
    model, cycle = Bigram(torch.empty(1, K, 2), (1, 8)), np.arange(8)[None].repeat(50, 0) % K
    model.count(cycle, cycle)
    assert model.s == pytest.approx(0.01)  # pairs can be trusted
    model.count(cycle, np.random.default_rng(0).integers(0, K, (50, 8)))
    assert model.s == pytest.approx(1e4)  # pairs mislead


def test_sequences_are_counted_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = sorted_codes(101, 6, 0)
    whole = count_pairs(codes, K, 2)
    monkeypatch.setattr(counted, "COUNT_CHUNK", 60)
    parts = count_pairs(codes, K, 2)
    assert torch.equal(parts.keys, whole.keys)
    assert torch.equal(parts.n, whole.n)
    assert whole.n.sum() == codes.size


@pytest.mark.parametrize("kind", ["uint16", "uint32"])
def test_a_memory_map_is_counted_as_an_array(kind: str, tmp_path: Path) -> None:
    codes = sorted_codes(20, 6, 0, K=5000)
    np.save(tmp_path / "codes.npy", codes.astype(kind))
    mapped = np.load(tmp_path / "codes.npy", mmap_mode="r")
    assert baselines(mapped, mapped, 5000) == baselines(codes, codes, 5000)


def test_a_bigram_of_many_codes_keeps_the_pairs_that_occur() -> None:
    many = 2**18  # a table of all pairs would take half a terabyte
    codes = sorted_codes(50, 6, 0, K=many)
    model = Bigram(torch.empty(1, many, 0), GRID)
    model.count(codes, sorted_codes(10, 6, 1, K=many))
    assert sum(value.numel() for value in model.state_dict().values()) <= many + 2 * codes.size + 1
    assert model(torch.from_numpy(codes[:1])).exp().sum(2).shape == (1, 6)


@pytest.mark.parametrize("kind", BASELINES.values())
def test_counts_go_into_a_checkpoint_and_into_a_prior_that_has_not_counted(
    kind: type[Counted],
) -> None:
    model, fresh, file = count_sorted(kind), kind(torch.empty(1, K, 2), GRID), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    codes = torch.from_numpy(sorted_codes(5, 6, 2))
    assert torch.equal(fresh(codes), model(codes))


def test_a_checkpoint_without_the_pairs_is_refused() -> None:
    state = count_sorted(Bigram).state_dict()
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match="_extra_state"):
        Bigram(torch.empty(1, K, 2), GRID).load_state_dict(state)


def test_classes_are_refused() -> None:
    with pytest.raises(InputError, match="2 classes; use conditional=false"):
        Unigram(torch.empty(1, K, 2), GRID, classes=2)
