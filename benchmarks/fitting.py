"""Measures what it gains to fit a tokenizer to its prior: perturbed codes, cheap codes, decoders that learn what a prior draws.

python -m benchmarks.fitting --seeds 0 1 2 --keep runs/fitting
python -m benchmarks.fitting data.image_size=24 model.grid=6 --data folder --root tiny-imagenet-24 --keep runs/fitting-photos

Each run is `python train.py`, one after the other, with a number of steps, so the machine's load changes nothing but the time.
For each seed:

plain     a tokenizer with loss=vqvae, and a prior on its codes
perturb   the same with loss.perturb, and a prior on its codes
cost      the same as plain with loss.code_cost, and a prior on its codes
more      the decoder of plain trains further, learn=decoder with loss=vqgan; samples are plain's prior's
redraw    the same with codes=<plain's prior>: it learns codes that the prior draws anew

All are measured on the same validation images, in the features of a small classifier of these images:

psnr      of reconstructions, in dB
rfid      Fréchet distance between reconstructions and images
pfid      the same for reconstructions from perturbed codes, as stage=evaluate has it: PERTURBED of an image's codes replaced by
          one of the NEAREST (pFID, Qiu et al. 2025)
gfid      the same for as many samples of the prior as there are images; those of one prior and seed are the same codes
nats      per image under the prior, on the validation images' codes
codes     equally frequent codes of the same entropy (perplexity)

The distances are not those of the literature and are comparable only within one call. `floor` is the distance between as
many training images and the validation images. Each *_ratio is the figure divided by that of the run of the same seed that it
is compared with: plain, and for redraw `more`.

Settings of train.py come first or after the value of another flag and apply to plain, perturb and cost, those of data to
all; --prior, --decoder and --redraw take settings for the others. Prints one JSON line per run as soon as it is measured, then
a table of means over the seeds. With --keep, a call that is repeated continues with the runs that are missing.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.adversarial import Judge, format_spread, iterate_validation, train_run
from benchmarks.fine_tuning import discard_incomplete, name_run
from benchmarks.priors import measure_distance
from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_uint8
from codegrid.engine.checkpoint import build_trusted
from codegrid.engine.environment import find_device
from codegrid.evaluation.codebook import CodebookUse
from codegrid.evaluation.proxy import train_proxy
from prior.decoding.generate import generate
from prior.decoding.sampling import Sampler
from prior.load import load_prior
from vqgan.load import load_tokenizer
from vqgan.perturbing import perturb_codes
from vqgan.tokenizer import Tokenizer

PERTURBED, NEAREST = 0.2, 8
IMAGES = ("data.image_size=32", "data.batch_size=32")
SMALL = ("model.grid=8", "model.width=32", "quantizer.K=256", "quantizer.dim=32")
RATIOS = ("rfid", "pfid", "gfid", "nats")
DIGITS = {"psnr": 2, "rfid": 3, "pfid": 3, "gfid": 3, "nats": 1, "codes": 0}


@dataclass(frozen=True)
class Trial:
    """A tokenizer of this benchmark.

    words      its own settings
    start      the trial that it starts from, whose prior its samples are from too; None: it has a prior of its own
    compare    the trial by whose figures its own are divided; None: others are compared with it
    """

    words: Sequence[str] = ()
    start: str | None = None
    compare: str | None = None


@dataclass(frozen=True)
class Plan:
    """All runs of a call, and the settings of each kind of them."""

    trials: Mapping[str, Trial]
    data: Sequence[str]
    steps: int
    prior_steps: int
    decoder_steps: int
    tokenizer: Sequence[str] = ()
    prior: Sequence[str] = ()
    decoder: Sequence[str] = field(default_factory=tuple)

    def tokenizer_command(self, name: str, seed: int, folder: Path) -> list[str]:
        """The words of a tokenizer's run after `python`, without run_dir."""
        trial = self.trials[name]
        images = [*self.data, *IMAGES]
        if trial.start is None:
            own = ["loss=vqvae", *SMALL, *budget(self.steps), *self.tokenizer]
        else:
            images += [word for word in self.tokenizer if word.startswith("data.")]
            init = name_run(folder, trial.start, seed)
            own = ["loss=vqgan", "learn=decoder", f"init={init}", "loss.gate.start=0.1"]
            own += [*budget(self.decoder_steps), *self.decoder]
        prior = name_prior(folder, trial.start, seed)
        words = [word.format(prior=prior) for word in trial.words]
        return ["train.py", "stage=vqgan", *images, f"seed={seed}", *own, *words]

    def prior_command(self, name: str, seed: int, folder: Path) -> list[str]:
        """The words of the run of a tokenizer's prior after `python`, without run_dir."""
        size = ["prior/size=tiny", *budget(self.prior_steps)]
        ckpt = f"ckpt={name_run(folder, name, seed)}"
        return ["train.py", "stage=prior", ckpt, f"seed={seed}", *size, *self.prior]


