"""Measures what it gains to start from a trained tokenizer (init=) when the images are others, against training from scratch.

python -m benchmarks.fine_tuning --root photos --minutes 2 --seeds 0 1 2

`--root` has one folder of images per class. For each seed, one run after the other, each `python train.py stage=vqgan`:

first     trains for --minutes on the first half of the classes, in the order of their names
tuned     starts from `first` and trains for --minutes on the other half
scratch   trains for twice --minutes on the other half: the time of `first` and `tuned` together
lora      as `tuned`, but with low-rank updates alone; only with --lora RANK
decoder   starts from `tuned` and trains for --minutes with learn=decoder and an adversarial loss

All others have loss=vqvae. Settings of train.py come first or after the value of another flag, and apply to all runs; those
of model and quantizer to `first` and `scratch` alone, since the others take theirs from the run that they start from.
Settings after --gan apply to `decoder` only. A seed sets the weights, the batches and the augmentation; the split is the same
for all. The machine should be idle otherwise, because minutes are counted.

All runs are measured on the validation images of the other half, `first` too, which shows what is gained without any training:

psnr          in dB, the mean over the images
perplexity    of the codes
proxy         Fréchet distance between reconstructions and images in the features of a small classifier of these images. It
              is not the FID of the literature and is comparable only within one call. Its noise floor is the distance between
              as many training images and the validation images.
proxy_ratio   proxy divided by that of the run of the same seed that this one is compared with: `scratch`, and for `decoder`
              `tuned`
energy_ratio  gradient energy of the reconstructions divided by that of the images; 1 is equally sharp
steps         updates that the minutes were enough for

Prints one JSON line per run as soon as it is measured, and a table of means over the seeds in the end. With --keep, a call
that is repeated continues with the runs that are missing.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from benchmarks.adversarial import Judge, format_spread, iterate_validation, train_run
from benchmarks.configs import compose_config
from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.environment import find_device
from codegrid.evaluation.proxy import train_proxy
from vqgan.load import load_tokenizer
from vqgan.tokenizer import Tokenizer

HALVES = ("first", "other")
ARCHITECTURE = ("model=pyramid", "model.width=32")
# Two minutes are some hundred updates on two cores, of which the usual warm-up would take many.
SMALL = ("data.batch_size=8", "schedule.warmup=20")
BUDGET = ("trainer.max_steps=null", "trainer.val_every=1000000", "data.seed=0", "logger=csv")
COLUMNS = {  # column of the table -> digits after the point
    "psnr": 2,
    "perplexity": 0,
    "proxy": 3,
    "proxy_ratio": 2,
    "energy_ratio": 3,
    "steps": 0,
}
SECONDS_BESIDE = 75  # of a run, beside its training: start, caches, validation, measurement


@dataclass(frozen=True)
class Trial:
    """A run of this benchmark, for one seed.

    half       the classes that it trains on
    minutes    how long
    start      the trial that it starts from; None: from scratch
    compare    the trial by whose proxy its own is divided; None: it is the one that others are compared with
    words      its own settings
    """

    half: str
    minutes: float
    start: str | None
    compare: str | None
    words: Sequence[str] = ("loss=vqvae",)


def list_trials(minutes: float, lora: int | None, gan: Sequence[str]) -> dict[str, Trial]:
    """All trials by their names, each after the one that it starts from."""
    trials = {
        "first": Trial("first", minutes, None, "scratch"),
        "scratch": Trial("other", 2 * minutes, None, None),
        "tuned": Trial("other", minutes, "first", "scratch"),
    }
    if lora is not None:
        low_rank = ("loss=vqvae", f"lora={lora}")
        trials["lora"] = Trial("other", minutes, "first", "scratch", low_rank)
    adversarial = ("loss=vqgan", "learn=decoder", *gan)
    trials["decoder"] = Trial("other", minutes, "tuned", "tuned", adversarial)
    return trials


def list_classes(root: Path) -> list[Path]:
    """The class folders below a folder, in the order of their names; ends the program if there are less than two."""
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if len(folders) < 2:
        sys.exit(
            f"--root {root} must be a folder of at least two class folders, and it has {len(folders)}"
        )
    return folders


def link_halves(root: Path, folder: Path) -> dict[str, Path]:
    """Two folders below `folder` that link to one half of the class folders each: of 2 n + 1 classes the first has n."""
    classes = list_classes(root)
    middle = len(classes) // 2
    halves = dict(zip(HALVES, (classes[:middle], classes[middle:]), strict=True))
    for name, members in halves.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for member in members:
            link = folder / name / member.name
            if not link.is_symlink():
                link.symlink_to(member.resolve(), target_is_directory=True)
        others = {path.name for path in (folder / name).iterdir()} - {m.name for m in members}
        if others:
            sys.exit(
                f"{folder / name} has other classes ({', '.join(sorted(others)[:3])}) than --root {root}; "
                "choose another --keep"
            )
    return {name: folder / name for name in HALVES}


@dataclass(frozen=True)
class Plan:
    """All runs of a call. `extra` are settings of each of them."""

    trials: Mapping[str, Trial]
    seeds: Sequence[int]
    extra: Sequence[str]

    def command(self, name: str, seed: int, folder: Path, halves: Mapping[str, Path]) -> list[str]:
        """The words of a run after `python`, without run_dir."""
        trial = self.trials[name]
        words = [*ARCHITECTURE, *SMALL, *self.extra]
        if trial.start is not None:
            words = [word for word in words if not is_architecture(word)]
            words.append(f"init={name_run(folder, trial.start, seed)}")
        data = ["data=folder", f"data.root={halves[trial.half]}", f"cache_dir={folder / 'cache'}"]
        budget = [*BUDGET, f"trainer.max_minutes={trial.minutes:g}"]
        return ["train.py", "stage=vqgan", *data, f"seed={seed}", *budget, *trial.words, *words]

    def describe(self) -> str:
        """How long the call takes, in a sentence."""
        training = len(self.seeds) * sum(trial.minutes for trial in self.trials.values())
        runs = len(self.seeds) * len(self.trials)
        return (
            f"{runs} runs with {training:g} minutes of training in all, about "
            f"{training + runs * SECONDS_BESIDE / 60:.0f} minutes with starts, validations and measurements"
        )


def is_architecture(word: str) -> bool:
    """Whether a word of the command line chooses something of the model or the quantizer."""
    return word.lstrip("+~").split("=")[0].split(".")[0].split("/")[0] in ("model", "quantizer")


def name_run(folder: Path, name: str, seed: int) -> Path:
    """The folder of a run."""
    return folder / f"{name}-{seed}"


def discard_incomplete(folder: Path) -> None:
    """Delete what is left of a run of this benchmark that broke off: its minutes can't be counted on."""
    if (folder / "config.yaml").is_file() and not (folder / "metrics.json").is_file():
        print(f"{folder} is of a run that broke off, and is trained again", file=sys.stderr)
        shutil.rmtree(folder)


