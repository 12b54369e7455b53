"""Typed settings of a training run, and the opening checks of the stages."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from codegrid.engine import settings
from codegrid.engine.errors import InputError
from codegrid.engine.settings import (
    TrainerSettings,
    check_opening,
    check_training_config,
)
from tests.helpers.configs import compose_config


def read(*overrides: str) -> TrainerSettings:
    config = compose_config("stage=vqgan", "trainer.accelerator=cpu", *overrides)
    return TrainerSettings.read(config.trainer)


def test_settings_have_a_field_for_each_key_of_conf_trainer() -> None:
    fields = {field.name for field in dataclasses.fields(TrainerSettings)}
    assert fields == set(compose_config("stage=vqgan").trainer)


def test_settings_are_plain_values() -> None:
    chosen = read("trainer.devices=[0]", "trainer.max_steps=5")
    assert type(chosen.devices) is list
    assert chosen.budget.max_steps == 5
    assert chosen.device == torch.device("cpu")
    assert chosen.num_processes == 1


def test_settings_can_not_be_changed_after_they_are_read() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().max_steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["trainer.precision=fp8"], "trainer.precision=fp8 must be one of auto, 32-true, bf16-mixed, 16-mixed"),
        (["trainer.val_every=0"], "trainer.val_every=0 must be a whole number of at least 1 step"),
        (["trainer.save_every=1.5"], "trainer.save_every=1.5 must be a whole number"),
        (["trainer.log_every=often"], "trainer.log_every=often must be a whole number"),
        (["trainer.save_async=often"], "trainer.save_async=often must be true or false"),
        (["trainer.strategy=deepspeed"], "trainer.strategy=deepspeed must be auto, ddp or fsdp2"),
        (
            ["trainer.strategy=fsdp2", "trainer.precision=16-mixed"],
            "trainer.precision=16-mixed scales losses, which trainer.strategy=fsdp2 does not; use bf16-mixed",
        ),
    ],
)  # fmt: skip
def test_values_that_can_not_work_on_any_machine_are_refused(
    overrides: list[str], sentence: str
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
        read(*overrides)


def test_only_a_stage_that_can_shard_takes_fsdp2() -> None:
    chosen = read("trainer.strategy=fsdp2")
    chosen.check_machine(shards=True)
    with pytest.raises(
        InputError, match=r"fsdp2 shards the weights of stage=prior alone.*use auto or ddp"
    ):
        chosen.check_machine(shards=False)


def test_more_machines_need_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    with pytest.raises(InputError, match=r"trainer.num_nodes=2 needs torchrun or srun"):
        read("trainer.num_nodes=2").check_machine(shards=False)


def test_a_run_without_an_end_is_refused() -> None:
    endless = read("trainer.max_steps=null", "trainer.max_minutes=null")
    with pytest.raises(InputError, match="a run needs an end"):
        endless.check_budget()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trainer.accelerator=tpu", "accelerator=tpu must be auto, cpu or gpu"),
        ("trainer.accumulate=64", "trainer.accumulate=64 micro-batches need more than a batch of 32"),
        ("optimizer.lr=-1", "optimizer.lr=-1 must be a number of at least 0, such as 1e-3"),
        ("optimizer.lr=fast", "optimizer.lr=fast must be a number of at least 0"),
    ],
)  # fmt: skip
def test_a_training_config_is_checked_before_anything_is_built(
    override: str, sentence: str
) -> None:
    config = compose_config("stage=vqgan", "trainer.accelerator=cpu", "data.batch_size=32")
    check_training_config(config)
    key, _, value = override.partition("=")
    OmegaConf.update(config, key, OmegaConf.create([value])[0] if value.isalpha() else int(value))
    with pytest.raises(InputError, match=f"^{re.escape(sentence)}"):
        check_training_config(config)


def test_a_missing_tensorboard_is_reported_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "codegrid\[tensorboard\]"'):
        check_training_config(compose_config("stage=vqgan", "logger=tensorboard"))


def opening(**values: Any) -> Any:
    return OmegaConf.create({"stage": "sample", "ckpt": None, "resume": None, **values})


def test_a_stage_that_needs_a_checkpoint_says_which() -> None:
    with pytest.raises(InputError, match="^stage=sample needs a prior; add ckpt=x$"):
        check_opening(opening(), "a prior; add ckpt=x", None)
    check_opening(opening(ckpt="x"), "a prior; add ckpt=x", None)
    check_opening(opening(), None, None)


def test_a_stage_that_can_not_resume_says_why() -> None:
    with pytest.raises(
        InputError, match="^stage=sample has nothing to resume; leave resume=runs/a out$"
    ):
        check_opening(opening(resume="runs/a"), None, "has nothing to resume")
    check_opening(opening(resume="runs/a"), None, None)
    check_opening(opening(), None, "has nothing to resume")
