"""What maskgit and diffusion share, against all masks and all orders of a grid of four codes."""

from collections.abc import Callable
from itertools import permutations

import pytest
import torch

from codegrid.engine.errors import InputError
from prior.decoding.generate import sample
from prior.decoding.sampling import Numbers, Sampler
from prior.likelihood import negative_log_likelihood
from prior.models.masked import Masked, random_subset
from tests.helpers.parts import make
from tests.helpers.priors import (
    chi_square,
    draw_by_one_stream,
    every_grid,
    exact_bound,
    logp,
    make_prior,
    record_runs,
)

K = 5

MASKED = ["maskgit", "diffusion"]

ORDERS = list(permutations(range(4)))


def masked(name: str, **settings: object) -> Masked:
    model = make_prior(name, **settings)  # type: ignore[arg-type]
    assert isinstance(model, Masked)
    return model


def order_averaged(model: Masked, codes: torch.Tensor) -> torch.Tensor:
    """p (B,): the mean over all orders of the product of the conditionals."""
    p = torch.zeros(len(codes), dtype=torch.float64)
    for order in ORDERS:
        p += sum(logp(model, codes, set(order[t:]))[:, order[t]] for t in range(4)).exp() / len(
            ORDERS
        )  # type: ignore[union-attr]
    return p


@pytest.mark.parametrize("name", MASKED)
class TestNetwork:
    def test_a_masked_code_is_seen_nowhere_and_any_other_everywhere(self, name: str) -> None:
        model, codes = masked(name), torch.randint(K, (1, 6))
        hidden = torch.tensor([[True, False, True, False, False, True]])
        before = model(codes, hidden)
        for t in range(6):
            changed = codes.clone()
            changed[0, t] = (codes[0, t] + 1) % K
            after = model(changed, hidden)
            assert torch.equal(after, before) if hidden[0, t] else (after != before).any(2).all()

    def test_being_masked_is_told_from_every_code(self, name: str) -> None:
        model, none = masked(name), torch.zeros(1, 6, dtype=torch.bool)
        unread = model(torch.zeros(1, 6, dtype=torch.int64), ~none)
        assert all(
            not torch.allclose(model(torch.full((1, 6), code), none), unread) for code in range(K)
        )

    def test_places_of_an_empty_grid_are_told_apart(self, name: str) -> None:
        logits = masked(name)(
            torch.zeros(1, 6, dtype=torch.int64), torch.ones(1, 6, dtype=torch.bool)
        )[0]
        assert all(not torch.allclose(logits[a], logits[b]) for a in range(6) for b in range(a))

    def test_impossible_settings_are_refused(self, name: str) -> None:
        with pytest.raises(InputError, match="prior.width=16 must be"):
            make_prior(name, heads=3)


