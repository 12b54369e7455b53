"""stage=vqgan: train a tokenizer."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.callbacks.progress import Progress
from codegrid.engine.collectives import run_on_main
from codegrid.engine.run import Run
from vqgan.callbacks.codes import CodebookPictures
from vqgan.callbacks.reconstructions import Reconstructions
from vqgan.load import make_tags
from vqgan.module import prepare_layers
from vqgan.stages.building import build_module
from vqgan.starting import choose_start


def train_tokenizer(config: DictConfig) -> dict[str, Any] | None:
    """Train a tokenizer; the final validation figures and where everything lies, on the main rank."""
    with Run.open(config) as run:
        run.seed()
        data: ImageDataModule = instantiate(run.config.data)
        start = choose_start(run, data)
        module = build_module(run.config, run.training)
        start.check_changes(module.code_changes)
        around = [c for c in instantiate(run.config.callbacks).values() if c is not None]
        data.check_recorded(run.resume)
        if not run.is_dry:
            data.prepare_data()
            start.fill(module.tokenizer, data)
        prepare_layers(module, run.training)
        if run.is_dry:
            return run.rehearse(data.title, module, data, around, len(data.source("train")))
        data.check_batch_fits(run.launch().world_size)
        tags = [*make_tags(config.stage, data.title, module.tokenizer), *start.tags]
        folder = run.start(data.title, data.describe(), tags, module)
        run_on_main(lambda: data.record_images(folder))
        line = Progress({"train/rec": "rec", "val/psnr": "PSNR", "val/perplexity": "perplexity"})
        pictures, codes = Reconstructions(), CodebookPictures()
        figures = run.fit(module, data, [*around, line, pictures, codes])
        shape = module.tokenizer.size_facts
        files = [str(file) for file in (pictures.file, *codes.files)]
        return run.finish({**figures, **shape, **start.origin, "pictures": files})
