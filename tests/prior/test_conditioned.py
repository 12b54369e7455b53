"""What every prior must do that is conditioned on vectors of numbers, or on the codes of another image."""

from typing import Any

import pytest
import torch

from codegrid.engine.errors import InputError
from prior.decoding.generate import sample
from prior.decoding.kv_decoder import StepCache, make_steps
from prior.decoding.sampling import Sampler
from prior.likelihood import negative_log_likelihood, weighted_mean
from prior.models.base import Autoregressive, PriorModel, UncachedDecoder
from prior.models.front import scaled_rotary
from prior.models.gpt import GPT
from prior.models.inputs import VectorEmbedding
from prior.models.transformer import Block, rotary
from tests.helpers.parts import make
from tests.helpers.priors import (
    CONDITIONS,
    PRIORS,
    build_prior,
    condition_on,
    draw_by_one_stream,
    every_grid,
    likelihoods,
    make_conditioned,
    make_conditions,
)

K = 5
NAMES = ["gpt", "gpt-embedding", "rar", "rq", "lstm", "maskgit", "diffusion", "pixelcnn"]
CASES = [
    (name, kind)
    for name in NAMES
    for kind in CONDITIONS
    if kind == "vectors" or PRIORS[name].kind.takes_front
]
EXACT = [(name, kind) for name, kind in CASES if PRIORS[name].kind.exact]
CAUSAL = [(name, kind) for name, kind in CASES if issubclass(PRIORS[name].kind, Autoregressive)]


def test_every_prior_with_a_place_for_codes_is_under_this_contract() -> None:
    kinds = {case.kind for case in PRIORS.values() if case.kind.takes_front}
    assert kinds == {PRIORS[name].kind for name, kind in CASES if kind == "codes"}


