"""Typed, checked settings of a training run, read once from its config."""

import math
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from codegrid.engine.clock import Budget
from codegrid.engine.compile import check_compile
from codegrid.engine.distributed import count_processes
from codegrid.engine.environment import find_device
from codegrid.engine.errors import InputError

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp", "fsdp2")


@dataclass(frozen=True)
class TrainerSettings:
    """conf/trainer: how long, how often, on what, in which precision.

    max_steps, max_minutes    the budget; whichever ends first
    val_every, save_every, log_every    in updates
    save_async                whether training continues while a checkpoint is written
    devices                   devices per machine: a number, "auto" or -1 for all, or a list of GPUs
    clip                      the largest gradient norm; 0 for any
    accumulate                micro-batches per update
    checkpoint_activations    whether the backward pass computes the activations of blocks again
    """

    max_steps: int | None
    max_minutes: float | None
    val_every: int
    save_every: int
    log_every: int
    save_async: bool
    accelerator: str
    devices: int | str | list[int]
    strategy: str
    num_nodes: int
    precision: str
    clip: float
    compile: bool
    accumulate: int
    checkpoint_activations: bool

    @classmethod
    def read(cls, trainer: DictConfig) -> "TrainerSettings":
        """The settings of a config's `trainer`. Raises InputError for a value that can't work on any machine."""
        values: dict[str, Any] = {field.name: trainer[field.name] for field in fields(cls)}
        if isinstance(values["devices"], ListConfig):
            values["devices"] = list(values["devices"])
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Raise InputError for a value that can't work on any machine."""
        if self.precision not in PRECISIONS:
            raise InputError(
                f"trainer.precision={self.precision} must be one of {', '.join(PRECISIONS)}"
            )
        for name in ("val_every", "save_every", "log_every"):
            steps = getattr(self, name)
            if not isinstance(steps, int) or steps < 1:
                raise InputError(
                    f"trainer.{name}={steps} must be a whole number of at least 1 step"
                )
        if not isinstance(self.save_async, bool):
            raise InputError(f"trainer.save_async={self.save_async} must be true or false")
        if self.strategy not in STRATEGIES:
            raise InputError(f"trainer.strategy={self.strategy} must be auto, ddp or fsdp2")
        if not isinstance(self.checkpoint_activations, bool):
            raise InputError(
                f"trainer.checkpoint_activations={self.checkpoint_activations} must be true or false"
            )
        if self.strategy == "fsdp2" and self.precision == "16-mixed":
            raise InputError(
                "trainer.precision=16-mixed scales losses, which trainer.strategy=fsdp2 does not; "
                "use bf16-mixed or 32-true"
            )

    def check_machine(self, shards: bool) -> None:
        """Raise InputError where this machine can't do what the settings ask for.

        `shards` is whether the stage's weights can be sharded over devices.
        """
        if self.strategy == "fsdp2" and not shards:
            raise InputError(
                "trainer.strategy=fsdp2 shards the weights of stage=prior alone, "
                "for tokenizers are small; use auto or ddp"
            )
        check_compile("trainer.compile", self.compile, self.device.type)
        count_processes(self.devices, self.num_nodes, self.device.type)

    @property
    def device(self) -> torch.device:
        """The kind of device that the run uses on this machine."""
        return find_device(self.accelerator)

    @property
    def num_processes(self) -> int:
        """Processes of the run, one per device."""
        return count_processes(self.devices, self.num_nodes, self.device.type)

    def check_budget(self) -> None:
        """Raise InputError unless the run has an end."""
        Budget(self.max_steps, self.max_minutes)

    @property
    def budget(self) -> Budget:
        """How long the run lasts."""
        return Budget(self.max_steps, self.max_minutes)


def check_training_config(config: DictConfig) -> None:
    """The opening checks of every stage that trains. Raises InputError with the first setting that can't work."""
    find_device(config.trainer.accelerator)
    TrainerSettings.read(config.trainer)
    batch_size = OmegaConf.select(config, "batch_size") or OmegaConf.select(
        config, "data.batch_size"
    )
    accumulate = config.trainer.accumulate
    if isinstance(batch_size, int) and isinstance(accumulate, int) and 0 < batch_size < accumulate:
        raise InputError(
            f"trainer.accumulate={accumulate} micro-batches need more than a batch of {batch_size}"
        )
    for key in ("optimizer.lr", "loss.discriminator_optimizer.lr"):
        rate = OmegaConf.select(config, key, default=1.0)
        if not isinstance(rate, int | float) or not 0 <= rate < math.inf:
            raise InputError(f"{key}={rate} must be a number of at least 0, such as 1e-3")
    if "tensorboard" in (config.logger or {}) and find_spec("tensorboard") is None:
        raise InputError(
            'logger=tensorboard needs the library tensorboard; pip install "codegrid[tensorboard]"'
        )


def check_opening(config: DictConfig, ckpt: str | None, resumes: str | None) -> None:
    """The opening checks of every stage: its `ckpt` is named, and `resume` is not set where nothing can be resumed.

    `ckpt` is what a stage needs one for, as the end of a sentence; None where it needs none. `resumes` is why
    it can't be resumed, as the predicate of one; None where it can.
    """
    if ckpt is not None and not config.ckpt:
        raise InputError(f"stage={config.stage} needs {ckpt}")
    if resumes is not None and config.resume:
        raise InputError(f"stage={config.stage} {resumes}; leave resume={config.resume} out")
