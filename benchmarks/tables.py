"""The tables of docs/tables.md: all bottlenecks at equal bits and images, and all priors on one tokenizer.

python -m benchmarks.tables bottlenecks --images 16000 --seeds 0 1 2 --rows docs/tables.jsonl --write docs/tables.md
python -m benchmarks.tables bottlenecks --images 16000 --data tiny-imagenet-24 --rows docs/tables.jsonl --write docs/tables.md
python -m benchmarks.tables priors --ckpt runs/demo/tokenizer --images 32000 --rows docs/tables.jsonl --write docs/tables.md
python -m benchmarks.tables priors --ckpt runs/demo/tokenizer --speed --rows docs/tables.jsonl

Trains each with `python train.py`, one after the other, on as many images whatever the minutes, and judges it with
`stage=evaluate`: other work on the machine changes nothing but the seconds. With `--speed` each is timed instead, before or
after, on a machine that should be idle: ms a step are the difference between two short runs, without the start of a program, and
samples a second are those of the longer one. `--data`, of bottlenecks, is shapes or a folder of images; priors have the images
of their tokenizer. The bottlenecks have 576 bits an image, 64 places of 9 bits, at 64 pixels and with loss=vqvae, as in
benchmarks/bottlenecks.py. A seed sets weights, batches and augmentation; the images are the same. rFID and gFID are those in
the features of the proxy, a classifier of the same images, so they can be compared within one table only.

A row is appended to `--rows` as soon as it is measured, and a row that is there is not run again: the same command continues after
an interruption. `--write` puts the table into a Markdown file, between `<!-- table: ... -->` and `<!-- end -->`. `--evaluate` has
words for stage=evaluate; other arguments are passed to every training command. JSON lines come last.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from scipy.stats import t as student_t

from benchmarks.adversarial import train_run
from benchmarks.bottlenecks import GRID, choose_words, list_bottlenecks
from benchmarks.priors import PRIORS, draw_images
from codegrid.engine.environment import find_device, processor_name
from codegrid.engine.folder import CONFIG
from codegrid.engine.packages import package_version
from prior.decoding.sampling import Sampler
from prior.load import load_prior

BITS = 576  # of an image, as in benchmarks/bottlenecks.py
BATCH = {"bottlenecks": 32, "priors": 64}  # images of an update
SPEED_SAMPLES = 200  # drawn to measure samples a second
TIMED_STEPS = (20, 80)  # updates of the two runs whose difference is the time of a step
JUDGED = (
    "inception=false", "lpips=null", "references=false", "rates=false", "validity=0", "neighbours=false", "perturb=0", "probe=0",
    "samples=1000",
)  # fmt: skip

# Column -> heading and decimals. The figures of training and of stage=evaluate, by their names there.
COLUMNS: dict[str, dict[str, tuple[str, int]]] = {
    "bottlenecks": {
        "psnr": ("PSNR dB", 2),
        "ssim": ("SSIM", 3),
        "rfid_proxy": ("rFID proxy", 3),
        "rfid_ratio_proxy": ("ratio", 2),
        "usage": ("usage", 3),
        "perplexity": ("perplexity", 0),
        "ms_per_step": ("ms a step", 0),
        "seconds": ("seconds", 0),
    },
    "priors": {
        "nats_per_token": ("nats a code", 3),
        "gfid_proxy": ("gFID proxy", 3),
        "gfid_ratio_proxy": ("ratio", 2),
        "samples_per_second": ("samples/s", 1),
        "ms_per_step": ("ms a step", 0),
        "seconds": ("seconds", 0),
    },
}
TIMED = ("samples_per_second", "ms_per_step")  # by --speed
OWN_KEY = (
    "table",
    "arm",
    "seed",
    "images",
    "data",
    "tokenizer",
    "words",
    "evaluate",
    "timed",
)  # what a row is a row of


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines. A last line that was cut off by a kill is removed from the file."""
    if not file.is_file():
        return []
    text = file.read_text()
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        file.write_text(complete)
    return [json.loads(line) for line in complete.splitlines()]


def identify_row(row: Mapping[str, Any]) -> list[Any]:
    """What a row or a key is of."""
    return [row[name] for name in OWN_KEY]


