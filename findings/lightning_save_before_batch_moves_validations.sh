#!/usr/bin/env bash
# Expected: with val_check_interval=3 validation runs after updates 3, 6, 9 ..., also in a run that resumes from a checkpoint of
#   update 4, whichever hook called trainer.save_checkpoint: nothing happens between on_train_batch_end of one update and
#   on_train_batch_start of the next.
# Happens: with check_val_every_n_epoch=None (needed for endless data, where an interval counts over epochs), a checkpoint saved
#   in on_train_batch_start moves all later validations one update forward: 5, 8, 11. The counter `total.ready` has been raised
#   by then; on resume only the counters of the epoch are set back. With check_val_every_n_epoch=1 they stay where they were.
# Versions: lightning 2.6.6, torch 2.15.0, Python 3.11, one CPU process.
# Seen by: noting the number of updates at each validation, uninterrupted and resumed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 lightning==2.6.6 numpy==2.4.6
cat > shift.py <<'E'
import logging
import warnings

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel("ERROR")


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(1)


class Counting(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.updates, self.validations = 0, []

    def training_step(self, batch, _):
        self.updates += 1
        return (self.weight - batch).square().sum()

    def validation_step(self, batch, _):
        self.validations.append(self.updates)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["updates"] = self.updates

    def on_load_checkpoint(self, checkpoint):
        self.updates = checkpoint["updates"]


class SaveAfterFour(L.Callback):
    def __init__(self, hook):
        setattr(self, hook, self.save)

    def save(self, trainer, module, *_):
        if module.updates == 4:
            trainer.save_checkpoint("four.ckpt")


def validations(steps, epochs, callbacks=(), ckpt=None):
    module = Counting()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, max_steps=steps, val_check_interval=3, check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Endless(), batch_size=1), DataLoader([torch.ones(1)]), ckpt_path=ckpt)
    return module.validations


for epochs in (None, 1):
    assert validations(13, epochs) == [3, 6, 9, 12]
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        validations(6, epochs, [SaveAfterFour(hook)])
        resumed = validations(13, epochs, ckpt="four.ckpt")
        print(f"check_val_every_n_epoch={epochs}, saved in {hook}: validated after {resumed}")
        moved = epochs is None and hook == "on_train_batch_start"
        assert resumed == ([5, 8, 11] if moved else [6, 9, 12]), "this has changed"
print("confirmed: where a checkpoint is saved decides when the resumed run validates")
E
env/bin/python shift.py 2> err || { tail -n 5 err; exit 1; }
