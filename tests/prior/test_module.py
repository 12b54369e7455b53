"""The training step and the validation of stage 2."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from codegrid.data.samples import ArraySamples
from codegrid.data.tokens import CodeDataModule
from codegrid.engine.clock import Budget, Schedule
from prior.baselines import baselines
from prior.models.base import Prediction
from prior.models.gpt import GPT
from prior.models.lstm import LSTM
from prior.models.pixelcnn import PixelCNN
from prior.module import (
    LikelihoodMetric,
    Prior,
    decayed_weights,
    negative_log_likelihood,
)
from tests.helpers.parts import make
from tests.helpers.stage2 import (
    GRID,
    LABEL_SETTINGS,
    K,
    lightning_warnings,
    make_codes,
    make_gpt,
    make_prior_module,
    make_trainer,
)

pytestmark = lightning_warnings


def sequences(samples: ArraySamples) -> torch.Tensor:
    """All codes of a split (n, h * w), int64, in raster order."""
    return torch.from_numpy(np.asarray(samples.values).reshape(len(samples), -1).astype(np.int64))


def test_nats_per_token_are_the_mean_over_all_tokens_whatever_the_batches() -> None:
    module, data = make_prior_module()
    torch.nn.init.normal_(module.model.head.weight)
    [figures] = make_trainer().validate(module, data, verbose=False)  # batches of 32, 32 and 6
    val = sequences(data.samples("val"))
    logits = module.model(val)
    assert figures["val/nats_per_token"] == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), val.flatten()).item(), rel=1e-5
    )
    assert figures["val/bits_per_image"] == pytest.approx(
        figures["val/nats_per_token"] * 9 / np.log(2), rel=1e-5
    )


def test_top1_and_top5_count_the_codes_that_are_among_the_likeliest() -> None:
    module, data = make_prior_module()
    torch.nn.init.normal_(module.model.head.weight)
    [figures] = make_trainer().validate(module, data, verbose=False)
    val = sequences(data.samples("val"))
    ranked = module.model(val).argsort(-1, descending=True)
    for k in (1, 5):
        assert figures[f"val/top{k}"] == pytest.approx(
            (ranked[..., :k] == val[..., None]).any(-1).float().mean().item()
        )


def test_a_prior_that_knows_nothing_guesses_one_code_in_K() -> None:
    module, data = make_prior_module()
    [figures] = make_trainer().validate(module, data, verbose=False)
    assert (figures["val/top1"], figures["val/top5"]) == (
        pytest.approx(1 / K),
        pytest.approx(5 / K),
    )


def test_codes_that_were_known_do_not_count_as_predicted_and_weights_count_in_the_nats() -> None:
    logits = torch.full((1, 3, K), -20.0)
    logits[0, :, 2] = 20.0
    judged = LikelihoodMetric(3)
    judged.update(Prediction(logits, torch.tensor([[2, 2, 0]]), torch.tensor([[1.5, 0.0, 1.5]])))
    figures = judged.compute()
    assert figures["top1"] == 0.5
    assert figures["nats"].tolist() == [0, 0, 60]


def test_figures_of_batches_are_those_of_the_whole() -> None:
    model = make_prior_module()[0].model
    torch.nn.init.normal_(model.head.weight)
    grids = torch.randint(K, (7, 9))
    whole, parts = LikelihoodMetric(9), LikelihoodMetric(9)
    whole.update(model.judge(grids, None))
    for part in grids.split(3):
        parts.update(model.judge(part, None))
    for name, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[name], value)


def test_the_gap_is_to_the_nats_of_as_many_training_grids() -> None:
    module, data = make_prior_module()
    torch.nn.init.normal_(module.model.head.weight)
    [figures] = make_trainer().validate(module, data, verbose=False)
    known = data.take_evenly("train", 70)[0].flatten(1).long()
    of_training = F.cross_entropy(module.model(known).flatten(0, 1), known.flatten()).item()
    assert figures["val/gap"] == pytest.approx(
        figures["val/nats_per_token"] - of_training, abs=1e-5
    )


def test_the_gap_is_judged_without_dropout_as_the_validation_is() -> None:
    torch.manual_seed(0)
    model = make_gpt(dropout=0.5, token_dropout=0.5)
    same = make_codes(50, 0)
    module = Prior(
        model,
        lambda p: torch.optim.AdamW(p, 5e-2),
        Budget(5),
        make(Schedule, warmup=0),
        **LABEL_SETTINGS,
    )
    data = CodeDataModule(same, same, batch_size=20, seed=0)
    make_trainer().fit(module, data)
    [figures] = make_trainer().validate(module, data, verbose=False)
    assert figures["val/gap"] == pytest.approx(0, abs=1e-6)


def test_the_loss_map_has_the_nats_of_each_place() -> None:
    module, data = make_prior_module()
    torch.nn.init.normal_(module.model.head.weight)
    [figures] = make_trainer().validate(module, data, verbose=False)
    val = sequences(data.samples("val"))
    by_place = (
        F.cross_entropy(module.model(val).flatten(0, 1), val.flatten(), reduction="none")
        .view(-1, *GRID)
        .mean(0)
    )
    torch.testing.assert_close(module.loss_map.float(), by_place)
    assert figures["val/nats_easiest_place"] == pytest.approx(by_place.min().item())
    assert figures["val/nats_hardest_place"] == pytest.approx(by_place.max().item())


DECAYED = {
    "gpt": (GPT, {"width": 16, "depth": 1, "heads": 2, "inputs": "embedding"}),
    "lstm": (LSTM, {"width": 16, "depth": 1}),
    "pixelcnn": (PixelCNN, {"width": 8, "depth": 1, "kernel": 3}),
}


@pytest.mark.parametrize("name", DECAYED)
def test_only_linear_maps_convolutions_and_recurrences_decay(name: str) -> None:
    build, settings = DECAYED[name]
    model = make(build, torch.randn(1, K, 8), GRID, **settings)
    optimizer = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    module = Prior(model, optimizer, Budget(1), make(Schedule), **LABEL_SETTINGS)
    decayed, free = module.configure_optimizers().param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert {names[p] for p in [*decayed["params"], *free["params"]]} == set(names.values())
    assert set(decayed["params"]) == decayed_weights(model)
    for p in free["params"]:
        assert p.ndim < 2 or names[p].startswith(
            ("read.read", "begin", "place", "labels", "row", "column")
        ), names[p]
    for p in decayed["params"]:
        assert p.ndim >= 2
        assert "weight" in names[p]
        assert "norm" not in names[p]


def test_labels_are_withheld_in_training_at_their_rate_and_never_in_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, data = make_prior_module(steps=60, classes=3, label_drop=0.25)
    labels: dict[str, list[torch.Tensor]] = {"learn": [], "judge": []}
    for name in labels:
        method = getattr(module.model, name)
        monkeypatch.setattr(
            module.model,
            name,
            lambda codes, label, *now, name=name, method=method: (
                labels[name].append(label) or method(codes, label, *now)
            ),
        )
    make_trainer().fit(module, data)
    make_trainer().validate(module, data, verbose=False)
    withheld = (torch.cat(labels["learn"]) == -1).float().mean()
    assert withheld == pytest.approx(0.25, abs=0.04)
    assert (torch.cat(labels["judge"]) >= 0).all()


def test_a_prior_without_classes_draws_no_number_for_labels() -> None:
    states = []
    for drop in (0.0, 1.0):
        module, data = make_prior_module(label_drop=drop)
        make_trainer().fit(module, data)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_an_untrained_prior_needs_log_K_nats() -> None:
    module, data = make_prior_module()
    [figures] = make_trainer().validate(module, data, verbose=False)
    assert figures["val/nats_per_token"] == pytest.approx(np.log(K))


def test_updates_of_micro_batches_equal_those_of_whole_ones() -> None:
    whole, parts = (
        make_prior_module(4, lambda p: torch.optim.SGD(p, 0.5), accumulate=n) for n in (1, 3)
    )
    for module, data in (whole, parts):
        make_trainer().fit(module, data)
    for name, value in whole[0].state_dict().items():
        torch.testing.assert_close(parts[0].state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_trained_prior_knows_what_a_bigram_cannot() -> None:
    module, data = make_prior_module(steps=600)
    make_trainer().fit(module, data)
    [figures] = make_trainer().validate(module, data, verbose=False)
    counted = baselines(*(sequences(data.samples(split)).numpy() for split in ("train", "val")), K)
    exact = 5 / 9 * np.log(K)  # the first row and column are free, the rest follows from them
    assert counted["bigram_nats_per_token"] > 0.95 * np.log(K)
    assert figures["val/nats_per_token"] < exact + 0.1
    assert module.step == 600


def test_label_smoothing_asks_a_share_of_the_loss_for_all_codes_alike() -> None:
    model = make_prior_module()[0].model
    torch.nn.init.normal_(model.head.weight)
    prediction = model.judge(torch.randint(K, (3, 9)), None)
    logp = prediction.logits.log_softmax(-1)
    own = -logp.gather(-1, prediction.targets[..., None])[..., 0]
    torch.testing.assert_close(negative_log_likelihood(prediction), own)
    torch.testing.assert_close(
        negative_log_likelihood(prediction, 0.1), 0.9 * own - 0.1 * logp.mean(-1)
    )