class Meter:
    """Measures tokenizers on the validation images of one half, by features that are trained on it once."""

    def __init__(self, data: ImageDataModule, classifier_steps: int, device: torch.device) -> None:
        self.data = data
        self.device = device
        self.classifier = train_proxy(data, classifier_steps, device)
        self.judge = Judge(data, self.classifier.features, None, device)

    def measure(self, tokenizer: Tokenizer) -> dict[str, float | None]:
        """psnr, perplexity, proxy and energy_ratio."""
        figures = self.judge.measure(tokenizer)
        return {
            "psnr": figures["psnr"],
            "perplexity": self.measure_perplexity(tokenizer),
            "proxy": figures["frechet_proxy"],
            "energy_ratio": figures["energy_ratio"],
        }

    @torch.no_grad()
    def measure_perplexity(self, tokenizer: Tokenizer) -> float | None:
        """That of the codes of all images; None for a continuous bottleneck."""
        if tokenizer.K is None:
            return None
        use = tokenizer.quantizer.make_code_use().to(self.device)
        for x in iterate_validation(self.data, self.device):
            use.update(tokenizer.indices(x))
        return round(float(use.compute()["perplexity"]), 2)

    def describe(self) -> str:
        """How good the features are, and the noise of their distance."""
        accuracy, chance = (self.classifier.validation[key] for key in ("accuracy", "chance"))
        return (
            f"the classifier labels {accuracy:.1%} of the validation images correctly; chance is {chance:.1%}\n"
            f"noise floor of proxy: {self.judge.measure_floor():.4f}"
        )


def measure_run(meter: Meter, name: str, seed: int, run: Path) -> dict[str, Any]:
    """The row of a trained run."""
    tokenizer, _ = load_tokenizer(run)
    steps = json.loads((run / "metrics.json").read_text())["steps"]
    row = {"bench": "fine_tuning", "run": name, "seed": seed}
    return {**row, **meter.measure(tokenizer), "steps": steps}


def format_rows(rows: Sequence[Mapping[str, Any]], trials: Mapping[str, Trial]) -> str:
    """A Markdown table of means over the seeds; proxy_ratio is computed per seed."""
    lines = ["| | minutes | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    figures = {(row["run"], row["seed"]): dict(row) for row in rows}
    for (name, seed), row in figures.items():
        compared = figures.get((trials[name].compare, seed))
        if compared and compared["proxy"]:
            row["proxy_ratio"] = row["proxy"] / compared["proxy"]
    for name, trial in trials.items():
        own = [row for (run, _), row in figures.items() if run == name]
        cells = []
        for column, digits in COLUMNS.items():
            values = [row[column] for row in own if row.get(column) is not None]
            cells.append(format_spread(values, digits) if values else "-")
        lines.append(f"| {name} | {trial.minutes:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line, and its settings of train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="a folder of class folders")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lora", type=int, metavar="RANK", help="also train low-rank updates")
    parser.add_argument(
        "--gan", nargs="+", default=[], metavar="SETTING", help="settings for `decoder` only"
    )
    parser.add_argument("--classifier-steps", type=int, default=1500)
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which are not repeated")
    return parser.parse_known_args()


def main() -> None:
    options, extra = read_options()
    plan = Plan(list_trials(options.minutes, options.lora, options.gan), options.seeds, extra)
    print(plan.describe(), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        halves = link_halves(options.root, folder)
        words = plan.command("scratch", plan.seeds[0], folder, halves)
        data: ImageDataModule = instantiate(compose_config(*words[1:]).data)
        meter = Meter(data, options.classifier_steps, find_device("auto"))
        print(meter.describe(), flush=True)
        rows = []
        for seed in plan.seeds:
            for name in plan.trials:
                run = name_run(folder, name, seed)
                discard_incomplete(run)
                train_run(plan.command(name, seed, folder, halves), run)
                rows.append(measure_run(meter, name, seed, run))
                print(json.dumps(rows[-1]), flush=True)
        print(f"\n{format_rows(rows, plan.trials)}")


if __name__ == "__main__":
    main()