def budget(steps: int) -> list[str]:
    """The settings of a run of so many steps that is validated once, at its end."""
    return [f"trainer.max_steps={steps}", "trainer.val_every=1000000", "logger=csv"]


def name_prior(folder: Path, tokenizer: str | None, seed: int) -> Path:
    """The folder of the prior of a trial's tokenizer."""
    return name_run(folder, f"{tokenizer}-prior", seed)


def list_trials(
    perturb: float, code_cost: float, redraw: Sequence[str], only: Sequence[str]
) -> dict[str, Trial]:
    """The trials by their names, each after the one that it starts from; `only` these and what they start from and are compared
    with."""
    redrawn = ("codes={prior}", *redraw)
    everything = {
        "plain": Trial(),
        "perturb": Trial((f"loss.perturb={perturb}",), compare="plain"),
        "cost": Trial((f"loss.code_cost={code_cost}",), compare="plain"),
        "more": Trial((), start="plain"),
        "redraw": Trial(redrawn, start="plain", compare="more"),
    }
    wanted = set(only)
    for name in reversed(everything):
        trial = everything[name]
        if name in wanted:
            wanted |= {other for other in (trial.start, trial.compare) if other is not None}
    return {name: trial for name, trial in everything.items() if name in wanted}


class Meter:
    """Measures tokenizers and samples on the validation images of `data`."""

    def __init__(self, data: ImageDataModule, classifier_steps: int, device: torch.device) -> None:
        self.data, self.device = data, device
        self.classifier = train_proxy(data, classifier_steps, device)
        self.judge = Judge(data, self.classifier.features, None, device)

    @torch.no_grad()
    def measure(self, tokenizer: Tokenizer) -> dict[str, float]:
        """psnr, rfid, pfid and codes."""
        tokenizer = tokenizer.eval().to(self.device)
        figures = self.judge.measure(tokenizer)
        use = CodebookUse(tokenizer.K or 0, tokenizer.num_codebooks).to(self.device)
        perturbed: list[Tensor] = []
        for x in iterate_validation(self.data, self.device):
            q = tokenizer.encode(x)
            assert q.indices is not None
            use.update(q.indices)
            codes = perturb_codes(tokenizer.quantizer, q.indices, PERTURBED, NEAREST)
            perturbed.append(to_uint8(tokenizer.decode_indices(codes)).cpu())
        return {
            "psnr": float(figures["psnr"] or 0),
            "rfid": float(figures["frechet_proxy"] or 0),
            "pfid": round(measure_distance(self.judge, torch.cat(perturbed)), 4),
            "codes": round(float(use.compute()["perplexity"]), 2),
        }

    @torch.no_grad()
    def measure_samples(self, tokenizer: Tokenizer, codes: Sequence[Tensor]) -> float:
        """The Fréchet distance of samples, decoded from batches of their codes."""
        images = [to_uint8(tokenizer.decode_indices(part.to(self.device))).cpu() for part in codes]
        return round(measure_distance(self.judge, torch.cat(images)), 4)

    def describe(self) -> dict[str, Any]:
        """How good the features are, and the noise of their distances."""
        floor = round(self.judge.measure_floor(), 4)
        return {"bench": "fitting", "classifier": self.classifier.validation, "floor": floor}


def draw_codes(run: Path, n: int, device: torch.device) -> list[Tensor]:
    """Batches of the codes of n samples of the prior of a run, always the same ones."""
    model = load_prior(run).model.to(device)
    return [codes.cpu() for codes in generate(model, Sampler.unmodified(), n, seed=0)]


def measure_nats(run: Path) -> float:
    """Nats per image of a prior's run, by its metrics."""
    bits = json.loads((run / "metrics.json").read_text())["bits_per_image"]
    return round(bits * math.log(2), 2)


