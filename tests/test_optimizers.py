"""Muon in the training of both stages."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from torch import nn

from codegrid.data.tokens import CodeDataModule
from codegrid.engine.callbacks.checkpointing import Checkpoints
from codegrid.engine.checkpoint import read_checkpoint
from codegrid.engine.clock import Budget, Now, Schedule
from codegrid.engine.errors import find_mistake
from codegrid.engine.folder import LAST
from codegrid.engine.fsdp import ShardedStrategy, full_tensor, local_shard
from codegrid.engine.module import ClockedModule
from codegrid.engine.muon import Muon, MuonOptimizer, orthogonalise_alike
from prior.module import PriorModule, decayed_weights
from tests.helpers.configs import compose_config
from tests.helpers.parts import make
from tests.helpers.priors import PRIORS, UNLABELLED, make_prior
from tests.helpers.ranks import run_both_ranks
from tests.helpers.stage1 import fit, make_module, make_noise, make_tokenizer
from tests.helpers.stage2 import (
    ABOUT,
    LABEL_SETTINGS,
    lightning_warnings,
    make_codes,
    make_prior_module,
    make_trainer,
)
from vqgan.learning import LEARNERS
from vqgan.lora import add_low_rank
from vqgan.losses.gate import Gate
from vqgan.module import VQGAN
from vqgan.quantizers.gumbel import Gumbel
from vqgan.quantizers.vq import VQ

pytestmark = lightning_warnings

LEARNED = [name for name in PRIORS if name not in UNLABELLED]


def make_muon_vqgan(gate: Gate | None = None, muon: Muon | None = None, **losses: Any) -> VQGAN:
    """A small tokenizer with matrices; its generator trains by Muon."""
    module = make_module(gate, tokenizer=make_tokenizer(dim=16), **losses)
    images = torch.from_numpy(make_noise().samples("train").values)
    module.tokenizer.initialise(make_noise().augment(images))
    module.make_optimizers[0] = muon or make(Muon)
    return module


def read_matrices(optimizer: Any, module: nn.Module) -> set[str]:
    """The names of the parameters that an optimizer orthogonalises."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)] for g in optimizer.param_groups if g["matrix"] for p in g["params"]}


def copy_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_codes_and_the_last_layer_of_a_tokenizer_are_no_matrices() -> None:
    module = make_muon_vqgan()
    module.tokenizer.quantizer = make(Gumbel, 32, 16)
    module.tokenizer.decoder.last = nn.Conv2d(8, 64, 3)
    [optimizer] = module.configure_optimizers()
    matrices = read_matrices(optimizer, module.tokenizer)
    assert {"patches.into.1.weight", "patches.out.0.weight"} <= matrices
    assert not [name for name in matrices if name.startswith(("quantizer", "decoder.last"))]
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything})
    assert {id(p) for p in everything} == {id(p) for p in module.tokenizer.parameters()}


def test_the_factors_of_low_rank_updates_are_no_matrices() -> None:
    module = make_muon_vqgan()
    add_low_rank([module.tokenizer.encoder, module.tokenizer.decoder], rank=16)
    module.tokenizer.patches.requires_grad_(False)
    [optimizer] = module.configure_optimizers()
    assert not read_matrices(optimizer, module.tokenizer)
    assert optimizer.param_groups[0]["params"]


def test_a_generator_that_rests_needs_no_matrices() -> None:
    module = make_muon_vqgan(
        Gate(start=0, ramp=0, warmup=0), steps=2, learners=LEARNERS["discriminator"]
    )
    before = copy_weights(module.tokenizer)
    fit(module)
    assert all(torch.equal(p, before[name]) for name, p in module.tokenizer.named_parameters())


