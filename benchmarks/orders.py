"""Compares the orders in which prior=maskgit and diffusion fill in masked codes: quality of samples against passes of the network.

python train.py stage=prior prior=maskgit experiment=demo_prior ckpt=runs/vqgan/shapes run_dir=runs/prior/masked
python -m benchmarks.orders --ckpt runs/prior/masked                     the three orders, 4 to 64 passes an image
python -m benchmarks.orders --ckpt runs/prior/masked --orders halton --correctors 0 1 2 --remasks 0 0.1 0.3

Every row draws `--samples` images of one seed with one order, one number of corrector steps and one share that is masked again.
All rows of a column take as many passes of the network: with one corrector step, half as many steps. Words such as
sampler.temperature=0.9 hold for all rows. Prints a line of JSON for each row as soon as it is measured, then a table of the
ratios, and in the end a line of JSON with the best order for each number of passes, and on average over them:

frechet_proxy      Fréchet distance to the validation images in the features of a small classifier of these images
ratio              frechet_proxy divided by that of as many training images: 1 is as good as real images
images_per_second  of drawing codes, without decoding them
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from hydra.utils import instantiate
from tqdm import tqdm

from benchmarks.adversarial import Judge
from benchmarks.configs import compose_config
from benchmarks.priors import draw_images, measure_distance
from codegrid.engine.environment import find_device
from codegrid.evaluation.proxy import train_proxy
from prior.decoding.generate import check_order_sampler
from prior.decoding.sampling import ORDERS, Sampler
from prior.load import load_prior
from vqgan.load import load_images

Row = Mapping[str, Any]


def list_variants(
    orders: Iterable[str], correctors: Iterable[int], remasks: Iterable[float]
) -> list[dict[str, Any]]:
    """The settings of a line of the table: each order, as it is, with corrector steps, and with codes that are masked again."""
    lines = [(0, 0.0), *((c, 0.0) for c in correctors if c), *((0, r) for r in remasks if r)]
    return [
        {"order": order, "corrector": corrector, "remask": remask}
        for order, (corrector, remask) in product(orders, lines)
    ]


def name_variant(row: Row) -> str:
    words = [f"{name}={row[name]:g}" for name in ("corrector", "remask") if row[name]]
    return ", ".join([str(row["order"]), *words])


def format_ratios(rows: Iterable[Row]) -> str:
    """A Markdown table: a line for each variant, a column for each number of passes."""
    ratios: dict[str, dict[int, float]] = {}
    for row in rows:
        ratios.setdefault(name_variant(row), {})[row["passes"]] = row["ratio"]
    passes = sorted({n for line in ratios.values() for n in line})
    lines = ["| order | " + " | ".join(map(str, passes)) + " |", "|---" * (1 + len(passes)) + "|"]
    for name, line in ratios.items():
        cells = [f"{line[n]:.2f}" if n in line else "-" for n in passes]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def find_best(rows: Iterable[Row]) -> dict[str, str]:
    """The variant with the lowest ratio for each number of passes, and by the geometric mean of those measured at all of them."""
    table: dict[int, dict[str, float]] = {}
    for row in rows:
        table.setdefault(row["passes"], {})[name_variant(row)] = row["ratio"]
    best = {str(passes): min(line, key=lambda name: line[name]) for passes, line in table.items()}
    everywhere = set.intersection(*map(set, table.values()))
    means = {name: sum(math.log(line[name]) for line in table.values()) for name in everywhere}
    return best | ({"mean": min(means, key=lambda name: means[name])} if means else {})


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the settings of the sampler."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="a run of prior=maskgit or diffusion")
    parser.add_argument("--passes", type=int, nargs="+", default=[4, 8, 12, 16, 32, 64])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--correctors", type=int, nargs="+", default=[0])
    parser.add_argument("--remasks", type=float, nargs="+", default=[0.0])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100, help="samples per batch")
    parser.add_argument(
        "--classifier", type=int, default=300, help="training steps of the classifier"
    )
    return parser.parse_known_args()


def main() -> None:
    options, words = read_options()
    device = find_device("auto")
    sampler: Sampler = instantiate(compose_config("stage=sample", *words).sampler)
    trained = load_prior(options.ckpt).to(device)
    check_order_sampler(trained.model, replace(sampler, order=ORDERS[0]))
    data = load_images(trained.data, {}, options.ckpt)
    judge = Judge(data, train_proxy(data, options.classifier, device).features, None, device)
    floor = measure_distance(judge, data.take_evenly("train", options.samples)[0])
    name = type(trained.model).__name__.lower()
    settings = {"bench": "orders", "prior": name, "samples": options.samples}
    print(json.dumps({**settings, "floor": round(floor, 5)}), flush=True)
    rows: list[dict[str, Any]] = []
    variants = list_variants(options.orders, options.correctors, options.remasks)
    cells = [
        (passes, variant)
        for passes, variant in product(options.passes, variants)
        if passes % (1 + variant["corrector"]) == 0
    ]
    for passes, variant in tqdm(cells, "orders", leave=False, disable=None):
        steps = passes // (1 + variant["corrector"])
        chosen = replace(sampler, steps=steps, **variant)
        images, speed = draw_images(trained, chosen, options.samples, options.batch, options.seed)
        distance = measure_distance(judge, images)
        figures = {
            "frechet_proxy": round(distance, 5),
            "ratio": round(distance / floor, 4),
            "images_per_second": round(speed, 2),
        }
        rows.append({"passes": passes, **variant, "steps": steps, **figures})
        print(json.dumps({**settings, **rows[-1]}), flush=True)
    print(f"\n{format_ratios(rows)}\n")
    print(json.dumps({**settings, "best": find_best(rows)}), flush=True)


if __name__ == "__main__":
    main()
