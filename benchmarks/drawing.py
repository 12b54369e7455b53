"""Compares drawing in windows of positions (sampler.parallel) with drawing code by code, and both with another checkout's build.

git worktree add ../older <commit>
python -m benchmarks.drawing --other ../older                                              code by code, weights that nobody trained
python -m benchmarks.drawing --other ../older --ckpt runs/prior/a runs/prior/b --batches 1 4 16    windows too

Without --ckpt: prior=gpt with K=512, width 256, 8 blocks and 8 heads, of 64 and of 256 codes. With --ckpt: the trained priors
(gpt or rar) of these runs, since the passes that windows take depend on what a prior has learned; --sampler changes how they
draw. All builds run in this process and take turns of at least a second. Prints a JSON line for each row when it is measured,
and in the end a table: images per second (medians), passes per image, and the ratio to the other checkout's build, or to code by
code here.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.checkouts import imports_from
from benchmarks.configs import compose_config
from benchmarks.sampling import DEPTH, HEADS, WIDTH, autocast, make_ours, print_row
from prior.decoding.generate import generate
from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import Sampler, make_sampler
from prior.heads.softmax import Softmax
from prior.load import load_prior
from prior.models.gpt import GPT

TURN = 1.0  # seconds, at least
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Subject:
    """A prior to draw from, and its settings in conf/, from which another checkout builds the same."""

    name: str
    model: GPT
    settings: dict[str, Any]


def make_random(T: int) -> Subject:
    """The prior of the sampling benchmark, with random logits."""
    words = [f"prior.width={WIDTH}", f"prior.depth={DEPTH}", f"prior.heads={HEADS}"]
    settings: Any = OmegaConf.to_container(
        compose_config("stage=prior", *words).prior, resolve=True
    )
    return Subject("random", make_ours(T, "cpu").eval(), settings)


def load_subject(ckpt: str) -> Subject:
    """The trained prior of a run."""
    trained = load_prior(ckpt)
    if not isinstance(trained.model, GPT):
        sys.exit(
            f"--ckpt {ckpt} holds a {type(trained.model).__name__}; windows are for prior=gpt and rar"
        )
    return Subject(trained.name, trained.model.eval(), dict(trained.config["prior"]))


def rebuild(subject: Subject, checkout: Path) -> torch.nn.Module:
    """The same prior as an object of another checkout's classes, among the imports of which this is called.

    A checkout from before prior/head has softmax only, as a part of its priors.
    """
    model, settings = subject.model, {**subject.settings}
    state = model.state_dict()
    if find_spec("prior.heads") is None:
        if not isinstance(model.head, Softmax):
            sys.exit(
                f"--other {checkout} has softmax heads only, and {subject.name} has {type(model.head).__name__}"
            )
        del settings["head"]
        state.pop("head.groups", None)  # of the loss
    codes = {"codebook": model.read.vectors[None], "grid": model.grid, "classes": model.classes}
    other: torch.nn.Module = instantiate(settings, **codes)
    other.load_state_dict(state)
    return other.eval()


def make_draws(
    subject: Subject,
    n: int,
    sampler: Sampler,
    windows: list[int | str],
    other: Callable[[int], Any] | None,
) -> dict[str, Callable[[], Any]]:
    """Name -> function that draws n images at once: code by code, in these windows, and by the other checkout's build."""
    labels = None if not subject.model.classes else torch.arange(n) % subject.model.classes

    def draw_by(parallel: int | str) -> Callable[[], Any]:
        chosen = replace(sampler, parallel=parallel)
        return lambda: next(generate(subject.model, chosen, n, 0, n, labels))

    draws = {"code by code": draw_by(1)}
    draws |= {f"parallel={window}": draw_by(window) for window in windows}
    if other is not None:
        draws["other"] = lambda: other(n)
    return draws