def test_codes_keep_a_rate_of_their_own() -> None:
    module = make_muon_vqgan()
    module.tokenizer.quantizer = make(VQ, 16, 16, codebook_lr=10.0)
    [optimizer] = module.configure_optimizers()
    rates = {id(p): g["initial_lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(module.tokenizer.quantizer.codebook)] == pytest.approx(10 * 2e-3)
    assert rates[id(module.tokenizer.patches.into[1].weight)] == 0.02


@pytest.mark.parametrize("name", LEARNED)
def test_what_reads_and_predicts_codes_is_no_matrix_of_a_prior(name: str) -> None:
    model = make_prior(name, K=32, grid=(2, 3), classes=20)
    optimizer, schedule = make(Muon, weight_decay=0.3), make(Schedule)
    module = PriorModule(model, optimizer, Budget(1), schedule, **LABEL_SETTINGS)
    muon: Any = module.configure_optimizers()
    matrices = read_matrices(muon, model)
    assert matrices
    for weight in matrices:
        assert not weight.startswith(("head", "read", "begin", "place", "unread", "row", "column"))
    decayed = decayed_weights(model)
    for group in muon.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (p in decayed) * (0.01 if group["matrix"] else 0.3)


def test_the_groups_of_other_optimizers_stay_as_they_are() -> None:
    """Checkpoints number the state of an optimizer in the order of its groups."""
    tokenizer, discriminator = make_module(Gate(0, 0, 0)).configure_optimizers()
    for optimizer in (tokenizer, discriminator):
        [group] = optimizer.param_groups
        assert "matrix" not in group


def test_both_kinds_of_parameters_follow_the_schedule() -> None:
    module = make_muon_vqgan(steps=4)
    trainer = fit(module)
    last = Schedule(2, floor=0.02)(Now(3, 0.75))
    for group in trainer.optimizers[0].param_groups:
        assert group["lr"] == pytest.approx(group["initial_lr"] * last)
    assert {g["initial_lr"] for g in trainer.optimizers[0].param_groups} == {2e-3, 0.02}


def test_the_second_betas_of_a_gan_are_those_of_adamw() -> None:
    module = make_muon_vqgan(Gate(start=0, ramp=0, warmup=0), steps=2, second_betas=[0.5, 0.9])
    trainer = fit(module)
    muon, discriminator = trainer.optimizers
    for group in muon.param_groups:
        assert group.get("betas") == (None if group["matrix"] else (0.5, 0.9))
    assert isinstance(discriminator, torch.optim.AdamW)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("gate", [None, Gate(start=0, ramp=0, warmup=0)])
def test_a_tokenizer_learns_by_muon_in_every_precision(gate: Gate | None, precision: str) -> None:
    module = (
        make_muon_vqgan(gate, steps=3, freeze_codes=False) if gate else make_muon_vqgan(steps=3)
    )
    before = copy_weights(module.tokenizer)
    fit(module, precision=precision)
    for name, weight in module.tokenizer.named_parameters():
        assert weight.isfinite().all()
        assert not torch.equal(weight, before[name]), name


def test_an_update_under_autocast_is_orthogonalised_in_float32() -> None:
    module = make_muon_vqgan(steps=1, muon=make(Muon, matrix_decay=0.0))
    module.schedule = Schedule(0, floor=1.0)
    weight = module.tokenizer.patches.into[1].weight
    before = weight.detach().clone()
    trainer = fit(module, precision="bf16-mixed")
    momentum = trainer.optimizers[0].state[weight]["momentum_buffer"]
    [expected] = orthogonalise_alike([momentum.flatten(1)], 5)
    step = (before - weight.detach()).flatten(1)
    torch.testing.assert_close(step, 0.02 * expected, rtol=0, atol=1e-6)


def train_in_parts(
    module: ClockedModule, data: Any, folder: Path, stop: int = 0, **ranks: Any
) -> L.Trainer:
    """Train to the end of the module's budget, from the checkpoint in `folder` if there is one, or up to step `stop`."""
    callbacks: list[Callback] = [Checkpoints(ABOUT, stop or 100, pauses=(0, 0))]
    if stop:
        callbacks.append(StopAt(stop))
    trainer = make_trainer(callbacks=callbacks, default_root_dir=folder, **ranks)
    torch.manual_seed(0)
    last = folder / LAST
    trainer.fit(module, data, ckpt_path=last if last.is_file() else None)
    return trainer


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or module.step >= self.step


def test_a_resumed_prior_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def build() -> tuple[PriorModule, Any]:
        return make_prior_module(4, make(Muon))

    (whole, data), (first, _), (second, _) = build(), build(), build()
    train_in_parts(whole, data, tmp_path / "whole")
    train_in_parts(first, data, tmp_path / "parts", stop=2)
    assert read_checkpoint(tmp_path / "parts", "prior")["clock"]["step"] == 2
    train_in_parts(second, data, tmp_path / "parts")
    assert second.step == whole.step == 4
    expected, resumed = copy_weights(whole), copy_weights(second)
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_a_step_is_skipped_if_gradients_overflow_under_loss_scaling() -> None:
    weights, scaler = [], torch.amp.GradScaler("cpu", init_scale=1024.0)
    for is_scaled in (False, True):
        torch.manual_seed(0)
        matrix, vector = nn.Parameter(torch.randn(16, 20)), nn.Parameter(torch.randn(5))
        optimizer = make(Muon)([{"params": [vector]}, {"params": [matrix], "matrix": True}])
        for factor in (1.0, 2.0, float("inf")):
            if factor == float("inf") and not is_scaled:
                continue
            optimizer.zero_grad()
            loss = factor * (matrix.square().sum() + vector.pow(3).sum())
            (scaler.scale(loss) if is_scaled else loss).backward()
            if is_scaled:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        weights.append((matrix.detach(), vector.detach()))
    for plain, scaled in zip(*weights, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-7)


def train_two_ranks(folder: Path) -> dict[str, Any]:
    """The weights of a prior after six updates, replicated, sharded, and sharded with a break after three; and how many
    numbers of the momenta this rank holds."""
    outcome: dict[str, Any] = {}
    for name, stops in {"ddp": [0], "fsdp2": [0], "resumed": [3, 0]}.items():
        for stop in stops:
            module, _ = make_prior_module(6, make(Muon))
            data = CodeDataModule(make_codes(200, 0), make_codes(70, 1), 16, seed=0)
            strategy = "ddp_find_unused_parameters_true" if name == "ddp" else ShardedStrategy(2)
            ranks = {"devices": 2, "strategy": strategy, "inference_mode": False}
            trainer = train_in_parts(module, data, folder / name, stop, **ranks)
            if stop:
                outcome["saved"] = read_checkpoint(folder / name, "prior")["clock"]["step"]
        outcome[name] = {n: full_tensor(p.detach()) for n, p in module.named_parameters()}
        states = trainer.optimizers[0].state.values()
        momenta = [state["momentum_buffer"] for state in states if "momentum_buffer" in state]
        outcome[f"{name} momenta"] = sum(local_shard(x).numel() for x in momenta)
    return outcome


@pytest.mark.slow
def test_ranks_agree_and_train_as_one_process_does(tmp_path: Path) -> None:
    one, two = run_both_ranks(train_two_ranks, tmp_path)
    module, _ = make_prior_module(6, make(Muon))
    data = CodeDataModule(make_codes(200, 0), make_codes(70, 1), 32, seed=0)
    make_trainer(default_root_dir=tmp_path).fit(module, data)
    assert one["saved"] == 3
    for how in ("ddp", "fsdp2", "resumed"):
        for name, weight in module.named_parameters():
            assert torch.equal(one[how][name], two[how][name]), name
            torch.testing.assert_close(one[how][name], weight.detach(), rtol=0, atol=1e-3)
    assert all(torch.equal(one["resumed"][n], value) for n, value in one["fsdp2"].items())
    assert one["fsdp2 momenta"] + two["fsdp2 momenta"] == one["ddp momenta"]


def test_a_muon_that_cannot_work_is_refused_before_a_run_begins() -> None:
    config = compose_config("stage=vqgan", "optimizer=muon", "optimizer.momentum=1")
    with pytest.raises(InstantiationException) as refused:
        instantiate(config.optimizer)
    mistake = find_mistake(refused.value)
    assert str(mistake).startswith("optimizer.momentum=1 must be below 1")


@pytest.mark.parametrize("stage", ["vqgan", "prior"])
def test_both_stages_take_it_by_one_word(stage: str) -> None:
    optimizer = instantiate(compose_config(f"stage={stage}", "optimizer=muon").optimizer)
    usual = compose_config(f"stage={stage}").optimizer
    assert optimizer.lr == usual.lr
    assert list(optimizer.betas) == list(usual.betas)
    assert optimizer.weight_decay == usual.weight_decay
    assert isinstance(optimizer([{"params": [nn.Parameter(torch.zeros(1))]}]), MuonOptimizer)
