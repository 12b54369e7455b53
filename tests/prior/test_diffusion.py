from itertools import pairwise

import pytest
import torch

from prior.decoding.generate import sample
from prior.decoding.sampling import Numbers, Sampler
from prior.likelihood import negative_log_likelihood
from prior.models.masked import Masked
from tests.helpers.parts import make
from tests.helpers.priors import exact_bound, make_prior, record_runs

K = 5


def diffusion(**settings: object) -> Masked:
    model = make_prior("diffusion", **settings)  # type: ignore[arg-type]
    assert isinstance(model, Masked)
    return model


def test_what_it_learns_from_is_the_bound_that_it_is_judged_by() -> None:
    model, codes, n = diffusion(K=3, grid=(2, 2)), torch.tensor([[0, 2, 1, 1]]), 5000
    prediction = model.learn(codes.expand(n, -1), None, 0.0)
    nats = (negative_log_likelihood(prediction) * prediction.weights).mean(1).double()
    assert abs(nats.mean() - exact_bound(model, codes)[0]) < 4 * nats.std() / n**0.5


@pytest.mark.parametrize("n", [6, 60, 64])
def test_all_numbers_of_masked_codes_are_as_frequent_as_they_can_be_in_a_batch(n: int) -> None:
    for _ in range(20):
        masked = (diffusion().learn(torch.randint(K, (n, 6)), None, 0.0).weights > 0).sum(1)
        counts = masked.bincount(minlength=7)[1:]
        assert counts.sum() == n
        assert n // 6 <= counts.min() <= counts.max() <= -(-n // 6)


def test_a_grid_by_itself_may_have_any_number_of_masked_codes() -> None:
    model = diffusion()
    numbers = [
        int((model.learn(torch.randint(K, (1, 6)), None, 0.0).weights > 0).sum())
        for _ in range(100)
    ]
    assert set(numbers) == set(range(1, 7))


def test_every_grid_counts_the_same() -> None:
    weights = diffusion().learn(torch.randint(K, (64, 6)), None, 0.0).weights
    torch.testing.assert_close(weights.sum(1), torch.full((64,), 6.0))


def test_by_default_it_draws_code_by_code() -> None:
    model, known = diffusion(grid=(4, 5)), torch.arange(20) % 4 == 0
    runs = record_runs(model)
    model.fill(
        torch.zeros(2, 20, dtype=torch.int64),
        known,
        Numbers(0, range(2)),
        Sampler.unmodified(),
        None,
    )
    assert [int(hidden[0].sum()) for _, hidden in runs] == list(range(15, 0, -1))


def test_fewer_steps_draw_equal_shares() -> None:
    model = diffusion(grid=(3, 4))
    runs = record_runs(model)
    sample(model, make(Sampler, steps=5), 2, seed=0)
    missing = [*(int(hidden[0].sum()) for _, hidden in runs), 0]
    assert sorted(before - after for before, after in pairwise(missing)) == [2, 2, 2, 3, 3]
