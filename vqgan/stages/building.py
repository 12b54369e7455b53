"""What stage=vqgan trains, built from its config."""

from collections.abc import Callable

from hydra.utils import instantiate
from omegaconf import DictConfig

from codegrid.engine.precision import choose_memory_format
from codegrid.engine.settings import TrainerSettings
from vqgan.learning import Learners, choose_learners
from vqgan.load import build_tokenizer
from vqgan.losses.code_changes import CodeChange
from vqgan.losses.groups import group_code_losses, group_losses
from vqgan.module import VQGAN, Training


def build_module(
    config: DictConfig,
    training: TrainerSettings,
    learners: Learners | None = None,
    make: Callable[..., VQGAN] = VQGAN,
) -> VQGAN:
    """The whole of stage 1, untrained, that a config describes. `learners` are those of config.learn unless they are passed;
    `make` is what takes the parts of a VQGAN."""
    # The losses come before the tokenizer: the order in which random numbers are drawn.
    losses = instantiate(config.loss)
    reconstruction, adversary = group_losses(**losses)
    if learners is None:
        has_adversary = adversary is not None
        learners = choose_learners(config.learn, bool(config.init), has_adversary, config.lora)
    optimizer, schedule = instantiate(config.optimizer), instantiate(config.schedule)
    rules = training.budget, training.clip, training.accumulate, learners
    tokenizer = build_tokenizer(config.model, config.quantizer)
    of_training = Training(optimizer, schedule, *rules)
    on_codes = group_code_losses(tokenizer, learners, make_redraw(config), **losses)
    module = make(tokenizer, reconstruction, of_training, adversary, on_codes)
    return module.to(memory_format=choose_memory_format(training.device))


def make_redraw(config: DictConfig) -> CodeChange | None:
    """What lets the prior that `codes` names draw codes that the decoder sees; None without one."""
    ckpt = config.get("codes")
    return instantiate(config.redraw, ckpt=ckpt) if ckpt else None