def add_missing(
    file: Path,
    keys: Iterable[Mapping[str, Any]],
    measure: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """The rows of these keys: those in the file, and those that `measure` adds to it."""
    rows = read_rows(file)
    wanted = []
    for key in keys:
        row = next((row for row in rows if identify_row(row) == identify_row(key)), None)
        if row is None:
            row = {**key, **measure(key)}
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            rows.append(row)
            print(f"{row['arm']}, seed {row['seed']}: {row['figures']}", flush=True)
        wanted.append(row)
    return wanted


def choose_data(data: str) -> list[str]:
    """The words for the built-in shapes, or for a folder of images."""
    return ["data=shapes"] if data == "shapes" else ["data=folder", f"data.root={data}"]


def name_images(ckpt: Path) -> str:
    """What images a tokenizer's run learned: its folder of images, or the name of its data, as shapes."""
    data = OmegaConf.load(ckpt / CONFIG).data
    return str(data.get("root") or data["_target_"].rpartition(".")[2].lower())


def list_keys(options: argparse.Namespace, words: Sequence[str]) -> list[dict[str, Any]]:
    """What the rows of a table are of, all arms of a seed before the next seed."""
    tokenizer, data = None, options.data
    if options.table == "priors":
        tokenizer = json.loads((options.ckpt / "metrics.json").read_text())["id"]
        data = name_images(options.ckpt)
    common = {
        "table": options.table,
        "images": TIMED_STEPS[1] * BATCH[options.table] if options.speed else options.images,
        "data": Path(data).name,
        "tokenizer": tokenizer,
        "words": list(words),
        "evaluate": [] if options.speed else list(options.evaluate),
        "timed": options.speed,
    }
    seeds = [0] if options.speed else options.seeds
    return [{**common, "arm": arm, "seed": seed} for seed in seeds for arm in options.only]


def count_steps(key: Mapping[str, Any]) -> int:
    """The updates in which a run sees its images."""
    return math.ceil(key["images"] / BATCH[key["table"]])


def train_words(key: Mapping[str, Any], options: argparse.Namespace, steps: int) -> list[str]:
    """The command of train.py that trains the model of a row."""
    table = key["table"]
    length = [
        f"trainer.max_steps={steps}", "trainer.max_minutes=null",
        "trainer.val_every=1000000", f"seed={key['seed']}", "logger=csv", f"cache_dir={options.cache_dir}",
    ]  # fmt: skip
    if table == "priors":
        arm = [
            "stage=prior",
            f"ckpt={options.ckpt}",
            f"prior={key['arm']}",
            f"batch_size={BATCH[table]}",
        ]
        return ["train.py", *arm, *length, *key["words"]]
    own, _ = choose_words(key["arm"], BITS)
    arm = [
        "stage=vqgan",
        "loss=vqvae",
        f"model.grid={GRID}",
        f"data.batch_size={BATCH[table]}",
        "data.seed=0",
    ]
    return ["train.py", *arm, *choose_data(options.data), *own, *length, *key["words"]]


def measure_row(key: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train and judge one model; the figures of its row, its command and the machine."""
    command = train_words(key, options, count_steps(key))
    with tempfile.TemporaryDirectory() as folder:
        run = train_run(command, Path(folder) / "run")
        judged = train_run(
            ["train.py", "stage=evaluate", f"ckpt={run}", f"cache_dir={options.cache_dir}", *JUDGED, *options.evaluate],
            Path(folder) / "judged",
        )  # fmt: skip
        training, scores = (
            json.loads((each / "metrics.json").read_text()) for each in (run, judged)
        )
    figures = {name: scores.get(name) for name in COLUMNS[key["table"]] if name not in TIMED}
    figures["seconds"] = training["seconds"]
    # Places differ from machine to machine, and cost and scores don't depend on them.
    shown = [word for word in command[1:] if not word.startswith("cache_dir=")]
    return {
        "command": "python train.py " + " ".join(shown),
        "steps": training["steps"],
        "exact": scores.get("exact"),
        "figures": {name: round_figure(value) for name, value in figures.items()},
        "machine": describe_machine(),
    }


def time_row(key: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Train one model for a few steps, twice; the time of a step, and of a prior the samples a second."""
    seconds, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for steps in TIMED_STEPS:
            run = train_run(train_words(key, options, steps), Path(folder) / str(steps))
            training = json.loads((run / "metrics.json").read_text())
            seconds.append(training["seconds"])
        if key["table"] == "priors":
            figures["samples_per_second"] = measure_speed(run)
    if training["steps"]:  # priors that count have no steps
        figures["ms_per_step"] = (
            1000 * (seconds[1] - seconds[0]) / (TIMED_STEPS[1] - TIMED_STEPS[0])
        )
    return {
        "figures": {name: round_figure(value) for name, value in figures.items()},
        "machine": describe_machine(),
    }


def describe_machine() -> str:
    return f"{os.cpu_count()} cores of {processor_name()}, torch {package_version('torch')}"


def round_figure(value: float | None) -> float | None:
    """Five significant digits; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def measure_speed(run: Path) -> float:
    """How many grids of codes a prior draws in a second."""
    trained = load_prior(run).to(find_device("auto"))
    sampler = Sampler.unmodified()
    draw_images(trained, sampler, 2, 2, seed=1)  # leaves the cost of the first call out
    return draw_images(trained, sampler, SPEED_SAMPLES, SPEED_SAMPLES // 2)[1]


def find_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95% interval by Student's t; None of a single value."""
    mean = statistics.fmean(values)
    n = len(values)
    if n < 2:
        return mean, None
    return mean, float(student_t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def format_cell(values: Sequence[float | None], decimals: int) -> str:
    """A mean over seeds with its interval, or a dash if a seed has no such figure."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return "-"
    mean, half = find_interval(numbers)
    text = f"{mean:,.{decimals}f}"
    return text if half is None else f"{text} ± {half:.{decimals}f}"


def find_timed(
    rows: Sequence[Mapping[str, Any]], key: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """The figures of each arm by --speed, of the table that a key is of."""
    shared = ("table", "data", "tokenizer", "words")
    return {
        row["arm"]: row["figures"]
        for row in rows
        if row["timed"] and all(row[name] == key[name] for name in shared)
    }


def format_table(rows: Sequence[Mapping[str, Any]], timed: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of rows that differ in arm and seed only, with what they have in common below it."""
    table = rows[0]["table"]
    columns = COLUMNS[table]
    heads = [
        "`quantizer=`" if table == "bottlenecks" else "`prior=`",
        *(head for head, _ in columns.values()),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        alike = [row for row in rows if row["arm"] == arm]
        cells = [
            format_cell(
                [timed.get(arm, {}).get(name)]
                if name in TIMED
                else [row["figures"][name] for row in alike],
                decimals,
            )
            for name, (_, decimals) in columns.items()
        ]
        if table == "priors" and alike[0]["exact"] is False:
            cells[0] = f"at most {cells[0]}"
        lines.append("| " + " | ".join([arm, *cells]) + " |")
    seeds = [str(seed) for seed in sorted({row["seed"] for row in rows})]
    of_seeds = (
        f"seeds {', '.join(seeds)}; ± is the 95% interval of the mean over seeds by Student's t"
    )
    if len(seeds) == 1:
        of_seeds = f"seed {seeds[0]} alone, so without intervals"
    steps = sorted({row["steps"] for row in rows})
    lines += [
        "",
        f"{rows[0]['images']:,} images ({', '.join(map(str, steps))} updates), {of_seeds}. "
        f"Machine: {', '.join(sorted({row['machine'] for row in rows}))}; speeds by --speed. Commands, by the first seed:",
        "",
        *format_commands([row["command"] for row in rows if row["seed"] == rows[0]["seed"]]),
    ]
    return "\n".join(lines)


def format_commands(commands: Sequence[str]) -> list[str]:
    """What commands have in common, and below it the words of each alone, as lines of Markdown."""
    words = [command.split() for command in commands]
    common = [word for word in words[0] if all(word in others for others in words)]
    own = [" ".join(word for word in each if word not in common) for each in words]
    if not any(own):
        return [f"    {commands[0]}"]
    return [f"    {' '.join(common)} ...", *(f"        {line}" for line in own)]


def insert_table(text: str, name: str, table: str) -> str:
    """A page with the table between its marks; a page without such marks gets them at its end."""
    head, end = f"<!-- table: {name} -->", "<!-- end -->"
    before, mark, after = text.partition(head)
    if not mark:
        return f"{text.rstrip()}\n\n{head}\n\n{table}\n\n{end}\n"
    return f"{before}{head}\n\n{table}\n\n{end}{after.partition(end)[2]}"


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=["bottlenecks", "priors"])
    parser.add_argument("--images", type=int, default=32000, help="that each run is trained on")
    parser.add_argument("--data", default="shapes", help="shapes, or a folder of images")
    parser.add_argument("--ckpt", type=Path, help="the run folder of the priors' tokenizer")
    parser.add_argument("--only", nargs="*", help="some of the bottlenecks or priors")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=Path, default=Path("tables.jsonl"))
    parser.add_argument("--speed", action="store_true", help="time each row instead")
    parser.add_argument("--write", type=Path, help="a Markdown file that gets the table")
    parser.add_argument("--evaluate", nargs="*", default=[], help="words for stage=evaluate")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"))
    options, extra = parser.parse_known_args()
    if options.table == "priors" and not options.ckpt:
        sys.exit("the table of priors needs a tokenizer: --ckpt <run folder of stage=vqgan>")
    if options.only is None:
        options.only = list_bottlenecks() if options.table == "bottlenecks" else list(PRIORS)
    return options, extra


def main() -> None:
    options, extra = parse_options()
    keys = list_keys(options, extra)
    measure = time_row if options.speed else measure_row
    rows = add_missing(options.rows, keys, lambda key: measure(key, options))
    if not options.speed:
        show_table(rows, options)
    for row in rows:
        print(json.dumps({"bench": "tables", **row}))


def show_table(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Print the table, and put it into the Markdown file of --write."""
    table = format_table(rows, find_timed(read_rows(options.rows), rows[0]))
    print(f"\n{table}\n")
    if options.write:
        text = options.write.read_text() if options.write.is_file() else "# Tables\n"
        name = f"{rows[0]['table']}, {rows[0]['data']}"
        options.write.write_text(insert_table(text, name, table))


if __name__ == "__main__":
    main()
