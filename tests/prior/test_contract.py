"""What every prior must do."""

from functools import partial
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from codegrid.engine.errors import InputError
from prior.decoding.generate import sample
from prior.decoding.sampling import Numbers, Sampler
from prior.likelihood import negative_log_likelihood, weighted_mean
from prior.models.base import Autoregressive, PriorModel
from tests.helpers.configs import ROOT
from tests.helpers.parts import make
from tests.helpers.priors import (
    DIM,
    PRIORS,
    build_prior,
    documented_prior,
    draw_by_one_stream,
    every_grid,
    likelihoods,
    make_model,
    randomised,
)

K = 5
CASES = PRIORS | {"the example in docs/extending/prior.md": documented_prior()}
CAUSAL = [name for name, case in CASES.items() if issubclass(case.kind, Autoregressive)]
EXACT = [name for name, case in CASES.items() if case.kind.exact]
LABELLED = [name for name, case in CASES.items() if case.has_labels]
LABELS = torch.tensor([0, 1, 2, 1, -1] * 4)


def make_prior(name: str, **settings: Any) -> PriorModel:
    """As the helper of this name, of the documented example too."""
    return randomised(build_prior(CASES[name], **settings)).eval()


def test_every_file_of_conf_prior_has_a_line_in_the_contract() -> None:
    files = {
        file: OmegaConf.load(file)["_target_"] for file in (ROOT / "conf/prior").glob("*.yaml")
    }
    classes = {f"{case.kind.__module__}.{case.kind.__qualname__}" for case in PRIORS.values()}
    assert [file.name for file, target in files.items() if target not in classes] == []


def causal(name: str, **settings: Any) -> Autoregressive:
    model = make_prior(name, **settings)
    assert isinstance(model, Autoregressive)
    return model


def code_shape(model: PriorModel) -> tuple[int, ...]:
    """The shape of a grid of codes, without the number of codebooks if there is one."""
    return model.code_shape if model.num_codebooks > 1 else model.code_shape[:2]


