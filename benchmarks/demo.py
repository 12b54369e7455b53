"""Trains both stages on the built-in shapes and draws samples: three commands, pictures, and one line of JSON with the figures.

make demo
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from codegrid.engine.folder import next_free_folder


def main() -> None:
    began = time.monotonic()
    folder = next_free_folder(Path("runs") / "demo")
    tokenizer, prior, samples = (str(folder / name) for name in ("tokenizer", "prior", "samples"))
    tokenizer_figures = run("stage=vqgan", "experiment=demo_tokenizer", f"run_dir={tokenizer}")
    prior_figures = run(
        "stage=prior", "experiment=demo_prior", f"ckpt={tokenizer}", f"run_dir={prior}"
    )
    sample_figures = run("stage=sample", f"ckpt={prior}", "sampler.top_k=16", f"run_dir={samples}")
    pictures = {
        "reconstructions": tokenizer_figures["pictures"][0],
        "samples": sample_figures["pictures"][0],
    }
    print(
        "\nreconstructions (below the images):",
        pictures["reconstructions"],
    )
    print("samples:", pictures["samples"])
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
    }
    print(json.dumps(summary))


def run(*overrides: str) -> dict[str, Any]:
    """Print and run `python train.py ...`; returns the figures of its metrics.json."""
    print("\n$ python train.py", *overrides, flush=True)
    [folder] = [word.removeprefix("run_dir=") for word in overrides if word.startswith("run_dir=")]
    process = subprocess.run([sys.executable, "train.py", *overrides], check=False)
    if process.returncode:
        sys.exit(process.returncode)
    figures: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
    return figures


if __name__ == "__main__":
    main()
