"""stage=extract: encode a dataset into codes."""

import time
from typing import Any

from lightning.fabric import Fabric
from omegaconf import DictConfig

from data.tokens import FORMATS, export
from engine.distributed import is_main
from engine.environment import find_device
from engine.errors import InputError, check_int
from engine.run import open_folder, write_result
from prior.extract import extract
from vqgan.load import load_images, load_tokenizer


def extract_codes(config: DictConfig) -> dict[str, Any] | None:
    """Encode both splits of a tokenizer's data into the code cache, and write them to files where `export` says so.

    Every process of a run over several devices takes its share; the first one reports.
    """
    if not config.ckpt:
        raise InputError(
            "stage=extract needs the tokenizer to encode with; add ckpt=<run folder of stage=vqgan>"
        )
    if config.resume:
        raise InputError(
            f"stage=extract goes on by itself where it was; leave resume={config.resume} out"
        )
    if config.export not in (None, *FORMATS):
        raise InputError(f"export={config.export} must be one of {', '.join(FORMATS)}")
    check_int("batch_size", config.batch_size, 1, "image")
    fabric = Fabric(
        accelerator=find_device(config.accelerator).type,
        devices=config.devices,
        num_nodes=config.num_nodes,
    )
    fabric.launch()
    tokenizer, described = load_tokenizer(config.ckpt)
    images = load_images(described["data"], config.data, config.cache_dir)
    began = time.monotonic()
    codes = {
        "train": extract(
            tokenizer, images, "train", config.flip, config.crops, config.batch_size, fabric=fabric
        ),
        "val": extract(tokenizer, images, "val", batch_size=config.batch_size, fabric=fabric),
    }
    seconds = time.monotonic() - began
    folder = open_folder(config, images.title)
    if not is_main():
        return None
    meta = {"K": tokenizer.K, "grid": list(tokenizer.grid), "tokenizer": tokenizer.fingerprint()}
    files = []
    if config.export:
        for split, samples in codes.items():
            about = {**meta, "views": len(samples) // images.size(split), "n": images.size(split)}
            files.append(str(export(samples, about, folder / f"codes-{split}.{config.export}")))
    sizes = {split: len(samples) for split, samples in codes.items()}
    result = {"run": str(folder), **sizes, **meta, "seconds": round(seconds, 1), "files": files}
    return write_result(folder, result)
