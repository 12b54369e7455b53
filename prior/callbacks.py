"""What a prior shows while it learns, and when it learns the wrong thing."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from data.images import to_uint8
from data.loading import BatchDataModule
from data.pictures import show_picture, tile_images
from engine.callbacks.alarms import Alarms, Sign
from engine.errors import check_range
from engine.folder import PICTURES
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.module import MAX_TRAINING_GRIDS, Prior
from vqgan.tokenizer import Tokenizer

SIDE = 256  # pixels of a loss map, about


class SamplePictures(Callback):
    """After each validation: samples, decoded, `rows` of `n`; the same random numbers every time."""

    def __init__(self, tokenizer: Tokenizer, n: int = 12, rows: int = 3) -> None:
        self.tokenizer, self.n, self.rows = tokenizer, n, rows

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Prior)
        if trainer.is_global_zero and not trainer.sanity_checking:
            n, classes = self.n * self.rows, module.model.classes
            codes = sample(
                module.model,
                Sampler(),
                n,
                seed=0,
                labels=torch.arange(n) % classes if classes else None,
            )
            images = to_uint8(self.tokenizer.to(module.device).decode_indices(codes))
            show_picture(
                trainer,
                tile_images(list(images.split(self.n)), scale=2),
                Path(trainer.default_root_dir) / PICTURES,
                "samples",
                module.step,
            )


class LossMapPictures(Callback):
    """After each validation: the nats of each position, a square each, black where they are lowest and white where highest;
    both numbers are in the logs, as val/nats_easiest_place and val/nats_hardest_place."""

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Prior)
        if trainer.is_global_zero and not trainer.sanity_checking:
            found = module.loss_map - module.loss_map.min()
            grey = to_uint8(2 * found / found.max().clamp(min=1e-9) - 1)
            show_picture(
                trainer,
                tile_images([grey[None, None]], scale=max(1, SIDE // max(grey.shape))),
                Path(trainer.default_root_dir) / PICTURES,
                "loss-map",
                module.step,
            )


class PriorDoctor(Alarms):
    """Looks at a run of stage 2 at every validation.

    * the prior over-fits: the validation nats are more than `margin` above their lowest, the training nats below what they
      were then
    * after the share `late` of the run the prior needs no fewer nats than how often each code occurs, whatever is before it
    """

    def __init__(
        self, every: int = 50, patience: int = 3, margin: float = 0.01, late: float = 0.2
    ) -> None:
        super().__init__(every, patience)
        check_range("callbacks.doctor.margin", margin, 0)
        check_range("callbacks.doctor.late", late, 0, 1)
        self.margin, self.late = margin, late
        self.best = (
            math.inf,
            math.inf,
            0,
        )  # the lowest validation nats, the training nats then, and the step
        self.unigram = math.inf

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, BatchDataModule)
        p = data.take_evenly("train", MAX_TRAINING_GRIDS)[0].flatten().bincount().double()
        p /= p.sum()
        self.unigram = float(-torch.xlogy(p, p).sum())

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Prior)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            found = float(trainer.callback_metrics["val/nats_per_token"])
            self.look(
                trainer,
                module,
                self.signs(module, found, found - float(trainer.callback_metrics["val/gap"])),
            )

    def signs(self, module: Prior, unseen: float, seen: float) -> Iterator[Sign]:
        """What is wrong, by the nats per token of the validation set and of the training set."""
        lowest, then, step = self.best
        if unseen < lowest:
            self.best = unseen, seen, module.step
        elif unseen > lowest + self.margin and seen < then:
            yield Sign(
                "overfitting",
                f"the prior over-fits: validation takes {unseen:.3f} nats per token, {lowest:.3f} at step {step}, while training "
                f"went from {then:.3f} to {seen:.3f}",
                "prior.dropout=0.1 prior.token_dropout=0.1, flip=true, crops=10, a smaller prior/size, or fewer steps",
            )
        if module.now.progress >= self.late and unseen >= self.unigram:
            yield Sign(
                "blind",
                f"the prior has learned nothing of how codes go together: it takes {unseen:.3f} nats per token, and "
                f"{self.unigram:.3f} are enough to know how often each occurs",
                "another optimizer.lr, a longer run, or a larger prior",
            )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.best = state_dict["best"]