@pytest.mark.parametrize(("name", "kind"), EXACT)
def test_probabilities_of_all_grids_sum_to_one_given_each_condition(name: str, kind: str) -> None:
    model = make_conditioned(name, kind, K=3, grid=(2, 2) if name != "rq" else (1, 2))
    every = every_grid(model)
    for label in (*make_conditions(model, 2), blank(model)):
        p = likelihoods(model, every, label.expand(len(every), -1))
        assert p.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt", "vectors"), ("gpt", "codes"), ("rq", "two codebooks"), ("lstm", "codes")],
)
def test_grids_are_drawn_as_often_as_they_are_likely_given_the_condition(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_by_one_stream(monkeypatch)
    K, grid = (3, (2, 2)) if name != "rq" else (2, (1, 3))
    model = make_conditioned(name, kind, K=K, grid=grid)
    every, n = every_grid(model), 10_000
    [label] = make_conditions(model, 1)
    labels = label.expand(n, -1)
    drawn = sample(model, Sampler.unmodified(), n, seed=0, batch_size=n, labels=labels).flatten(1)
    place = (drawn * K ** torch.arange(model.L - 1, -1, -1)).sum(1)
    counts = place.bincount(minlength=len(every)).double()
    assert chi_square(counts, n * likelihoods(model, every, labels[: len(every)])) < 4
    others = (label.expand(len(every), -1) for label in make_conditions(model, 8, seed=1))
    far = [chi_square(counts, n * likelihoods(model, every, other)) for other in others]
    assert max(far) > 8, "samples of another condition would be noticed"


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations chi-square lies above what is expected."""
    many = expected > 5  # the others together are one more kind
    pairs = [torch.cat([x[many], x[~many].sum()[None]]) for x in (counts, expected)]
    value = float(((pairs[0] - pairs[1]).square() / pairs[1].clamp(min=1e-9)).sum())
    freedom = int(many.sum())
    return (value - freedom) / (2 * freedom) ** 0.5


def blank(model: PriorModel) -> torch.Tensor:
    labels = model.blank_labels(1)
    assert labels is not None
    return labels[0]


@pytest.mark.parametrize(("name", "kind"), CAUSAL)
@torch.no_grad()
def test_decoding_code_by_code_given_conditions_gives_the_same_logits(name: str, kind: str) -> None:
    model = make_conditioned(name, kind, grid=(3, 4))
    assert isinstance(model, Autoregressive)
    labels = torch.cat([make_conditions(model, 3), blank(model)[None]])
    codes = torch.randint(K, (4, model.L))
    decode = model.decoder(4, labels)
    steps = [decode(codes[:, t - 1] if t else None) for t in range(model.L)]
    torch.testing.assert_close(torch.stack(steps, 1), model(codes, labels), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_decoder_that_skips_the_codes_in_front_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_conditioned("gpt", "codes")
    assert isinstance(model, GPT)

    def skip(stack: Any, angles: torch.Tensor, n: int, labels: Any, cache: StepCache | None) -> Any:
        return make_steps(stack, angles, n, cache)

    monkeypatch.setattr(model, "start_steps", skip)
    labels = make_conditions(model, 4)
    logits = model.decoder(4, labels)(None)
    expected = UncachedDecoder(model, 4, labels)(None)
    assert not torch.allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), CASES)
class TestEveryCondition:
    def test_no_label_and_a_blank_one_are_the_same_and_others_are_not(
        self, name: str, kind: str
    ) -> None:
        model = make_conditioned(name, kind)
        codes = torch.randint(K, (1, model.L)).expand(3, model.L)
        labels = torch.cat([blank(model)[None], make_conditions(model, 2, seed=3)])
        logits = model.judge(codes, labels).logits
        torch.testing.assert_close(logits[:1], model.judge(codes[:1], None).logits)
        assert not torch.allclose(logits[0], logits[1])
        assert not torch.allclose(logits[1], logits[2])

    def test_the_condition_reaches_every_position(self, name: str, kind: str) -> None:
        model = make_conditioned(name, kind)
        codes = torch.randint(K, (1, model.L))
        one, other = (model.judge(codes, make_conditions(model, 1, seed=s)).logits for s in (0, 1))
        assert all(not torch.equal(one[0, t], other[0, t]) for t in range(model.L))

    def test_a_grid_is_judged_by_its_own_condition_in_any_batch(self, name: str, kind: str) -> None:
        model = make_conditioned(name, kind)
        codes, labels = torch.randint(K, (6, model.L)), make_conditions(model, 6)
        whole, part = model.judge(codes, labels), model.judge(codes[3:], labels[3:])
        torch.testing.assert_close(whole.logits[3:], part.logits, rtol=1e-4, atol=1e-5)

    def test_every_parameter_learns_of_conditions(self, name: str, kind: str) -> None:
        model = make_conditioned(name, kind).train()
        labels = make_conditions(model, 16)
        labels[:4] = blank(model)
        prediction = model.learn(torch.randint(K, (16, model.L)), labels, 0.3)
        weighted_mean(negative_log_likelihood(prediction), prediction).backward()
        names = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # Of several classes' vectors only that of none is left.
        assert names == []

    def test_an_untrained_prior_is_uniform_whatever_the_condition(
        self, name: str, kind: str
    ) -> None:
        model = build_prior(PRIORS[name])
        condition_on(model, kind)
        prediction = model.eval().judge(torch.randint(K, (8, model.L)), make_conditions(model, 8))
        nats = weighted_mean(negative_log_likelihood(prediction), prediction)
        assert nats.item() == pytest.approx(torch.tensor(K).log().item(), rel=1e-4)

    def test_guidance_of_one_changes_nothing_and_of_zero_forgets_the_condition(
        self, name: str, kind: str
    ) -> None:
        model = make_conditioned(name, kind)
        labels = make_conditions(model, 12)
        plain = sample(model, Sampler.unmodified(), 12, seed=1, labels=labels)
        free = sample(model, Sampler.unmodified(), 12, seed=1)
        unguided = make(Sampler, guidance=1.0, guidance_power=2.0)
        assert torch.equal(sample(model, unguided, 12, seed=1, labels=labels), plain)
        forgets = make(Sampler, guidance=0.0)
        assert torch.equal(sample(model, forgets, 12, seed=1, labels=labels), free)
        assert not torch.equal(plain, free)

    def test_the_seed_and_the_condition_decide_and_the_batch_size_does_not(
        self, name: str, kind: str
    ) -> None:
        model = make_conditioned(name, kind)
        labels = make_conditions(model, 7)
        guided = make(Sampler, guidance=2.0)
        codes = sample(model, guided, 7, seed=1, batch_size=7, labels=labels)
        assert torch.equal(codes, sample(model, guided, 7, seed=1, batch_size=3, labels=labels))
        assert torch.equal(codes[:3], sample(model, guided, 3, seed=1, labels=labels[:3]))

    def test_its_weights_go_into_a_file_and_back(self, name: str, kind: str) -> None:
        model, other = make_conditioned(name, kind), make_conditioned(name, kind)
        other.load_state_dict(model.state_dict())
        codes, labels = torch.randint(K, (4, model.L)), make_conditions(model, 4)
        expected = model.judge(codes, labels).logits
        assert torch.equal(expected, other.judge(codes, labels).logits)


def test_vectors_are_standardised_and_missing_numbers_are_the_mean_and_marked() -> None:
    mean, deviation = torch.tensor([10.0, -1.0]), torch.tensor([2.0, 4.0])
    embedding = VectorEmbedding(mean, deviation, 8)
    torch.nn.init.normal_(embedding.layers[2].weight)  # type: ignore[arg-type]
    inputs: list[torch.Tensor] = []
    embedding.layers.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    embedding(torch.tensor([[12.0, -5.0], [torch.nan, 3.0]]))
    assert torch.equal(inputs[0], torch.tensor([[1.0, -1.0, 0, 0], [0, 1, 1, 0]]))


def test_the_codes_in_front_turn_as_the_places_that_show_the_same() -> None:
    own = rotary((4, 6), 8).view(4, 6, 4)
    coarse = scaled_rotary((2, 3), (4, 6), 8).view(2, 3, 4)
    torch.testing.assert_close(coarse, own[::2, ::2])
    assert torch.equal(scaled_rotary((4, 6), (4, 6), 8), rotary((4, 6), 8))


def test_a_prior_of_classes_is_the_same_as_before_there_were_conditions() -> None:
    """To the bit: the stack reads what it has read, without codes in front."""
    torch.manual_seed(0)
    model = build_prior(PRIORS["gpt"], classes=3).eval()
    assert isinstance(model, GPT)
    torch.nn.init.normal_(model.head.weight)
    codes, labels = torch.randint(K, (4, model.L)), torch.tensor([0, 1, 2, -1])
    x = torch.cat([model.begin(4, labels)[:, None], model.read(codes[:, :-1])], 1)
    expected = model.logits(model.blocks(model.drop(x + model.place), model.angles))
    assert torch.equal(model(codes, labels), expected)
    assert [name for name in model.state_dict() if "front" in name or "numbers" in name] == []


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("bigram", "codes", "Bigram can't read the codes of another image; use prior=gpt"),
        ("bigram", "vectors", "Bigram can't be conditioned on anything; leave condition out"),
    ],
)
def test_a_prior_that_can_not_be_conditioned_says_so(name: str, kind: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        condition_on(build_prior(PRIORS[name]), kind)


def test_blocks_that_are_recomputed_are_those_of_the_stack_alone() -> None:
    model = make_conditioned("gpt", "codes")
    assert model.recomputed == [part for part in model.modules() if isinstance(part, Block)]
    assert model.front is not None
    assert [end for end in model.front.read if end not in model.ends] == []