def make_other(
    subject: Subject, sampler: Sampler, checkout: Path | None
) -> Callable[[int], Tensor] | None:
    """A function that draws n images by the other checkout's build, if there is one."""
    if checkout is None:
        return None
    with imports_from(checkout):
        model = rebuild(subject, checkout)
        theirs = import_module("prior.decoding.sampling").Sampler
        names = vars(theirs.unmodified())
        draw_theirs = import_module("prior.decoding.generate").generate
    chosen = theirs(**{name: getattr(sampler, name) for name in names})

    def draw(n: int) -> Tensor:
        labels = None if not subject.model.classes else torch.arange(n) % subject.model.classes
        codes: Tensor = next(draw_theirs(model, chosen, n, 0, n, labels))
        return codes

    return draw


def count_passes(subject: Subject, sampler: Sampler, n: int, parallel: int | str) -> float:
    """Forward passes of an image, the mean of 32 or more, n at a time."""
    cache, images = StepCache(compiled=False), max(32, n)
    labels = None if not subject.model.classes else torch.arange(images) % subject.model.classes
    for _ in generate(
        subject.model, replace(sampler, parallel=parallel), images, 1, n, labels, cache=cache
    ):
        pass
    return cache.passes / images


def time_in_turns(
    draws: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Name -> median seconds of a call. All take a turn of TURN seconds or more in each round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(rounds + 1):
        for name, draw in draws.items():
            calls, began, until = 0, clock(), time.perf_counter() + TURN
            while not calls or time.perf_counter() < until:
                draw()
                calls += 1
            times[name].append((clock() - began) / calls)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def measure(
    subject: Subject, n: int, sampler: Sampler, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one prior and one batch."""
    windows = options.windows if options.ckpt else []
    rows = []
    with torch.no_grad(), autocast("cpu"):
        other = make_other(subject, sampler, options.other)
        draws = make_draws(subject, n, sampler, windows, other)
        seconds = time_in_turns(draws, options.rounds, CLOCKS[options.clock])
        base = seconds.get("other", seconds["code by code"])
        for name in draws:
            by = name.removeprefix("parallel=")
            parallel = int(by) if by.isdigit() else "auto" if by == "auto" else 1
            row = {
                "bench": "drawing",
                "prior": subject.name,
                "T": subject.model.T,
                "batch": n,
                "how": name,
            }
            row |= {"images_per_s": n / seconds[name], "ratio": base / seconds[name]}
            row |= {"passes": count_passes(subject, sampler, n, parallel)}
            print_row(row)
            rows.append(row)
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    lines = ["| prior | T | batch | how | images/s | passes an image | ratio |", "|---" * 7 + "|"]
    for row in rows:
        lines.append(
            f"| {row['prior']} | {row['T']} | {row['batch']} | {row['how']} | {row['images_per_s']:.3g} "
            f"| {row['passes']:.1f} | {row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, help="a checkout of another commit")
    parser.add_argument("--ckpt", nargs="+", default=[], help="runs of trained priors")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256], help="without --ckpt")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--windows", nargs="+", default=["4", "8", "16", "auto"])
    parser.add_argument("--sampler", nargs="*", default=[], help="such as top_p=0.9")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    options = parser.parse_args()
    options.windows = [w if w == "auto" else int(w) for w in options.windows]
    return options


def main() -> None:
    options = parse_options()
    torch.manual_seed(0)
    pairs = (word.split("=", 1) for word in options.sampler)
    sampler = make_sampler(**{name: float(x) if "." in x else int(x) for name, x in pairs})
    if options.ckpt:
        subjects = [load_subject(ckpt) for ckpt in options.ckpt]
    else:
        subjects = [make_random(T) for T in options.tokens]
    rows = [
        row for s in subjects for n in options.batches for row in measure(s, n, sampler, options)
    ]
    print(f"\n{format_rows(rows)}")
    for row in rows:
        print_row(row)


if __name__ == "__main__":
    main()