@pytest.mark.parametrize("name", MASKED)
class TestBound:
    def test_its_mean_over_all_numbers_is_the_bound_itself(self, name: str) -> None:
        model, codes = masked(name, K=3, grid=(2, 2)), torch.tensor([[0, 2, 1, 1]])
        numbers = [[(m + 0.5) / 4, *order] for m in range(4) for order in ORDERS]
        prediction = model.bound(
            codes.expand(96, -1), None, torch.tensor(numbers, dtype=torch.float64)
        )
        nats = (negative_log_likelihood(prediction) * prediction.weights).mean()
        torch.testing.assert_close(nats.double(), exact_bound(model, codes)[0], rtol=1e-5, atol=0)

    def test_it_is_above_the_nats_of_the_mean_over_all_orders(self, name: str) -> None:
        model = masked(name, K=3, grid=(2, 2))
        codes = every_grid(model)
        assert (4 * exact_bound(model, codes) > -order_averaged(model, codes).log()).all()

    def test_codes_are_told_by_what_their_set_leaves(self, name: str) -> None:
        model, codes = masked(name), torch.randint(K, (40, 6))
        runs = record_runs(model)
        prediction = model.judge(codes, None)
        (_, one), (_, other) = runs
        assert torch.equal(one, ~other)
        for hidden in (one, other):
            logits = model(torch.where(hidden, (codes + 1) % K, codes), hidden)
            assert torch.equal(prediction.logits[hidden], logits[hidden])

    def test_both_sets_of_a_grid_count_the_same(self, name: str) -> None:
        model = masked(name)
        runs = record_runs(model)
        weights = model.judge(torch.randint(K, (100, 6)), None).weights
        split = weights[runs[0][1].sum(1) < 6], runs[0][1][runs[0][1].sum(1) < 6]
        torch.testing.assert_close((split[0] * split[1]).sum(1), torch.full((len(split[0]),), 3.0))
        torch.testing.assert_close(weights.sum(1), torch.full((100,), 6.0))

    def test_two_grids_are_judged_by_different_masks_and_the_same_one_always_alike(
        self, name: str
    ) -> None:
        model, codes = masked(name), torch.randint(K, (40, 6))
        weights = model.judge(codes, None).weights
        torch.manual_seed(5)
        assert torch.equal(model.judge(codes.flip(0), None).weights.flip(0), weights)
        assert len(weights.unique(dim=0)) > 15

    def test_sets_of_m_places_are_equally_likely(self, name: str) -> None:
        subsets = random_subset(torch.tensor(ORDERS), torch.full((24, 1), 2))
        sets, counts = subsets.unique(dim=0, return_counts=True)
        assert (sets.sum(1) == 2).all()
        assert counts.tolist() == [4] * 6