@pytest.mark.parametrize("name", CAUSAL)
class TestOrder:
    def test_changing_a_code_changes_no_logits_at_or_before_it(self, name: str) -> None:
        model = causal(name)
        codes = torch.randint(K, (1, model.L))
        before = model(codes)
        for t in range(model.L):
            changed = codes.clone()
            changed[0, t] = (codes[0, t] + 1) % K
            after = model(changed)
            assert torch.equal(after[:, : t + 1], before[:, : t + 1])
            if t + model.num_codebooks < model.L and CASES[name].reads_codes:
                assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])

    def test_decoding_code_by_code_gives_the_same_logits(self, name: str) -> None:
        model = causal(name, grid=(3, 4))
        codes = torch.randint(K, (4, model.L))
        decode = model.decoder(4)
        steps = [decode(codes[:, t - 1] if t else None) for t in range(model.L)]
        torch.testing.assert_close(torch.stack(steps, 1), model(codes), rtol=1e-4, atol=1e-5)

    def test_sampling_that_remembers_equals_sampling_that_computes_all_anew(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = causal(name)
        codes = sample(model, Sampler.unmodified(), 20, seed=1)
        monkeypatch.setattr(model, "decoder", partial(Autoregressive.decoder, model))
        assert torch.equal(sample(model, Sampler.unmodified(), 20, seed=1), codes)

    def test_two_decoders_do_not_disturb_each_other(self, name: str) -> None:
        model = causal(name)
        one, other = model.decoder(2), model.decoder(2)
        first = one(None)
        other(None)
        other(torch.tensor([1, 2]))
        again = model.decoder(2)
        assert torch.equal(again(None), first)
        assert torch.equal(again(torch.tensor([0, 1])), one(torch.tensor([0, 1])))


@pytest.mark.parametrize("name", EXACT)
class TestLikelihood:
    def test_probabilities_of_all_grids_sum_to_one(self, name: str) -> None:
        model = make_prior(name, K=3, grid=(2, 2))
        assert likelihoods(model, every_grid(model)).sum().item() == pytest.approx(1, abs=1e-5)

    def test_grids_are_drawn_as_often_as_they_are_likely(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draw_by_one_stream(monkeypatch)
        K, grid = (3, (2, 2)) if CASES[name].num_codebooks == 1 else (2, (1, 3))
        model = make_prior(name, K=K, grid=grid)
        every, n = every_grid(model), 20_000
        codes = sample(model, Sampler.unmodified(), n, seed=0, batch_size=n).flatten(1)
        counts = (codes @ K ** torch.arange(model.L - 1, -1, -1)).bincount(minlength=len(every))
        expected = n * likelihoods(model, every)
        many = expected > 5  # the others together are one more kind
        counted = (
            torch.cat([counts[many], counts[~many].sum()[None]]),
            torch.cat([expected[many], expected[~many].sum()[None]]),
        )
        chi_square = float(((counted[0] - counted[1]).square() / counted[1].clamp(min=1e-9)).sum())
        freedom = int(many.sum())
        assert (
            chi_square < freedom + 4 * (2 * freedom) ** 0.5
        )  # four standard deviations above what is expected


@pytest.mark.parametrize("name", CASES)
class TestEveryPrior:
    def test_predictions_have_a_logit_of_each_code(self, name: str) -> None:
        model = make_prior(name)
        prediction = model.judge(torch.randint(K, (4, model.L)), None)
        assert prediction.logits.shape == (4, model.L, K)
        assert prediction.targets.shape == prediction.weights.shape == (4, model.L)
        assert prediction.logits.isfinite().all()

    def test_a_grid_is_judged_the_same_in_any_batch(self, name: str) -> None:
        model = make_prior(name)
        codes = torch.randint(K, (6, model.L))
        whole, part = model.judge(codes, None), model.judge(codes[3:], None)
        torch.testing.assert_close(
            (negative_log_likelihood(whole) * whole.weights)[3:],
            negative_log_likelihood(part) * part.weights,
            rtol=1e-4,
            atol=1e-5,
        )

    def test_an_untrained_prior_needs_log_K_nats(self, name: str) -> None:
        model = build_prior(CASES[name]).eval()
        prediction = model.judge(torch.randint(K, (50, model.L)), None)
        assert weighted_mean(
            negative_log_likelihood(prediction), prediction
        ).item() == pytest.approx(torch.tensor(K).log().item(), rel=1e-4)

    def test_every_parameter_learns(self, name: str) -> None:
        labelled = CASES[name].has_labels
        model = make_prior(name, classes=2 if labelled else 0).train()
        labels = torch.tensor([0, 1, -1, 0] * 4) if labelled else None
        prediction = model.learn(torch.randint(K, (16, model.L)), labels, 0.3)
        if any(p.requires_grad for p in model.parameters()):
            weighted_mean(negative_log_likelihood(prediction), prediction).backward()
        assert [
            key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()
        ] == []

    def test_the_seed_decides_and_the_batch_size_does_not(self, name: str) -> None:
        model = make_prior(name)
        codes = sample(model, Sampler.unmodified(), 20, seed=1, batch_size=20)
        assert codes.shape == (20, *code_shape(model))
        assert set(codes.unique().tolist()) <= set(range(K))
        assert torch.equal(codes, sample(model, Sampler.unmodified(), 20, seed=1, batch_size=3))
        assert torch.equal(codes[:5], sample(model, Sampler.unmodified(), 5, seed=1))
        assert not torch.equal(codes, sample(model, Sampler.unmodified(), 20, seed=2))

    def test_codes_that_are_known_stay_and_the_others_are_drawn(self, name: str) -> None:
        model = make_prior(name)
        codes, known = torch.randint(K, (64, model.L)), torch.arange(model.L) % 3 == 1
        filled = model.fill(codes, known, Numbers(0, range(64)), Sampler.unmodified(), None)
        assert torch.equal(filled[:, known], codes[:, known])
        assert (filled[:, ~known] != codes[:, ~known]).any(0).all()

    def test_nothing_is_drawn_where_all_is_known(self, name: str) -> None:
        model = make_prior(name)
        codes = torch.randint(K, (4, model.L))
        assert torch.equal(
            model.fill(
                codes,
                torch.ones(model.L, dtype=torch.bool),
                Numbers(0, range(4)),
                Sampler.unmodified(),
                None,
            ),
            codes,
        )

    def test_no_code_is_redrawn_by_what_it_was(self, name: str) -> None:
        """Or the prior would draw what it is shown."""
        model = make_prior(name)
        codes, uniform = torch.randint(K, (40, model.L)), torch.rand(40, model.L)

        def redraw(codes: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(1)  # of what a masked prior reads
            return model.redraw(codes, None, uniform, Sampler.unmodified())

        drawn = redraw(codes)
        assert drawn.shape == codes.shape
        for t in range(model.L):
            other = codes.clone()
            other[:, t] = (other[:, t] + 1) % K
            assert torch.equal(redraw(other)[:, t], drawn[:, t])

    def test_sampling_leaves_the_model_in_its_mode(self, name: str) -> None:
        model = make_prior(name).train()
        sample(model, Sampler.unmodified(), 2, seed=0)
        assert model.training

    def test_its_weights_go_into_a_file_and_back(self, name: str) -> None:
        model, other = make_prior(name), make_prior(name)
        other.load_state_dict(model.state_dict())
        codes = torch.randint(K, (4, model.L))
        assert torch.equal(model.judge(codes, None).logits, other.judge(codes, None).logits)

    def test_inputs_of_several_codebooks_are_taken_or_refused(self, name: str) -> None:
        case = CASES[name]
        if case.num_codebooks == 1 and name != "var":  # which takes one for each scale
            with pytest.raises(InputError, match="prior=rq"):
                make_model(case.kind, torch.randn(2, K, DIM), (2, 3), **case.settings)


@pytest.mark.parametrize("name", LABELLED)
class TestLabels:
    def test_no_label_and_minus_one_are_the_same_and_each_class_is_another(self, name: str) -> None:
        model = make_prior(name, classes=3)
        codes = torch.randint(K, (1, model.L)).expand(4, model.L)
        logits = model.judge(codes, torch.tensor([-1, 0, 1, 2])).logits
        torch.testing.assert_close(logits[:1], model.judge(codes[:1], None).logits)
        assert all(not torch.allclose(logits[a], logits[b]) for a in range(4) for b in range(a))

    def test_the_label_reaches_every_position(self, name: str) -> None:
        model = make_prior(name, classes=2)
        codes = torch.randint(K, (1, model.L))
        one, other = (model.judge(codes, torch.tensor([label])).logits for label in (0, 1))
        assert all(not torch.equal(one[0, t], other[0, t]) for t in range(model.L))

    def test_guidance_of_one_changes_nothing_and_of_zero_forgets_the_label(self, name: str) -> None:
        model = make_prior(name, classes=3)
        plain = sample(model, Sampler.unmodified(), 20, seed=1, labels=LABELS)
        assert torch.equal(
            sample(
                model, make(Sampler, guidance=1.0, guidance_power=2.0), 20, seed=1, labels=LABELS
            ),
            plain,
        )
        assert torch.equal(
            sample(model, make(Sampler, guidance=0.0), 20, seed=1, labels=LABELS),
            sample(model, Sampler.unmodified(), 20, seed=1),
        )
        assert not torch.equal(plain, sample(model, Sampler.unmodified(), 20, seed=1))


@pytest.mark.parametrize("name", [name for name in CAUSAL if name in LABELLED])
def test_decoding_code_by_code_given_labels_gives_the_same_logits(name: str) -> None:
    model, labels = causal(name, classes=3), torch.tensor([0, 2, -1, 1])
    codes = torch.randint(K, (4, model.L))
    decode = model.decoder(4, labels)
    steps = [decode(codes[:, t - 1] if t else None) for t in range(model.L)]
    torch.testing.assert_close(torch.stack(steps, 1), model(codes, labels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_steps_mean_nothing_to_a_prior_that_draws_each_code_by_itself(name: str) -> None:
    with pytest.raises(InputError, match=r"sampler\.steps=4"):
        sample(make_prior(name), make(Sampler, steps=4), 2, seed=0)


@pytest.mark.parametrize(
    "name", [name for name in CAUSAL if name != "uniform"]
)  # to which each code is the likeliest
def test_top_1_draws_the_same_whatever_the_seed(name: str) -> None:
    model = make_prior(name)
    one, other = (sample(model, make(Sampler, top_k=1), 4, seed=seed) for seed in (0, 1))
    assert torch.equal(one, other)
    assert torch.equal(one[0], one[1])
