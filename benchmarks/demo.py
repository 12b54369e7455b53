"""Both stages on the built-in shapes: three commands, their pictures, and one line of JSON with the figures.

make demo
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine.folder import next_free_folder


def main() -> None:
    began = time.monotonic()
    folder = next_free_folder(Path("runs") / "demo")
    tokenizer, prior, samples = (str(folder / name) for name in ("tokenizer", "prior", "samples"))
    first = run("stage=vqgan", "experiment=demo_tokenizer", f"run_dir={tokenizer}")
    second = run("stage=prior", "experiment=demo_prior", f"ckpt={tokenizer}", f"run_dir={prior}")
    third = run("stage=sample", f"ckpt={prior}", "sampler.top_p=0.9", f"run_dir={samples}")
    pictures = {
        "reconstructions": first["pictures"][0],
        "samples": third["pictures"][0],
    }
    print(
        "\nreconstructions (images above, what the codes make of them below):",
        pictures["reconstructions"],
    )
    print("samples (images that never were):", pictures["samples"])
    summary = {
        "seconds": round(time.monotonic() - began, 1),
        "images_per_second": first["images_per_second"],
        "psnr": first["psnr"],
        "perplexity": first["perplexity"],
        "codes_used": int(first["codes_used"]),
        "K": first["K"],
        "grid": first["grid"],
        "prior_nats_per_token": second["nats_per_token"],
        "bigram_nats_per_token": second["bigram_nats_per_token"],
        "pictures": pictures,
    }
    print(json.dumps(summary))


def run(*overrides: str) -> dict[str, Any]:
    """`python train.py ...`, shown and run; the figures that it leaves in its run folder."""
    print("\n$ python train.py", *overrides, flush=True)
    [folder] = [word.removeprefix("run_dir=") for word in overrides if word.startswith("run_dir=")]
    done = subprocess.run([sys.executable, "train.py", *overrides], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    figures: dict[str, Any] = json.loads((Path(folder) / "metrics.json").read_text())
    return figures


if __name__ == "__main__":
    main()
