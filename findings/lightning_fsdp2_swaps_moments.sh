#!/usr/bin/env bash
# Expected: a checkpoint that Lightning saved under strategy="ddp" resumes under ModelParallelStrategy (FSDP2) with each
#   parameter's own optimizer moments; both write one plain file (save_distributed_checkpoint=False), and the weights arrive.
# Happens: if the optimizer has parameter groups in another order than the model's parameters (weight decay for some, say), each
#   parameter gets the moments of another one. Equal shapes are swapped without a word. Under ddp the file's numbers are those of
#   optimizer.state_dict(), which follow the groups; ModelParallelStrategy takes them for the order of model.parameters().
# Versions: lightning 2.6.6, torch 2.15.0, Python 3.11, two CPU processes (gloo).
# Seen by: printing the norm of exp_avg of both layers at the start of the resumed run.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv env
env/bin/pip install --quiet --disable-pip-version-check torch==2.15.0 lightning==2.6.6 numpy==2.4.6
cat > swap.py <<'E'
import logging
import sys
import warnings

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel("ERROR")


class TwoLayers(L.LightningModule):
    def __init__(self):
        super().__init__()
        layers = [torch.nn.Linear(4, 4, bias=False) for _ in range(2)]
        self.net = torch.nn.Sequential(*layers)

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, _):
        return (self.net(batch) - 1).square().mean()

    def configure_optimizers(self):
        first, second = self.net[0].weight, self.net[1].weight
        groups = [{"params": [second], "weight_decay": 0.0}, {"params": [first]}]
        return torch.optim.AdamW(groups, 1e-2)


class Moments(L.Callback):
    """Prints the norm of each layer's first moment, which all ranks gather, where there is one."""

    def __init__(self, when):
        self.when = when

    def show(self, trainer, module):
        norms = []
        for layer in module.net:
            moment = trainer.optimizers[0].state[layer.weight]["exp_avg"]
            moment = moment.full_tensor() if hasattr(moment, "full_tensor") else moment
            norms.append(f"{moment.norm().item():.6f}")
        if trainer.is_global_zero:
            print("moments", *norms, flush=True)

    def on_train_start(self, trainer, module):
        if self.when == "start":
            self.show(trainer, module)

    def on_train_end(self, trainer, module):
        if self.when == "end":
            self.show(trainer, module)


if __name__ == "__main__":
    kind = sys.argv[1]
    torch.manual_seed(0)
    sharded = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp" if kind != "fsdp2" else sharded, max_epochs=9,
        max_steps=3 if kind == "train" else 4, callbacks=[Moments("end" if kind == "train" else "start")],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    data = DataLoader(torch.randn(8, 4), batch_size=4)
    trainer.fit(TwoLayers(), data, ckpt_path=None if kind == "train" else "ddp.ckpt")
    if kind == "train":
        trainer.save_checkpoint("ddp.ckpt")
E
moments() { OMP_NUM_THREADS=1 env/bin/python swap.py "$1" 2> "$1.err" | grep '^moments'; }
saved=$(moments train)
resumed=$(moments ddp)
sharded=$(moments fsdp2)
read -r _ first second <<< "$saved"
echo "saved by ddp:      $saved"
echo "resumed by ddp:    $resumed"
echo "resumed by fsdp2:  $sharded"
[ "$resumed" = "$saved" ] || { echo "ddp no longer resumes its own moments"; exit 1; }
[ "$sharded" = "moments $second $first" ] || { echo "fsdp2 no longer swaps the moments"; exit 1; }
echo "confirmed: under FSDP2 each layer resumes with the other layer's moments"
