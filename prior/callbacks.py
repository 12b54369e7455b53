"""Callbacks of a prior's training: pictures at every validation, and alarms."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from codegrid.data.images import to_uint8
from codegrid.data.loading import BatchDataModule
from codegrid.data.pictures import show_picture, tile_images
from codegrid.engine.callbacks.alarms import Alarms, Sign
from codegrid.engine.errors import check_range
from codegrid.engine.folder import PICTURES
from codegrid.evaluation.units import describe_shown
from prior.conditioning.base import Condition
from prior.decoding.generate import sample
from prior.decoding.sampling import Sampler
from prior.module import MAX_TRAINING_GRIDS, PriorModule
from vqgan.tokenizer import Tokenizer

SIDE = 256  # approximate width and height of a loss map in pixels


def save_validation_picture(
    trainer: L.Trainer,
    module: PriorModule,
    rows: list[torch.Tensor],
    name: str,
    scale: int,
    caption: str = "",
) -> None:
    """Save and log the rows (n, C, H, W) uint8 as a picture, in pictures/ of the run folder."""
    folder = Path(trainer.default_root_dir) / PICTURES
    show_picture(trainer, tile_images(rows, scale=scale), folder, name, module.step, caption)


class SamplePictures(Callback):
    """After each validation: `rows` rows of `n` decoded samples, drawn by the same random numbers every time.

    They are of all classes in turn, or of the first validation images' conditions. Conditions that are pictures are shown above
    their samples.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        condition: Condition | None = None,
        n: int = 12,
        rows: int = 3,
    ) -> None:
        self.tokenizer, self.condition = tokenizer, condition
        self.n, self.rows = n, rows

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, PriorModule)
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        n, classes = self.n * self.rows, module.model.classes
        labels = torch.arange(n) % classes if classes else None
        if module.model.is_conditional and not classes:
            data = trainer.datamodule  # type: ignore[attr-defined]
            first = data.take_evenly("val", n)[1]
            labels = first[torch.arange(n) % len(first)]
        codes = sample(module.model, Sampler.unmodified(), n, seed=0, labels=labels)
        decoded = self.tokenizer.to(module.device).decode_indices(codes)
        rules = self.tokenizer.rules
        images = rules.to_picture(decoded)
        rows, caption = list(images.split(self.n)), describe_shown(rules, decoded.shape[1])
        if self.condition is not None and labels is not None:
            self.condition.to(module.device)
            shown = self.condition.show(labels, images.shape[2:])
            if shown is not None:
                above = shown.expand(-1, max(shown.shape[1], images.shape[1]), -1, -1)
                rows = [
                    row.expand(-1, above.shape[1], -1, -1)
                    for pair in zip(above.split(self.n), rows, strict=True)
                    for row in pair
                ]
        save_validation_picture(trainer, module, rows, "samples", 2, caption)


class LossMapPictures(Callback):
    """After each validation: the nats of each position as a grey square, black at the lowest and white at the highest.

    Both extremes are logged, as val/nats_easiest_place and val/nats_hardest_place.
    """

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, PriorModule)
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        above = module.loss_map - module.loss_map.min()
        grey = to_uint8(2 * above / above.max().clamp(min=1e-9) - 1)
        scale = max(1, SIDE // max(grey.shape))
        save_validation_picture(trainer, module, [grey[None, None]], "loss-map", scale)


class PriorDoctor(Alarms):
    """Checks a run of stage 2 at every validation and raises an alarm if:

    * the prior over-fits: the validation nats are more than `margin` above their lowest, and the training nats are below
      what they were then
    * after the share `late` of the run, the prior still needs as many nats as the unigram, which knows only how often each
      code occurs; not if a single code occurs, of which there is nothing to learn
    """

    def __init__(self, every: int, patience: int, margin: float, late: float = 0.2) -> None:
        super().__init__(every, patience)
        check_range("callbacks.doctor.margin", margin, 0)
        check_range("callbacks.doctor.late", late, 0, 1)
        self.margin, self.late = margin, late
        # The lowest validation nats, the training nats at that time, and the step.
        self.best = (math.inf, math.inf, 0)
        self.unigram = math.inf  # nats per token of the codes' own frequencies

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, BatchDataModule)
        p = data.take_evenly("train", MAX_TRAINING_GRIDS)[0].flatten().bincount().double()
        p /= p.sum()
        self.unigram = float(-torch.xlogy(p, p).sum())

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, PriorModule)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            val_nats = float(trainer.callback_metrics["val/nats_per_token"])
            train_nats = val_nats - float(trainer.callback_metrics["val/gap"])
            self.look(trainer, module, self.signs(module, val_nats, train_nats))

    def signs(self, module: PriorModule, val_nats: float, train_nats: float) -> Iterator[Sign]:
        """The problems that these nats per token show."""
        lowest, train_then, step = self.best
        if val_nats < lowest:
            self.best = val_nats, train_nats, module.step
        elif val_nats > lowest + self.margin and train_nats < train_then:
            yield Sign(
                "overfitting",
                f"the prior over-fits: validation takes {val_nats:.3f} nats per token, {lowest:.3f} at step {step}, while "
                f"training went from {train_then:.3f} to {train_nats:.3f}",
                "prior.dropout=0.1 prior.token_dropout=0.1, flip=true, crops=10, a smaller prior/size, or fewer steps",
            )
        if module.now.progress >= self.late and val_nats >= self.unigram > 0:
            yield Sign(
                "blind",
                f"the prior has learned nothing of how codes go together: it takes {val_nats:.3f} nats per token, and the "
                f"frequencies of the codes alone give {self.unigram:.3f}",
                "another optimizer.lr, a longer run, or a larger prior",
            )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.best = state_dict["best"]
