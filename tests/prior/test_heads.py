"""Heads within their priors: which there are, how they are chosen, and that every prior with them is what it says."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from codegrid.engine.aliases import upgrade_config
from codegrid.engine.callbacks.checkpointing import Checkpoints
from codegrid.engine.clock import Budget, Schedule
from codegrid.engine.errors import InputError
from codegrid.engine.folder import LAST
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.heads.base import Head
from prior.heads.bits import Bits, MaskedBits
from prior.heads.several import HeadPerCodebook
from prior.heads.softmax import Softmax
from prior.likelihood import learning_losses, weighted_mean
from prior.load import load_prior
from prior.models.base import Autoregressive, PriorModel
from prior.models.gpt import GPT
from prior.models.masked import Masked
from prior.module import PriorModule, decayed_weights
from tests.helpers.configs import compose_config, list_options
from tests.helpers.parts import make
from tests.helpers.priors import (
    PRIORS,
    build_prior,
    draw_by_one_stream,
    every_grid,
    exact_bound,
    likelihoods,
    make_head,
    randomised,
)
from tests.helpers.runs import save_prior_run
from tests.helpers.stage2 import (
    ABOUT,
    LABEL_SETTINGS,
    lightning_warnings,
    make_code_data,
    make_trainer,
)

pytestmark = lightning_warnings

HEADS: dict[str, type[Head]] = {"softmax": Softmax, "bits": Bits, "masked_bits": MaskedBits}
TRANSFORMERS = ["gpt", "rar", "maskgit", "diffusion", "rq"]  # and var, which needs its scales


def make_prior(name: str, kind: type[Head], **settings: Any) -> PriorModel:
    torch.manual_seed(0)
    head = partial(make_head, kind)
    return randomised(build_prior(PRIORS[name], head=head, **settings)).eval()


def test_every_file_of_conf_prior_head_is_tested() -> None:
    assert list_options("prior/head") == sorted(HEADS)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("head", HEADS)
def test_every_transformer_takes_every_head(name: str, head: str) -> None:
    size = ["prior.width=16", "prior.depth=1", "prior.heads=2"]
    config = compose_config("stage=prior", f"prior={name}", f"prior/head={head}", *size)
    books = 2 if name == "rq" else 1
    model = instantiate(config.prior, codebook=torch.randn(books, 8, 4), grid=(2, 2))
    parts = model.head if name == "rq" else [model.head]
    assert all(type(part) is HEADS[head] for part in parts)
    assert isinstance(model.head, HeadPerCodebook) == (name == "rq")


def test_the_default_head_has_the_weights_and_names_that_it_always_had() -> None:
    """So that earlier checkpoints are read, and seeded runs start alike."""
    torch.manual_seed(0)
    plain = build_prior(PRIORS["gpt"])
    torch.manual_seed(0)
    named = build_prior(PRIORS["gpt"], head=partial(make_head, Softmax))
    assert plain.state_dict().keys() == named.state_dict().keys()
    assert "head.weight" in plain.state_dict()
    assert not [
        name for name in plain.state_dict() if name.startswith("head") and name != "head.weight"
    ]
    for name, value in plain.state_dict().items():
        assert torch.equal(named.state_dict()[name], value), name


def test_configs_of_earlier_runs_get_the_head_that_they_had() -> None:
    prior = compose_config("stage=prior", "prior=rar").prior
    before = {"prior": {key: value for key, value in prior.items() if key != "head"}}
    upgraded = upgrade_config(before)["prior"]
    assert upgraded == prior
    assert "head" not in upgrade_config({"prior": {"_target_": "prior.models.lstm.LSTM"}})["prior"]


def test_a_word_for_a_head_is_a_sentence() -> None:
    with pytest.raises(
        InputError, match="prior.head=bits is no head; choose one with prior/head=bits"
    ):
        build_prior(PRIORS["gpt"], head="bits")


@pytest.mark.parametrize(
    ("name", "kind", "K", "grid"),
    [
        ("gpt", MaskedBits, 4, (2, 2)),
        ("gpt", Bits, 6, (1, 3)),
        ("rq", Bits, 3, (1, 2)),
    ],
)
def test_grids_have_probability_1_together_and_are_drawn_as_often_as_they_are_likely(
    name: str, kind: type[Head], K: int, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_by_one_stream(monkeypatch)
    model, n = make_prior(name, kind, K=K, grid=grid), 20_000
    every = every_grid(model)
    p = likelihoods(model, every)
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    codes = sample(model, Sampler.unmodified(), n, seed=0, batch_size=n).flatten(1)
    counts = (codes @ K ** torch.arange(model.L - 1, -1, -1)).bincount(minlength=len(every))
    many = n * p > 5
    chi_square = float(((counts - n * p).square() / (n * p))[many].sum())
    assert chi_square < many.sum() + 4 * (2 * many.sum()) ** 0.5


@torch.no_grad()
def test_a_masked_prior_draws_and_judges_with_and_without_logits_alike() -> None:
    model = make_prior("maskgit", Bits, K=6, grid=(2, 2))
    assert isinstance(model, Masked)
    codes = torch.randint(6, (50, 4))
    masked = torch.tensor([[True, False, True, True]]).expand(50, -1)
    places = torch.tensor([[3, 0]]).expand(50, -1)
    uniform = torch.rand(50, 4, dtype=torch.float64)
    plain = model.propose(codes, masked, places, uniform, Sampler.unmodified(), None, 0.0)
    almost = make(Sampler, temperature=1.0 + 1e-7)
    logits = model.propose(codes, masked, places, uniform, almost, None, 0.0)
    assert torch.equal(plain[0], logits[0])
    torch.testing.assert_close(plain[1], logits[1], rtol=1e-4, atol=1e-5)
    own = model(codes, masked).gather(1, places[..., None].expand(-1, -1, 6)).log_softmax(-1)
    torch.testing.assert_close(
        plain[1], own.gather(2, plain[0][..., None])[..., 0], rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_the_bound_of_a_masked_prior_is_estimated_through_its_head() -> None:
    model = make_prior("diffusion", Bits, K=3, grid=(1, 3))
    codes = torch.tensor([[2, 0, 1]]).expand(4000, -1)
    assert isinstance(model, Masked)
    prediction = model.bound(codes, None, torch.rand(4000, 4, dtype=torch.float64))
    nats = (
        prediction.head.nats(prediction.features, prediction.targets) * prediction.weights
    ).mean(1)
    expected = exact_bound(model, codes[:1])[0]
    assert abs(nats.mean() - expected) < 4 * nats.std() / 4000**0.5


@pytest.mark.parametrize("name", ["gpt", "maskgit", "rq"])
def test_nats_in_the_log_are_those_of_the_code_whatever_is_learned(name: str) -> None:
    for kind in HEADS.values():
        head = partial(make, kind, group_share=0.5, group_size=2)
        if kind is not Softmax:
            head = partial(head, hidden=8)
        torch.manual_seed(0)
        model = randomised(build_prior(PRIORS[name], head=head)).eval()
        prediction = model.learn(torch.randint(model.K, (8, model.L)), None, 0.5)
        losses, nats = learning_losses(prediction, 0.2)
        logp = prediction.logits.log_softmax(-1).gather(-1, prediction.targets[..., None])[..., 0]
        torch.testing.assert_close(nats, -logp, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(losses, nats)
        assert not nats.requires_grad
        weighted_mean(losses, prediction).backward()


class WithoutFeatures(GPT):
    """A prior of the user's own, as the documentation had them, which predicts logits and nothing else."""

    features = Autoregressive.features

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.head.logits(GPT.features(self, codes, labels)) * 2


