"""stage=vqgan: train a tokenizer."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.callbacks.progress import Progress
from codegrid.engine.collectives import run_on_main
from codegrid.engine.precision import choose_memory_format
from codegrid.engine.run import Run
from codegrid.engine.settings import TrainerSettings
from vqgan.callbacks.codes import CodebookPictures
from vqgan.callbacks.reconstructions import Reconstructions
from vqgan.learning import choose_learners
from vqgan.load import build_tokenizer, make_tags
from vqgan.losses.code_changes import CodeChange
from vqgan.losses.groups import group_code_losses, group_losses
from vqgan.module import VQGAN, Training, prepare_layers
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


def build_module(config: DictConfig, training: TrainerSettings) -> VQGAN:
    """The whole of stage 1, untrained, that a config describes."""
    # The losses come before the tokenizer: the order in which random numbers are drawn.
    losses = instantiate(config.loss)
    reconstruction, adversary = group_losses(**losses)
    learners = choose_learners(config.learn, bool(config.init), adversary is not None, config.lora)
    optimizer, schedule = instantiate(config.optimizer), instantiate(config.schedule)
    rules = training.budget, training.clip, training.accumulate, learners
    tokenizer = build_tokenizer(config.model, config.quantizer)
    of_training = Training(optimizer, schedule, *rules)
    on_codes = group_code_losses(tokenizer, learners, make_redraw(config), **losses)
    module = VQGAN(tokenizer, reconstruction, of_training, adversary, on_codes)
    return module.to(memory_format=choose_memory_format(training.device))


def make_redraw(config: DictConfig) -> CodeChange | None:
    """What lets the prior that `codes` names draw codes that the decoder sees; None without one."""
    ckpt = config.get("codes")
    return instantiate(config.redraw, ckpt=ckpt) if ckpt else None
