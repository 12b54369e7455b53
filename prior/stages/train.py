"""stage=prior: train a prior on a tokenizer's codes."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from data.tokens import CodeDataModule
from engine.callbacks.checkpointing import BestCheckpoint
from engine.callbacks.progress import Progress
from engine.distributed import is_main
from engine.run import Run
from prior.callbacks import LossMapPictures, SamplePictures
from prior.extract import extract
from prior.load import copy_tokenizer, prior_header
from prior.module import Prior
from prior.training import (
    check_sizes,
    compile_blocks,
    count_classes,
    count_codes,
    prior_result,
    report_early_stop,
)  # fmt: skip
from vqgan.load import load_images, load_tokenizer, make_tags, require_codes

NEEDS = "the tokenizer whose codes it learns; add ckpt=<run folder of stage=vqgan>"


def train_prior(config: DictConfig) -> dict[str, Any] | None:
    """Encode the data once and train a prior on the codes; the final figures, on the main rank. All ranks share the encoding."""
    with Run.open(config, ckpt=NEEDS, shards=True) as run:
        config = run.config
        check_sizes(config.prior)
        run.seed()
        tokenizer, described = load_tokenizer(config.ckpt)
        require_codes(tokenizer, f"ckpt={config.ckpt} has no codes to learn")
        images = load_images(described["data"], config.data, config.cache_dir)
        fabric = run.launch()
        train = extract(tokenizer, images, "train", config.flip, config.crops, fabric=fabric)
        val = extract(tokenizer, images, "val", fabric=fabric)
        data = CodeDataModule(train, val, config.batch_size, config.seed)
        classes = count_classes(images, train) if config.conditional else 0
        model = instantiate(config.prior, **tokenizer.code_space, classes=classes)
        count_codes(model, train, val)
        module = Prior(
            model, instantiate(config.optimizer), run.training.budget, instantiate(config.schedule),
            config.label_drop, config.label_smoothing,
            clip=run.training.clip, accumulate=run.training.accumulate,
        )  # fmt: skip
        if run.training.compile:
            compile_blocks(module)
        around = [c for c in instantiate(config.callbacks).values() if c is not None]
        data.check_batch_fits(fabric.world_size)
        tags = [*make_tags(config.stage, images.title, tokenizer), type(model).__name__.lower()]
        folder = run.start(images.title, images.describe(), tags)
        if is_main():
            copy_tokenizer(tokenizer, described, folder)
        header = prior_header(tokenizer, classes)
        best = BestCheckpoint(run.header | header, "val/nats_per_token")
        validation = "validation" if model.exact else "validation at most"
        progress = Progress({"train/loss": "loss", "val/nats_per_token": validation})
        pictures = [SamplePictures(tokenizer), LossMapPictures()]
        # The best weights are kept before a callback takes their average out again.
        figures = run.fit(module, data, [best, *around, progress, *pictures], header)
        report_early_stop(around, module.step)
        if not is_main():
            return None
        return run.finish(prior_result(figures, best, model, tokenizer, described, train, val))
