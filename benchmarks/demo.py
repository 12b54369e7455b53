"""Trains both stages on the built-in shapes, draws samples and writes a page to explore the model: four commands, pictures, and one
line of JSON with the figures.

make demo
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from codegrid.engine.exit_codes import MISTAKE
from codegrid.engine.folder import next_free_folder


def main() -> None:
    began = time.monotonic()
    folder = next_free_folder(Path("runs") / "demo")
    tokenizer, prior, samples, page = (
        str(folder / name) for name in ("tokenizer", "prior", "samples", "explore")
    )
    tokenizer_figures = run("stage=vqgan", "experiment=demo_tokenizer", f"run_dir={tokenizer}")
    prior_figures = run(
        "stage=prior", "experiment=demo_prior", f"ckpt={tokenizer}", f"run_dir={prior}"
    )
    sample_figures = run("stage=sample", f"ckpt={prior}", "sampler.top_k=16", f"run_dir={samples}")
    page_figures = attempt("stage=explore", f"ckpt={prior}", f"run_dir={page}")
    pictures = {
        "reconstructions": tokenizer_figures["pictures"][0],
        "samples": sample_figures["pictures"][0],
    }
    print(
        "\nreconstructions (below the images):",
        pictures["reconstructions"],
    )
    print("samples:", pictures["samples"])
    if page_figures is None:
        print("no page to explore the model: the last command above says what it needs")
    else:
        print(f"the model in a browser, offline: open {page_figures['page']}")
    summary = {
        "seconds": round(time.monotonic() - began, 1),
        "images_per_second": tokenizer_figures["images_per_second"],
        "psnr": tokenizer_figures["psnr"],
        "perplexity": tokenizer_figures["perplexity"],
        "codes_used": int(tokenizer_figures["codes_used"]),
        "K": tokenizer_figures["K"],
        "grid": tokenizer_figures["grid"],
        "prior_nats_per_token": prior_figures["nats_per_token"],
        "bigram_nats_per_token": prior_figures["bigram_nats_per_token"],
        "pictures": pictures,
        "page": page_figures and page_figures["page"],
    }
    print(json.dumps(summary))


def run(*overrides: str) -> dict[str, Any]:
    """Print and run `python train.py ...`; returns the figures of its metrics.json."""
    if (figures := attempt(*overrides)) is None:
        sys.exit(MISTAKE)
    return figures


def attempt(*overrides: str) -> dict[str, Any] | None:
    """The same of a command that may lack something on this machine, which it says itself; None then."""
    print("\n$ python train.py", *overrides, flush=True)
    [folder] = [word.removeprefix("run_dir=") for word in overrides if word.startswith("run_dir=")]
    process = subprocess.run([sys.executable, "train.py", *overrides], check=False)
    if process.returncode == MISTAKE:
        return None
    if process.returncode:
        sys.exit(process.returncode)
    figures: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
    return figures


if __name__ == "__main__":
    main()
