import math

import pytest
import torch

from prior.decoding.generate import sample
from prior.decoding.sampling import Numbers, Sampler
from prior.likelihood import negative_log_likelihood, weighted_mean
from prior.models.masked import Masked
from tests.helpers.parts import make
from tests.helpers.priors import draw_by_one_stream, make_prior, record_runs

K = 5


def maskgit(**settings: object) -> Masked:
    model = make_prior("maskgit", **settings)  # type: ignore[arg-type]
    assert isinstance(model, Masked)
    return model


def test_the_share_that_is_masked_is_the_cosine_of_a_uniform_angle() -> None:
    n = 10_000
    masked = (maskgit().learn(torch.randint(K, (n, 6)), None, 0.0).weights > 0).sum(1)
    for least in range(1, 7):  # cos(pi / 2 * u) * 6 > least - 1
        p = 2 / math.pi * math.acos((least - 1) / 6)
        assert (masked >= least).float().mean().item() == pytest.approx(
            p, abs=4 * (0.25 / n) ** 0.5 if least > 1 else 1e-9
        )


def test_every_place_is_masked_as_often_as_any_other() -> None:
    counts = (
        (maskgit().learn(torch.randint(K, (10_000, 6)), None, 0.0).weights > 0).double().mean(0)
    )
    torch.testing.assert_close(counts, counts.mean().expand(6), rtol=0, atol=0.02)


def test_the_loss_is_the_mean_over_all_masked_codes_of_the_batch() -> None:
    prediction = maskgit().learn(torch.randint(K, (30, 6)), None, 0.0)
    masked = prediction.weights > 0
    assert len(masked.sum(1).unique()) > 1  # so that a mean of the means of grids would be another
    torch.testing.assert_close(
        weighted_mean(negative_log_likelihood(prediction), prediction),
        negative_log_likelihood(prediction)[masked].mean(),
    )


def test_what_is_missing_follows_the_cosine_of_the_steps() -> None:
    model = maskgit(grid=(4, 4))
    runs = record_runs(model)
    sample(model, make(Sampler, steps=4), 3, seed=0)
    expected = [16, *(int(16 * math.cos(math.pi / 2 * step / 4)) for step in (1, 2, 3))]
    assert [hidden.sum(1).tolist() for _, hidden in runs] == [[n] * 3 for n in expected]


def test_the_schedule_is_that_of_the_codes_that_are_not_known() -> None:
    model, known = maskgit(grid=(4, 4)), torch.arange(16) < 8
    runs = record_runs(model)
    model.fill(
        torch.zeros(2, 16, dtype=torch.int64),
        known,
        Numbers(0, range(2)),
        make(Sampler, steps=4),
        None,
    )
    assert [int(hidden[0].sum()) for _, hidden in runs] == [8, 7, 5, 3]


def test_by_default_there_are_twelve_steps() -> None:
    model = maskgit(grid=(4, 8))
    runs = record_runs(model)
    sample(model, Sampler.unmodified(), 2, seed=0)
    assert len(runs) == 12


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_without_chance_the_most_confident_codes_are_accepted(temperature: float) -> None:
    model, sampler = (
        maskgit(grid=(4, 4)),
        make(
            Sampler,
            steps=2,
            order="confidence",
            choice_temperature=0.0,
            temperature=temperature,
        ),
    )
    runs = record_runs(model)
    codes = sample(model, sampler, 8, seed=0).flatten(1)
    (empty, hidden), (_, still) = runs
    logp = (model(empty, hidden) / temperature).log_softmax(-1)
    uniform = Numbers(0, range(8)).uniform(2, 16)[:, 0]
    drawn = torch.stack(
        [sampler.draw(logp[:, t] * temperature, uniform[:, t]) for t in range(16)], 1
    )
    confidence = logp.gather(-1, drawn[..., None])[..., 0]
    for i in range(8):
        # 16 * cos(pi / 4) = 11.3 are still missing.
        accepted = set(confidence[i].argsort(descending=True)[:5].tolist())
        assert {t for t in range(16) if not still[i, t]} == accepted
        assert all(codes[i, t] == drawn[i, t] for t in accepted)


def test_chance_has_its_weight_and_fades_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probability that the first of two places is accepted first is logistic in how much more confident it is, in
    units of choice_temperature * (1 - step / steps), as Gumbel noise makes it."""
    draw_by_one_stream(monkeypatch)
    model, n, choice = maskgit(grid=(1, 2)), 4000, 0.5
    for weight in (model.place, model.head.weight):  # so that one place is surer than the other
        torch.nn.init.normal_(weight)
    runs = record_runs(model)
    sampler = make(Sampler, steps=2, order="confidence", choice_temperature=choice, top_k=1)
    sample(model, sampler, n, seed=0, batch_size=n)
    one, other = model(*(part[:1] for part in runs[0])).log_softmax(-1).amax(-1)[0].tolist()
    assert abs(one - other) > 0.1
    p = 1 / (1 + math.exp((other - one) / (choice / 2)))
    assert (~runs[1][1][:, 0]).double().mean().item() == pytest.approx(p, abs=4 * (0.25 / n) ** 0.5)