def add_ratios(rows: Sequence[dict[str, Any]], trials: Mapping[str, Trial]) -> list[dict[str, Any]]:
    """The rows with their ratios to the rows of the same seed that they are compared with, and with the change of PSNR in dB."""
    by_name = {(row["run"], row["seed"]): row for row in rows}
    extended = []
    for row in rows:
        other = by_name.get((trials[row["run"]].compare, row["seed"]))
        ratios: dict[str, float] = {}
        if other is not None:
            ratios = {
                f"{key}_ratio": round(row[key] / other[key], 4) for key in RATIOS if other[key]
            }
            ratios["psnr_change"] = round(row["psnr"] - other["psnr"], 3)
        extended.append({**row, **ratios})
    return extended


def format_rows(rows: Sequence[Mapping[str, Any]], trials: Mapping[str, Trial]) -> str:
    """A Markdown table of means over the seeds; ratios are computed per seed."""
    columns = [*DIGITS, *(f"{key}_ratio" for key in RATIOS), "psnr_change"]
    lines = ["| | compared with | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, trial in trials.items():
        cells = []
        for column in columns:
            values = [row[column] for row in rows if row["run"] == name and column in row]
            digits = DIGITS.get(column, 2)
            sign = "+" if column == "psnr_change" else ""
            cells.append(format_spread(values, digits, sign) if values else "-")
        lines.append(f"| {name} | {trial.compare or '-'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line, and its settings of train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["shapes", "folder"], default="shapes")
    parser.add_argument("--root", type=Path, help="the image folder for --data folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    names = ("plain", "perturb", "cost", "more", "redraw")
    parser.add_argument("--only", nargs="+", choices=names, default=list(names))
    parser.add_argument("--steps", type=int, default=800, help="of plain, perturb and cost")
    parser.add_argument("--prior-steps", type=int, default=800)
    parser.add_argument("--decoder-steps", type=int, default=400, help="of more and redraw")
    parser.add_argument("--perturb", type=float, default=0.1, help="loss.perturb")
    parser.add_argument("--code-cost", type=float, default=0.01, help="loss.code_cost")
    parser.add_argument("--prior", nargs="+", default=[], metavar="SETTING")
    parser.add_argument("--decoder", nargs="+", default=[], metavar="SETTING")
    parser.add_argument("--redraw", nargs="+", default=[], metavar="SETTING")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--classifier-steps", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which are not repeated")
    return parser.parse_known_args()


def main() -> None:
    options, extra = read_options()
    trials = list_trials(options.perturb, options.code_cost, options.redraw, options.only)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        data = [f"data={options.data}", "data.seed=0", f"cache_dir={folder / 'cache'}"]
        data.append(f"data.root={options.root.resolve()}" if options.root else "data.n_train=8000")
        steps = options.steps, options.prior_steps, options.decoder_steps
        plan = Plan(trials, data, *steps, extra, options.prior, options.decoder)
        run_plan(plan, options.seeds, folder, options.samples, options.classifier_steps)


def run_plan(
    plan: Plan, seeds: Sequence[int], folder: Path, samples: int, classifier_steps: int
) -> None:
    """Train and measure everything, and print the rows and the table."""
    device = find_device("auto")
    meter: Meter | None = None
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        drawn: dict[str, tuple[list[Tensor], float]] = {}  # tokenizer -> its prior's codes and nats
        for name, trial in plan.trials.items():
            run = name_run(folder, name, seed)
            discard_incomplete(run)
            train_run(plan.tokenizer_command(name, seed, folder), run)
            tokenizer, described = load_tokenizer(run)
            if meter is None:
                data: ImageDataModule = build_trusted(described["data"], ImageDataModule)  # type: ignore[type-abstract]
                meter = Meter(data, classifier_steps, device)
                print(json.dumps(meter.describe()), flush=True)
            if trial.start is None:
                of_prior = name_prior(folder, name, seed)
                discard_incomplete(of_prior)
                train_run(plan.prior_command(name, seed, folder), of_prior)
                drawn[name] = draw_codes(of_prior, samples, device), measure_nats(of_prior)
            codes, nats = drawn[trial.start or name]
            row = {"bench": "fitting", "run": name, "seed": seed, **meter.measure(tokenizer)}
            gfid = meter.measure_samples(tokenizer, codes)
            rows.append({**row, "gfid": gfid, "nats": nats})
            print(json.dumps(add_ratios(rows, plan.trials)[-1]), flush=True)
    print(f"\n{format_rows(add_ratios(rows, plan.trials), plan.trials)}")
    print(json.dumps({"bench": "fitting", "seeds": list(seeds), "rows": len(rows)}))


if __name__ == "__main__":
    main()
