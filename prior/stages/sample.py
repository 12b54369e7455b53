"""stage=sample: draw pictures from a prior, or from a KL-VAE by itself."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from data.pictures import save_picture
from engine.errors import InputError, check_int
from engine.run import Run
from prior.decoding.sampling import Sampler
from prior.draw import decode_all, open_source, save_codes
from prior.neighbours import find_neighbours
from prior.samples import KINDS, save_samples
from vqgan.load import load_images

DRAWN_FROM = "a prior to draw from; add ckpt=<run folder of stage=prior, or of a KL-VAE>"


def draw_samples(config: DictConfig) -> dict[str, Any] | None:
    """Draw codes from a prior, or latents from N(0, 1) for a KL-VAE, decode them, and save them as `save` says."""
    with Run.open(config, ckpt=DRAWN_FROM, resumes="has nothing to resume") as run:
        for name in ("n", "columns", "rows", "batch_size"):
            check_int(name, config[name], 1)
        save = [config.save] if isinstance(config.save, str) else list(config.save)
        for kind in save:
            if kind not in KINDS:
                raise InputError(
                    f"save={kind} must be one of {', '.join(KINDS)}, or several, as save=[grid,npz]"
                )
        sampler: Sampler = instantiate(config.sampler)
        n, seed, batch_size = config.n, config.seed, config.batch_size
        source = open_source(config.ckpt, sampler, n, seed, batch_size, config.label, run.device)
        tokenizer = source.tokenizer
        data = None
        if "neighbours" in save:
            if sampler.size(tokenizer.grid) != tokenizer.grid:
                raise InputError(
                    "save=neighbours compares samples with training images, as large; "
                    f"leave sampler.grid={sampler.grid} out"
                )
            data = load_images(source.data, config.data, config.ckpt)
            data.prepare_data()
        folder = run.start(source.name)  # before what may take hours
        images, codes = decode_all(source, n, batch_size)
        files = save_samples(images, folder, save, config.columns, config.rows, source.head)
        if data is not None:
            figures, sheet = find_neighbours(images, data, tokenizer, source.flip)
            picture = str(save_picture(sheet, folder / "neighbours.png"))
            files["pictures"] = [*files.get("pictures", []), picture]
            files |= figures
        if codes is not None:
            save_codes(codes, source.labels, folder)
        return run.finish({"run": str(folder), "n": n, "seed": seed, **files})
