"""Which codes masked priors draw next and again: against a slow reference, and the distributions of all grids of four codes."""

import math
from collections.abc import Sequence
from itertools import pairwise, permutations, product

import pytest
import torch
from torch import Tensor

from prior.decoding.filling import Filling, plan_steps
from prior.decoding.generate import sample
from prior.decoding.sampling import ORDERS, Numbers, Sampler
from prior.models.diffusion import Diffusion
from prior.models.masked import Masked
from prior.orders import halton
from tests.helpers.parts import make
from tests.helpers.priors import (
    DIM,
    TRANSFORMER,
    chi_square,
    draw_by_one_stream,
    every_grid,
    make_prior,
    record_runs,
)

MASKED = ["maskgit", "diffusion"]
SETTLED = ["random", "halton"]  # orders that do not depend on the codes
HIDDEN = -1

State = tuple[int, ...]  # codes, HIDDEN where they are masked
Law = dict[State, float]
Conditionals = dict[State, list[list[float]]]  # of each state, p of each code at each place


def masked(name: str, **settings: object) -> Masked:
    model = make_prior(name, **settings)  # type: ignore[arg-type]
    assert isinstance(model, Masked)
    return model


class TestPlan:
    def test_without_remasking_each_step_accepts_what_the_schedule_says(self) -> None:
        assert list(plan_steps([9, 7, 7, 3, 0], 0.0)) == [(2, 0), (0, 0), (4, 0), (3, 0)]
        assert list(plan_steps([0], 0.5)) == []

    @pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
    def test_as_many_codes_are_missing_as_the_schedule_says_whatever_is_masked_again(
        self, share: float
    ) -> None:
        missing = [50, 41, 30, 22, 9, 4, 0]
        left = missing[0]
        for (accepted, remasked), after in zip(
            plan_steps(missing, share), missing[1:], strict=True
        ):
            assert accepted <= left
            assert remasked <= min(missing[0] - left, after)
            left += remasked - accepted
            assert left == after

    def test_fractions_of_codes_are_masked_again_in_later_steps(self) -> None:
        remasked = [again for _, again in plan_steps([100, *[50] * 9, 0], 0.03)]
        assert remasked == [0, 1, 2, 1, 2, 1, 2, 1, 2, 0]


class TestQueue:
    def test_places_drawn_longest_ago_are_drawn_again_first(self) -> None:
        places = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
        filling = Filling(places, torch.rand(2, 4), Numbers(0, range(2)), make(Sampler))
        assert filling.accept(3).tolist() == [[3, 1, 0], [0, 1, 2]]
        assert filling.renew(1).tolist() == [[3], [0]]
        assert filling.remask(2).tolist() == [[1, 0], [1, 2]]
        assert filling.drawn.tolist() == [[3], [0]]
        assert filling.missing.tolist() == [[2, 1, 0], [3, 1, 2]]


def read_conditionals(model: Masked) -> Conditionals:
    """p of each code at each place, for all states of a grid of four codes."""
    states = list(product(range(HIDDEN, model.K), repeat=model.L))
    codes = torch.tensor(states)
    with torch.no_grad():
        p = model(codes.clamp(min=0), codes == HIDDEN).double().softmax(-1)
    return dict(zip(states, p.tolist(), strict=True))


def draw_places(p: Conditionals, law: Law, places: Sequence[int]) -> Law:
    """The law after the codes at these places, which are masked, are drawn independently of each other."""
    after: Law = {}
    for state, weight in law.items():
        assert all(state[t] == HIDDEN for t in places)
        grids: Law = {state: weight}
        for t in places:
            grids = {
                (*grid[:t], code, *grid[t + 1 :]): grids[grid] * p[state][t][code]
                for grid in grids
                for code in range(len(p[state][t]))
            }
        for grid, share in grids.items():
            after[grid] = after.get(grid, 0.0) + share
    return after


def hide_places(law: Law, places: Sequence[int]) -> Law:
    after: Law = {}
    for state, weight in law.items():
        new = tuple(HIDDEN if t in places else code for t, code in enumerate(state))
        after[new] = after.get(new, 0.0) + weight
    return after