def test_a_transformer_with_a_forward_alone_is_trained_on_its_logits() -> None:
    model = make_prior("gpt", Bits)
    codes = torch.randint(model.K, (4, model.L))
    doubled = 2 * model.judge(codes, None).logits
    model.__class__ = WithoutFeatures
    torch.testing.assert_close(model.judge(codes, None).logits, doubled)
    assert sample(model, Sampler.unmodified(), 2, seed=0).shape == (2, 2, 3)


def test_only_the_linear_maps_of_a_head_decay() -> None:
    model = make_prior("gpt", MaskedBits)
    decayed = decayed_weights(model)
    names = {name for name, p in model.named_parameters() if p in decayed and "head" in name}
    assert names == {"head.input.weight", "head.weight"}
    assert model.head in model.ends


class PowerCut(Callback):
    """Breaks off before the third update."""

    def on_train_batch_start(self, trainer: Any, module: Any, *batch: Any) -> None:
        if module.step == 2:
            raise RuntimeError("the power failed")


def train(folder: Path, *callbacks: Callback, ckpt: Path | None = None) -> dict[str, Tensor]:
    """The weights after 4 steps with masked bits, whose updates draw random numbers, or after fewer if a callback fails."""
    torch.manual_seed(0)
    model = build_prior(PRIORS["gpt"], head=partial(make_head, MaskedBits))
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    module = PriorModule(model, optimizer, Budget(4), make(Schedule), **LABEL_SETTINGS)
    around = [Checkpoints(ABOUT, 2), *callbacks]
    trainer = make_trainer(callbacks=around, default_root_dir=folder)
    failure = pytest.raises(RuntimeError, match="the power failed") if callbacks else nullcontext()
    with failure:
        trainer.fit(module, make_code_data("gpt", 16), ckpt_path=ckpt)
    return model.state_dict()


def test_training_with_masked_bits_is_resumed_to_the_bit(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    half = train(tmp_path / "parts", PowerCut())
    assert not torch.equal(half["head.weight"], whole["head.weight"])
    resumed = train(tmp_path / "parts", ckpt=tmp_path / "parts" / LAST)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_run_with_a_head_is_saved_and_loaded(tmp_path: Path) -> None:
    words = [
        "prior.width=16",
        "prior.depth=1",
        "prior.heads=2",
        "prior/head=bits",
        "prior.head.hidden=8",
    ]
    save_prior_run(tmp_path / "run", *words)
    trained = load_prior(tmp_path / "run")
    assert isinstance(trained.model.head, Bits)
    assert trained.sample(2, output="codes", temperature=0.9, top_p=0.9).shape == (2, 4, 4)
    nats = trained.nats_of_codes(trained.sample(3, output="codes"))
    assert nats.shape == (3,)
    assert nats.isfinite().all()
