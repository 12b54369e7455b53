"""Do seeded runs still end in the same state, to the bit?

    python -m benchmarks.identity                     compare with the recorded hashes
    python -m benchmarks.identity --against DIR       compare with another checkout, run on this machine
    python -m benchmarks.identity --record            record this machine's hashes

Runs both stages for 30 steps with two data workers and micro-batches, the discriminator's gate open in the second half,
and hashes the weights, their average and the optimizers' moments in the last checkpoint. A hash depends on the processor
and on the version of torch, so the record has one entry per kind of machine.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_suffix(".json")
COMMON = (
    "trainer.accelerator=cpu trainer.max_steps=30 trainer.val_every=10 trainer.save_every=7 trainer.log_every=5 logger=csv"
).split()
TOKENIZER = (
    "stage=vqgan data.n_train=64 data.n_val=16 data.batch_size=8 data.image_size=16 data.num_workers=2 data.crop=random "
    "model.grid=4 model.width=8 quantizer.K=16 quantizer.dim=8 loss.gate.start=0.4 loss.gate.warmup=0.2 "
    "loss.discriminator.width=8 trainer.accumulate=2"
).split()
PRIOR = "stage=prior prior.width=16 prior.depth=2 prior.heads=2 batch_size=8 trainer.accumulate=2".split()
RUNS: dict[
    str, list[str]
] = {  # name -> arguments; the priors read the codes of the runs before them
    "vqgan": [*TOKENIZER, "trainer.precision=32-true"],
    "vqgan-joint": [
        *TOKENIZER,
        "quantizer=vq",
        "loss.codes_rest=false",
        "loss/augment=diffaugment",
        "loss.r1.weight=1",
    ],
    "vqgan-residual": [
        *TOKENIZER,
        "quantizer=residual",
        "quantizer.books=2",
        "trainer.precision=32-true",
    ],
    "prior-gpt": [*PRIOR, "ckpt=vqgan", "trainer.precision=32-true"],
    "prior-maskgit": [*PRIOR, "ckpt=vqgan", "prior=maskgit", "prior.dropout=0.1"],
    "prior-rar": [
        *PRIOR,
        "ckpt=vqgan",
        "prior=rar",
        "conditional=false",
        "trainer.precision=32-true",
    ],
    "prior-rq": [
        *PRIOR,
        "ckpt=vqgan-residual",
        "prior=rq",
        "prior.token_dropout=0.1",
        "trainer.precision=32-true",
    ],
}


def machine() -> str:
    """What a hash depends on beside the code."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    ids = [
        line.partition(":")[2].strip()
        for line in lines
        if line.startswith(("vendor_id", "cpu family", "model\t"))
    ][:3]
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {' '.join(ids)}"


def state_hash(checkpoint: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of the weights, their average and the optimizers' moments."""
    digest = hashlib.sha256()

    def update(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            digest.update(
                node.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(node, dict):
            for key in sorted(node, key=str):
                digest.update(str(key).encode())
                update(node[key])

    update(checkpoint["state_dict"])
    update(checkpoint["average"])
    for optimizer in checkpoint["optimizer_states"]:
        update(optimizer["state"])
    return digest.hexdigest()[:16]


def run_all(root: Path, names: list[str]) -> dict[str, str]:
    """Name -> hash of each run's last state, by the code of the checkout `root`."""
    hashes: dict[str, str] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            command = [
                sys.executable,
                str(root / "train.py"),
                *RUNS[name],
                *COMMON,
                f"run_dir={name}",
            ]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(
                    f"{name} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}"
                )
            checkpoint = torch.load(
                Path(folder) / name / "checkpoints" / "last.ckpt", weights_only=True
            )
            hashes[name] = state_hash(checkpoint)
            print(f"{name:16}{hashes[name]}", flush=True)
    return hashes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the checkout to run; by default this one"
    )
    parser.add_argument("--against", type=Path, help="another checkout to compare with")
    parser.add_argument(
        "--record", action="store_true", help="record the hashes instead of comparing"
    )
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), help="some of the runs"
    )
    options = parser.parse_args()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if options.against is None and not options.record and machine() not in record:
        raise SystemExit(
            f"no hashes are recorded for this machine ({machine()}); compare with a checkout: --against DIR"
        )
    hashes = run_all(options.root.resolve(), options.only)
    if options.record:
        record[machine()] = record.get(machine(), {}) | hashes
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
        return
    wanted = (
        run_all(options.against.resolve(), options.only) if options.against else record[machine()]
    )
    different = [name for name in options.only if hashes[name] != wanted.get(name)]
    if different:
        raise SystemExit(f"the state differs after {', '.join(different)}")
    print(f"{len(options.only)} runs end in the same state, to the bit")


if __name__ == "__main__":
    main()
