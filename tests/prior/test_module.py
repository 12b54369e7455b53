from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.loading import Samples
from data.tokens import CodeDataModule, sequences
from prior.models.bigram import bigram_nats
from prior.models.gpt import GPT
from prior.module import Prior, nats
from vqgan.clock import Budget, MakeOptimizer, Schedule

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*ambiguous")
K, GRID = 6, (3, 3)


def codes(n: int, seed: int) -> Samples:
    """Grids whose every code is the sum of its upper and left neighbours: a pair in a row tells little."""
    grids = np.random.default_rng(seed).integers(0, K, (n, *GRID))
    for r in range(1, 3):
        for c in range(1, 3):
            grids[:, r, c] = (grids[:, r - 1, c] + grids[:, r, c - 1]) % K
    return Samples(grids.astype(np.uint16), np.arange(n) % 3)


def prior(steps: int = 3, optimizer: MakeOptimizer | None = None, classes: int = 0, **update: Any) -> tuple[Prior, CodeDataModule]:
    torch.manual_seed(0)
    model = GPT(torch.randn(1, K, 8), GRID, classes=classes, width=32, depth=2, heads=2)
    data = CodeDataModule(codes(2000, 0), codes(70, 1), batch_size=32, seed=0)
    return Prior(model, optimizer or (lambda p: torch.optim.AdamW(p, 5e-3)), Budget(steps), Schedule(10), **update), data


def trainer() -> L.Trainer:
    return L.Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=10**6, check_val_every_n_epoch=None,
    )  # fmt: skip


def test_nats_per_token_are_the_mean_over_all_tokens_whatever_the_batches() -> None:
    module, data = prior()
    torch.nn.init.normal_(module.model.head.weight)
    [found] = trainer().validate(module, data, verbose=False)  # batches of 32, 32 and 6
    val = sequences(data.split("val"))
    logits = module.model(val)
    assert found["val/nats_per_token"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), val.flatten()).item(), rel=1e-5)
    assert found["val/bits_per_image"] == pytest.approx(found["val/nats_per_token"] * 9 / np.log(2), rel=1e-5)


def test_labels_are_withheld_in_training_at_their_rate_and_never_in_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = prior(steps=60, classes=3, label_drop=0.25)
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    learn, judge = module.model.learn, module.model.judge
    monkeypatch.setattr(module.model, "learn", lambda codes, told, now: seen[True].append(told) or learn(codes, told, now))
    monkeypatch.setattr(module.model, "judge", lambda codes, told: seen[False].append(told) or judge(codes, told))
    trainer().fit(module, data)
    trainer().validate(module, data, verbose=False)
    withheld = (torch.cat(seen[True]) == -1).float().mean()
    assert withheld == pytest.approx(0.25, abs=0.04)
    assert (torch.cat(seen[False]) >= 0).all()


def test_a_prior_without_classes_draws_no_number_for_labels() -> None:
    states = []
    for drop in (0.0, 1.0):
        module, data = prior(label_drop=drop)
        trainer().fit(module, data)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_an_untrained_prior_needs_log_K_nats() -> None:
    module, data = prior()
    [found] = trainer().validate(module, data, verbose=False)
    assert found["val/nats_per_token"] == pytest.approx(np.log(K))


def test_updates_of_micro_batches_equal_those_of_whole_ones() -> None:
    whole, parts = (prior(4, lambda p: torch.optim.SGD(p, 0.5), accumulate=n) for n in (1, 3))
    for module, data in (whole, parts):
        trainer().fit(module, data)
    for name, value in whole[0].state_dict().items():
        torch.testing.assert_close(parts[0].state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_trained_prior_knows_what_a_bigram_cannot() -> None:
    module, data = prior(steps=600)
    trainer().fit(module, data)
    [found] = trainer().validate(module, data, verbose=False)
    bigram = bigram_nats(sequences(data.split("train")), sequences(data.split("val")), K)
    exact = 5 / 9 * np.log(K)  # the first row and column are free, the rest follows from them
    assert bigram > 0.95 * np.log(K)
    assert found["val/nats_per_token"] < exact + 0.1
    assert module.step == 600


def test_label_smoothing_asks_a_share_of_the_loss_for_all_codes_alike() -> None:
    model = prior()[0].model
    torch.nn.init.normal_(model.head.weight)
    prediction = model.judge(torch.randint(K, (3, 9)), None)
    logp = prediction.logits.log_softmax(-1)
    own = -logp.gather(-1, prediction.targets[..., None])[..., 0]
    torch.testing.assert_close(nats(prediction), own)
    torch.testing.assert_close(nats(prediction, 0.1), 0.9 * own - 0.1 * logp.mean(-1))