@pytest.mark.parametrize("name", MASKED)
class TestLearning:
    def test_a_code_that_counts_is_not_seen(self, name: str) -> None:
        model, codes = masked(name), torch.randint(K, (20, 6))
        torch.manual_seed(3)
        before = model.learn(codes, None, 0.0)
        torch.manual_seed(3)
        after = model.learn(torch.where(before.weights > 0, (codes + 1) % K, codes), None, 0.0)
        assert torch.equal(before.logits, after.logits)
        assert torch.equal(before.targets, codes)

    def test_every_grid_has_something_to_tell(self, name: str) -> None:
        assert (masked(name).learn(torch.randint(K, (1000, 6)), None, 0.0).weights > 0).any(1).all()

    def test_a_grid_of_one_code_can_be_learned_judged_and_drawn(self, name: str) -> None:
        model, codes = masked(name, grid=(1, 1)), torch.randint(K, (3, 1))
        assert (
            model.learn(codes, None, 0.0).weights.tolist()
            == model.judge(codes, None).weights.tolist()
            == [[1.0]] * 3
        )
        assert sample(model, Sampler.unmodified(), 4, seed=0).shape == (4, 1, 1)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("maskgit", make(Sampler, steps=4, order="confidence", choice_temperature=1e9)),
        ("diffusion", make(Sampler, order="random")),
    ],
)
def test_grids_drawn_code_by_code_in_random_order_are_as_frequent_as_the_mean_over_all_orders(
    name: str, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_by_one_stream(monkeypatch)
    model, n = masked(name, K=3, grid=(2, 2)), 10_000
    for p in model.head.parameters():
        p.data /= 2  # no grid so rare that it can't be counted
    every = every_grid(model)
    p = order_averaged(model, every)
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    assert chi_square(sample(model, sampler, n, seed=0, batch_size=n).flatten(1), p, 3) < 4


@pytest.mark.parametrize("name", MASKED)
class TestSampling:
    def test_codes_drawn_at_once_are_independent(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draw_by_one_stream(monkeypatch)
        model, n = masked(name, K=3, grid=(1, 2)), 4000
        every = every_grid(model)
        p = logp(model, every, {0, 1}).sum(1).exp()
        assert (
            chi_square(
                sample(model, make(Sampler, steps=1), n, seed=0, batch_size=n).flatten(1), p, 3
            )
            < 4
        )

    @pytest.mark.parametrize("steps", [1, 2, 5, 16, 99])
    def test_there_are_as_many_steps_as_are_asked_for_and_at_most_one_a_code(
        self, name: str, steps: int
    ) -> None:
        model = masked(name, grid=(4, 4))
        runs = record_runs(model)
        sample(model, make(Sampler, steps=steps), 2, seed=0)
        assert len(runs) == min(steps, 16)
        missing = [int(hidden[0].sum()) for _, hidden in runs]
        assert missing[0] == 16
        assert all(after < before for before, after in zip(missing, [*missing[1:], 0], strict=True))

    def test_what_is_decided_stays_and_is_read(self, name: str) -> None:
        model = masked(name, grid=(4, 4))
        runs = record_runs(model)
        codes = sample(model, make(Sampler, steps=6), 8, seed=0).flatten(1)
        for (before, hidden), (after, still) in zip(
            runs, [*runs[1:], (codes, torch.zeros(8, 16, dtype=torch.bool))], strict=True
        ):
            assert torch.equal(after[~hidden], before[~hidden])
            assert torch.equal(after[~still], codes[~still])
            assert not (still & ~hidden).any()

    def test_known_codes_are_read_from_the_first_step_on(self, name: str) -> None:
        model, known = masked(name), torch.tensor([True, False, False, True, False, False])
        runs = record_runs(model)
        codes = torch.randint(K, (7, 6))
        copy = codes.clone()
        model.fill(codes, known, Numbers(0, range(7)), Sampler.unmodified(), None)
        assert torch.equal(runs[0][1], ~known.expand(7, 6))
        assert all(torch.equal(read[:, known], copy[:, known]) for read, _ in runs)
        assert len(runs) == 4
        assert torch.equal(codes, copy)  # the caller's own are left alone

    @pytest.mark.parametrize(
        "settings", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-5}], ids=str
    )
    def test_every_way_to_be_safe_takes_the_likeliest_codes(
        self, name: str, settings: dict[str, float]
    ) -> None:
        model = masked(name)
        empty, hidden = torch.zeros(3, 6, dtype=torch.int64), torch.ones(3, 6, dtype=torch.bool)
        codes = sample(model, make(Sampler, steps=1, **settings), 3, seed=0)  # type: ignore[arg-type]
        assert torch.equal(codes.flatten(1), model(empty, hidden).argmax(-1))

    def test_guided_samples_are_those_of_the_guided_logits(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draw_by_one_stream(monkeypatch)
        model, n = masked(name, K=3, grid=(1, 1), classes=2), 4000
        drawn = sample(
            model,
            make(Sampler, guidance=2.5),
            n,
            seed=0,
            batch_size=n,
            labels=torch.ones(n, dtype=torch.int64),
        )
        empty, hidden = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
        conditional, unconditional = (
            model(empty, hidden, torch.tensor([label]))[0, 0].detach().double().softmax(0)
            for label in (1, -1)
        )
        p = conditional**2.5 / unconditional**1.5
        assert chi_square(drawn.flatten(1), p / p.sum(), 3) < 4

    def test_guidance_grows_with_the_share_that_is_there(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shares: list[float] = []
        scale: Callable[[Sampler, float], float] = Sampler.scale
        monkeypatch.setattr(
            Sampler, "scale", lambda sampler, drawn: shares.append(drawn) or scale(sampler, drawn)
        )
        model, known = masked(name, grid=(2, 4), classes=2), torch.arange(8) < 4
        sampler = make(Sampler, guidance=3.0, guidance_power=1.0, steps=4)
        model.fill(
            torch.zeros(2, 8, dtype=torch.int64),
            known,
            Numbers(0, range(2)),
            sampler,
            torch.tensor([0, 1]),
        )
        assert shares == [0.5, 0.625, 0.75, 0.875]

    @pytest.mark.parametrize("order", ["confidence", "random"])
    def test_places_are_filled_in_all_orders(self, name: str, order: str) -> None:
        model = masked(name, grid=(1, 4))
        runs = record_runs(model)
        sampler = make(Sampler, steps=4, order=order, choice_temperature=1e9)
        sample(model, sampler, 500, seed=0, batch_size=500)
        ranks = sum(hidden.long() for _, hidden in runs)  # in how many steps each was still missing
        assert len(ranks.unique(dim=0)) == 24  # type: ignore[union-attr]
