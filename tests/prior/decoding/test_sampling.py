"""Truncation, guidance, draws and their random numbers."""

import pytest
import torch

from codegrid.engine.errors import InputError
from prior.decoding.generate import sample
from prior.decoding.sampling import Numbers, Sampler, min_p, top_k, top_p
from tests.helpers.parts import make
from tests.helpers.priors import draw_by_one_stream, make_prior

INF = float("inf")


def test_top_k_keeps_the_k_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    assert top_k(logits, 2).tolist() == [[-INF, 3, 2, -INF]]
    assert torch.equal(top_k(logits, 9), logits)


def test_top_p_keeps_the_fewest_codes_that_have_probability_p_together() -> None:
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    masks = [top_p(logits, p).isfinite().tolist()[0] for p in (0.2, 0.5, 0.6, 0.95)]
    assert masks[0] == masks[1] == [True, False, False, False]
    assert masks[2] == [True, False, True, False]
    assert sum(masks[3]) == 4
    assert torch.equal(top_p(logits, 1.0), logits)


def test_min_p_keeps_codes_by_their_share_of_the_likeliest() -> None:
    logits = (
        torch.tensor([[0.5, 0.24, 0.25, 0.01], [0.97, 0.01, 0.01, 0.01]]).log() + 3
    )  # an offset changes nothing
    assert min_p(logits, 0.49).isfinite().tolist() == [
        [True, False, True, False],
        [True, False, False, False],
    ]
    assert min_p(logits, 0.01).isfinite().all(1).tolist() == [True, True]
    assert torch.equal(
        make(Sampler, min_p=1.0).draw(logits, torch.tensor([0.9, 0.9])), logits.argmax(-1)
    )


def test_the_defaults_of_conf_leave_the_distribution_as_it_is() -> None:
    assert make(Sampler) == Sampler.unmodified()


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = Sampler.unmodified().draw(p.log().expand(1000, 4), uniform)
    assert drawn.bincount(minlength=4).tolist() == [100, 0, 600, 300]


@pytest.mark.parametrize("number", [0.0, 0.999999999999])
def test_a_draw_never_leaves_the_codes_that_are_left(number: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 0.5, -4.0]])
    drawn = make(Sampler, top_k=2).draw(logits, torch.tensor([number], dtype=torch.float64))
    assert drawn.item() in (1, 2)


def test_top_1_and_a_low_temperature_take_the_likeliest_code() -> None:
    logits, uniform = torch.randn(50, 9), torch.rand(50)
    assert torch.equal(make(Sampler, top_k=1).draw(logits, uniform), logits.argmax(-1))
    assert torch.equal(make(Sampler, temperature=1e-4).draw(logits, uniform), logits.argmax(-1))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"guidance": -1},
        {"guidance_power": -1},
        {"steps": -1},
        {"choice_temperature": -0.5},
        {"order": "raster"},
        {"order": ""},
        {"corrector": -1},
        {"corrector": 0.5},
        {"remask": -0.1},
        {"remask": 1.1},
        {"remask": float("nan")},
    ],
)
def test_impossible_samplers_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"sampler\."):
        make(Sampler, **settings)  # type: ignore[arg-type]


def test_guided_samples_are_those_of_the_guided_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """p(code | label)^s / p(code)^(s - 1), normalised: Ho & Salimans 2022, eq. 5 and 6."""
    draw_by_one_stream(monkeypatch)
    model = make_prior("gpt", K=3, grid=(1, 1), classes=2)
    n = 30_000
    drawn = sample(
        model,
        make(Sampler, guidance=2.5),
        n,
        seed=0,
        batch_size=n,
        labels=torch.ones(n, dtype=torch.int64),
    )
    empty = torch.zeros(1, 1, dtype=torch.int64)
    conditional, unconditional = (
        model.judge(empty, torch.tensor([label])).logits[0, 0].softmax(0) for label in (1, -1)
    )
    p = conditional**2.5 / unconditional**1.5
    p /= p.sum()
    counts = drawn.flatten().bincount(minlength=3)
    assert (
        (counts - n * p).square() / (n * p)
    ).sum() < 16  # 2 degrees of freedom: 99.97% of fair draws stay below


def test_guidance_grows_over_the_grid_by_its_power() -> None:
    assert [make(Sampler, guidance=3.0).scale(t) for t in (0.0, 0.5, 1.0)] == [3, 3, 3]
    assert [make(Sampler, guidance=3.0, guidance_power=1.0).scale(t) for t in (0.0, 0.5, 1.0)] == [
        1,
        2,
        3,
    ]


def test_a_samples_numbers_are_its_own_whatever_the_others() -> None:
    alone, among = Numbers(3, [7]), Numbers(3, range(5, 9))
    assert torch.equal(alone.uniform(4)[0], among.uniform(4)[2])
    assert torch.equal(alone.uniform(2, 2)[0], among.uniform(2, 2)[2])
    numbers = Numbers(3, range(1000)).uniform(8)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(numbers.unique()) == 8000


def test_the_first_numbers_of_all_samples_are_uniform_together() -> None:
    n, bins = 20_000, 50
    first, second = Numbers(0, range(n)).uniform(2).unbind(1)
    for numbers in (first, second, (second - first) % 1):  # and each sample's are independent
        counts = (numbers * bins).long().bincount(minlength=bins)
        assert ((counts - n / bins).square() / (n / bins)).sum() < bins - 1 + 4 * (2 * bins) ** 0.5
