"""stage=extract: encode a dataset into codes."""

import time
from typing import Any

from lightning.fabric import Fabric
from omegaconf import DictConfig

from codegrid.data.tokens import EXPORT_FORMATS, export_codes
from codegrid.engine.collectives import is_main
from codegrid.engine.distributed import check_call, cluster_plugins
from codegrid.engine.errors import InputError, check_int
from codegrid.engine.run import Run
from prior.extract import extract, name_numbers
from prior.previews import preview_codes
from vqgan.load import load_images, load_tokenizer

ENCODED_WITH = "the tokenizer to encode with; add ckpt=<run folder of stage=vqgan>"


def extract_codes(config: DictConfig) -> dict[str, Any] | None:
    """Encode both splits of a tokenizer's data into the code cache, and export them to files if `export` is set.

    All ranks share the work; the main one reports.
    """
    with Run.open(config, ckpt=ENCODED_WITH, resumes="resumes by itself from where it was") as run:
        if config.export not in (None, *EXPORT_FORMATS):
            raise InputError(f"export={config.export} must be one of {', '.join(EXPORT_FORMATS)}")
        check_int("batch_size", config.batch_size, 1, "image")
        tokenizer, described = load_tokenizer(config.ckpt)
        images = load_images(described["data"], config.data, config.ckpt)
        fabric = Fabric(
            accelerator=run.device.type, devices=config.devices, num_nodes=config.num_nodes,
            plugins=cluster_plugins(config.devices),
        )  # fmt: skip
        check_call(fabric.world_size)
        if run.is_dry:
            return preview_codes(run, tokenizer, images)
        fabric.launch()
        start, views = time.monotonic(), (config.flip, config.crops)
        codes = {
            "train": extract(tokenizer, images, "train", *views, config.batch_size, fabric=fabric),
            "val": extract(tokenizer, images, "val", batch_size=config.batch_size, fabric=fabric),
        }
        seconds = round(time.monotonic() - start, 1)
        folder = run.start(images.title)
        if not is_main():
            return None
        facts: dict[str, Any] = {"K": tokenizer.K, "grid": list(tokenizer.grid)}
        facts["tokenizer"] = tokenizer.fingerprint()
        files = []
        for split, samples in codes.items() if config.export else ():
            n = images.size(split)
            about = {**facts, "views": len(samples) // n, "n": n, **name_numbers(images)}
            file = export_codes(samples, about, folder / f"codes-{split}.{config.export}")
            files.append(str(file))
        sizes = {split: len(samples) for split, samples in codes.items()}
        result = {"run": str(folder), **sizes, **facts, "seconds": seconds, "files": files}
        return run.finish(result)