def exact_law(
    p: Conditionals, order: Sequence[int], steps: Sequence[tuple[int, int]], corrector: int
) -> Law:
    """The probability of every grid if `order` is settled; of each step, how many codes it accepts and masks again."""
    law: Law = {(HIDDEN,) * len(order): 1.0}
    missing = list(order)
    drawn: list[int] = []
    for accepted, again in steps:
        places, missing = missing[:accepted], missing[accepted:]
        law = draw_places(p, law, places)
        law = hide_places(law, drawn[:again])
        missing += drawn[:again]
        drawn = drawn[again:] + places
        size = min(accepted, len(drawn) // 2)
        for _ in range(corrector):
            law = draw_places(p, hide_places(law, drawn[:size]), drawn[:size])
            drawn = drawn[size:] + drawn[:size]
    return law


def orders_of(name: str, grid: tuple[int, int]) -> list[list[int]]:
    """All orders, equally likely, in which a grid is filled in."""
    T = grid[0] * grid[1]
    if name == "halton":
        walk = list(halton(grid))
        return [walk[start:] + walk[:start] for start in range(T)]
    return [list(order) for order in permutations(range(T))]


def mean_law(
    model: Masked, name: str, steps: Sequence[tuple[int, int]], corrector: int = 0
) -> Tensor:
    """p (K^4,) of all grids, averaged over the orders."""
    orders = orders_of(name, model.grid)
    conditionals = read_conditionals(model)
    grids = [tuple(grid) for grid in every_grid(model).tolist()]
    p = torch.zeros(len(grids), dtype=torch.float64)
    for order in orders:
        law = exact_law(conditionals, order, steps, corrector)
        p += torch.tensor([law[grid] for grid in grids], dtype=torch.float64) / len(orders)
    return p


class Table(Diffusion):
    """A prior whose conditionals are those of one distribution, in which neighbouring codes mostly agree."""

    def __init__(self) -> None:
        codebook = torch.randn(1, 3, DIM)
        super().__init__(codebook, (2, 2), **TRANSFORMER, inputs="codes", dropout=0.0)
        self.grids = every_grid(self)
        a, b, c, d = self.grids.unbind(1)
        agreement = (a == b).double() + (b == d) + (d == c) + (c == a)
        self.p = (0.9 * agreement + 0.2 * self.grids.sum(1)).softmax(0)

    def forward(self, codes: Tensor, masked: Tensor, labels: Tensor | None = None) -> Tensor:
        agrees = (masked[:, None] | (codes[:, None] == self.grids)).all(2)  # (B, K^4)
        one_hot = torch.nn.functional.one_hot(self.grids, 3).double()
        return torch.einsum("bg,gtk->btk", agrees * self.p, one_hot).log().float()


class Inconsistent(Table):
    """The same, but the first place disagrees with its neighbours, so it matters what is drawn last."""

    def forward(self, codes: Tensor, masked: Tensor, labels: Tensor | None = None) -> Tensor:
        sharpness = torch.tensor([-0.7, 1.2, 1.2, 1.2])
        return super().forward(codes, masked, labels) * sharpness[:, None]


def draw_flat(model: Masked, sampler: Sampler, n: int) -> Tensor:
    return sample(model, sampler, n, seed=0, batch_size=n).flatten(1)


CASES = [  # steps, corrector, remask, and what each step accepts and masks again
    (4, 0, 0.0, [(1, 0)] * 4),
    (2, 0, 0.0, [(2, 0), (2, 0)]),
    (4, 1, 0.0, [(1, 0)] * 4),
    (2, 2, 0.0, [(2, 0), (2, 0)]),
    (1, 1, 0.0, [(4, 0)]),
    (4, 0, 1.0, [(1, 0), (2, 1), (2, 1), (1, 0)]),
    (6, 1, 0.5, [(0, 0), (1, 0), (1, 0), (1, 1), (2, 1), (1, 0)]),
]


@pytest.mark.parametrize("order", SETTLED)
@pytest.mark.parametrize(("steps", "corrector", "remask", "plan"), CASES)
def test_grids_are_drawn_as_often_as_their_probability_says(
    order: str,
    steps: int,
    corrector: int,
    remask: float,
    plan: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw_by_one_stream(monkeypatch)
    model = Inconsistent().eval()
    sampler = make(Sampler, order=order, steps=steps, corrector=corrector, remask=remask)
    assert list(plan_steps(model.schedule(sampler, 4), remask)) == plan
    p = mean_law(model, order, plan, corrector)
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    assert chi_square(draw_flat(model, sampler, 5000), p, 3) < 4


@pytest.mark.parametrize("order", SETTLED)
@pytest.mark.parametrize("corrector", [0, 1, 3])
def test_a_corrector_leaves_the_distribution_of_a_consistent_prior_as_it_is(
    order: str, corrector: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_by_one_stream(monkeypatch)
    model = Table().eval()
    drawn = draw_flat(model, make(Sampler, order=order, steps=4, corrector=corrector), 5000)
    assert chi_square(drawn, model.p, 3) < 4


@pytest.mark.parametrize("order", SETTLED)
def test_correctors_and_remasking_bring_codes_drawn_at_once_closer_to_the_distribution(
    order: str,
) -> None:
    model = Table().eval()

    def distance(steps: list[tuple[int, int]], corrector: int = 0) -> float:
        return float((mean_law(model, order, steps, corrector) - model.p).abs().sum())

    at_once, in_pairs, last_alone = [(4, 0)], [(2, 0), (2, 0)], [(3, 0), (1, 0)]
    assert distance(at_once, corrector=1) < 0.5 * distance(at_once)
    assert distance([(2, 0), (2, 2), (2, 2), (2, 0)]) < 0.8 * distance(in_pairs)
    # Correctors that draw one code reach the distribution itself.
    distances = [distance(last_alone, corrector) for corrector in (0, 1, 2, 6)]
    assert all(after < 0.3 * before for before, after in pairwise(distances))
    assert distances[-1] < 1e-3


def draw_slowly(model: Masked, sampler: Sampler, known: dict[int, int], i: int) -> list[int]:
    """Sample i of seed 0 by MaskGIT's algorithm, one sample and one code at a time; `known` are places and their codes."""
    numbers, L = Numbers(0, [i]), model.L
    codes = [known.get(t, HIDDEN) for t in range(L)]
    missing = [t for t in range(L) if t not in known]
    sure: dict[int, float] = {}  # log p of the code drawn last
    total, done = len(missing), []
    plan = list(plan_steps(model.schedule(sampler, total), sampler.remask))

    def propose(places: list[int], uniform: Tensor) -> dict[int, int]:
        read = torch.tensor([codes])
        logits = model(read.clamp(min=0), read == HIDDEN)[0] / sampler.temperature
        drawn = {}
        for t in places:
            p = logits[t].softmax(0).double()
            drawn[t] = int((p.cumsum(0) <= uniform[t] * p.sum()).sum())
            sure[t] = float(logits[t].log_softmax(0)[drawn[t]])
        return drawn

    for step, (accepted, again) in enumerate(plan, 1):
        if not accepted:
            continue
        uniform, luck = numbers.uniform(2, L)[0]
        noise = sampler.choice_temperature * (1 - step / len(plan))
        worst_first = done[:]
        proposed = propose(missing, uniform)
        score = {t: sure[t] - noise * math.log(-math.log(luck[t])) for t in sure}
        missing.sort(key=lambda t: -score[t])
        chosen, missing = missing[:accepted], missing[accepted:] + worst_first[:again]
        for t in worst_first[:again]:
            codes[t] = HIDDEN
        for t in chosen:
            codes[t] = proposed[t]
        done = sorted(worst_first[again:] + chosen, key=lambda t: score[t])
        for _ in range(sampler.corrector):
            renewed = done[: min(accepted, len(done) // 2)]
            for t in renewed:
                codes[t] = HIDDEN
            if renewed:
                for t, code in propose(renewed, numbers.uniform(L)[0]).items():
                    codes[t] = code
            done = done[len(renewed) :] + renewed
    return codes


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 4},
        {"steps": 12, "choice_temperature": 0.0, "temperature": 1.5},
        {"steps": 3, "corrector": 1, "choice_temperature": 1.0},
        {"steps": 4, "corrector": 2, "choice_temperature": 0.0},
        {"steps": 5, "remask": 0.7, "choice_temperature": 0.5},
        {"steps": 20, "remask": 0.3, "corrector": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MASKED)
@torch.no_grad()
def test_the_most_confident_codes_are_accepted_and_the_least_confident_ones_drawn_again(
    name: str, settings: dict[str, float]
) -> None:
    model = masked(name, grid=(3, 4))
    sampler = make(Sampler, order="confidence", **settings)  # type: ignore[arg-type]
    fixed = {1: 4, 6: 0}
    known = torch.tensor([t in fixed for t in range(12)])
    codes = torch.zeros(6, 12, dtype=torch.int64)
    for t, code in fixed.items():
        codes[:, t] = code
    filled = model.fill(codes, known, Numbers(0, range(6)), sampler, None)
    assert filled.tolist() == [draw_slowly(model, sampler, fixed, i) for i in range(6)]


@pytest.mark.parametrize("name", MASKED)
class TestOrders:
    def test_halton_fills_in_the_sequence_from_a_start_of_each_sample_s_own(
        self, name: str
    ) -> None:
        model, known = masked(name, grid=(3, 4)), torch.arange(12) == 5
        runs = record_runs(model)
        codes = torch.zeros(64, 12, dtype=torch.int64)
        sampler = make(Sampler, order="halton", steps=11)
        model.fill(codes, known, Numbers(0, range(64)), sampler, None)
        missing = sum(hidden.long() for _, hidden in runs)  # the later drawn, the larger
        walk = [t for t in halton((3, 4)) if t != 5]
        starts = set()
        for ranks in missing:  # type: ignore[union-attr]
            visited = ranks.argsort()[1:].tolist()  # the first is known
            start = walk.index(visited[0])
            assert visited == walk[start:] + walk[:start]
            starts.add(start)
        assert starts == set(range(11))

    @pytest.mark.parametrize("order", ORDERS)
    def test_every_order_draws_as_many_codes_in_each_step(self, name: str, order: str) -> None:
        def missing(chosen: str | None) -> list[list[int]]:
            model = masked(name, grid=(3, 5))
            runs = record_runs(model)
            codes = sample(model, make(Sampler, order=chosen, steps=6), 4, seed=0).flatten(1)
            for (before, hidden), (after, _) in zip(runs, [*runs[1:], (codes, None)], strict=True):
                assert torch.equal(after[~hidden], before[~hidden])
            return [hidden.sum(1).tolist() for _, hidden in runs]

        assert missing(order) == missing(None)

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize(("corrector", "remask"), [(0, 0.0), (2, 0.0), (0, 0.5), (1, 0.3)])
    def test_a_sample_depends_on_its_seed_and_number_alone(
        self, name: str, order: str, corrector: int, remask: float
    ) -> None:
        model = masked(name, grid=(3, 3))
        sampler = make(Sampler, order=order, steps=5, corrector=corrector, remask=remask)
        codes = sample(model, sampler, 10, seed=1)
        assert torch.equal(sample(model, sampler, 10, seed=1, batch_size=3), codes)
        assert not torch.equal(sample(model, sampler, 10, seed=2), codes)
        larger = sample(model, make(Sampler, **{**vars(sampler), "grid": "4x5"}), 10, seed=1)
        assert larger.shape == (10, 4, 5)

    @pytest.mark.parametrize("order", ORDERS)
    def test_what_is_drawn_again_is_hidden_first_and_known_codes_never_are(
        self, name: str, order: str
    ) -> None:
        model, known = masked(name, grid=(3, 4)), torch.arange(12) < 4
        runs = record_runs(model)
        codes = torch.randint(5, (8, 12))
        sampler = make(Sampler, order=order, steps=4, corrector=1, remask=0.5)
        filled = model.fill(codes, known, Numbers(0, range(8)), sampler, None)
        assert torch.equal(filled[:, known], codes[:, known])
        assert all(torch.equal(read[:, known], codes[:, known]) for read, _ in runs)
        assert not any(hidden[:, known].any() for _, hidden in runs)
        plan = list(plan_steps(model.schedule(sampler, 8), 0.5))
        expected = []
        missing = 8
        for accepted, again in plan:
            expected.append(missing)
            missing += again - accepted
            if renewed := min(accepted, (8 - missing) // 2):
                expected.append(missing + renewed)
        assert any(again for _, again in plan)
        assert [hidden.sum(1).tolist() for _, hidden in runs] == [[n] * 8 for n in expected]

    def test_only_remasking_takes_more_steps_than_codes(self, name: str) -> None:
        model = masked(name, grid=(2, 2))
        runs = record_runs(model)
        sample(model, make(Sampler, steps=30), 2, seed=0)
        assert len(runs) == 4
        runs.clear()
        sample(model, make(Sampler, steps=30, remask=1.0), 2, seed=0)
        assert len(runs) > 20

    def test_guidance_takes_a_code_that_is_drawn_again_for_missing(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shares: list[float] = []
        monkeypatch.setattr(Sampler, "scale", lambda _, drawn: shares.append(drawn) or 2.0)
        model = masked(name, grid=(2, 4), classes=2)
        runs = record_runs(model)
        sampler = make(Sampler, guidance=3.0, steps=3, corrector=1, remask=0.5)
        sample(model, sampler, 2, seed=0, labels=torch.tensor([0, 1]))
        assert shares == [1 - hidden[0].sum().item() / 8 for _, hidden in runs]
