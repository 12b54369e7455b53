"""stage=sample: draw pictures from a prior, or from a KL-VAE by itself."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from codegrid.engine.errors import check_int
from codegrid.engine.run import Run
from prior.decoding.sampling import Sampler
from prior.draw import Wanted, draw_all, open_saver, open_source, save_pictures
from prior.neighbours import check_same_grid
from prior.previews import preview_samples
from prior.samples import check_kinds
from prior.saving import check_finished, check_journal
from vqgan.load import load_images

DRAWN_FROM = "a prior to draw from; add ckpt=<run folder of stage=prior, or of a KL-VAE>"


def draw_samples(config: DictConfig) -> dict[str, Any] | None:
    """Draw codes from a prior, or latents from N(0, 1) for a KL-VAE, decode them, and save them as `save` says.

    A run that broke off goes on with resume=<its folder>, or with the same command and the same run_dir.
    """
    with Run.open(config, ckpt=DRAWN_FROM, repeats=True) as run:
        if run.resume and (finished := run.finished) is not None:
            return check_finished(run.resume, finished)
        config = run.config
        for name in ("n", "columns", "rows", "batch_size", "shard_size"):
            check_int(name, config[name], 1)
        save = check_kinds(config.save)
        sampler: Sampler = instantiate(config.sampler)
        n, seed, batch_size = config.n, config.seed, config.batch_size
        plain: Any = OmegaConf.to_container(config, resolve=True)
        drawn_by = sampler, n, seed, batch_size, Wanted.read(plain, run.is_dry), run.device
        source = open_source(config.ckpt, *drawn_by, config.decoder)
        data = None
        if "neighbours" in save:
            check_same_grid(source.grid, source.tokenizer.grid)
            data = load_images(source.data, config.data, config.ckpt)
        if run.is_dry:
            return preview_samples(run, source)
        if data is not None:
            data.prepare_data()
        if run.resume:
            check_journal(run.resume, source.about)
        folder = run.start(source.name)  # before what may take hours
        saver = open_saver(folder, source, save, n, config.rows * config.columns, config.shard_size)
        counts = draw_all(source, saver, batch_size)
        files = saver.finish()
        files |= save_pictures(saver, source, save, data, config.columns, config.rows)
        result = run.finish({"run": str(folder), "n": n, "seed": seed, **counts, **files})
        saver.remove_parts()
        return result
