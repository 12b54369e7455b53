"""stage=prior: train a prior on a tokenizer's codes."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from codegrid.data.tokens import CodeDataModule
from codegrid.engine.callbacks.checkpointing import BestCheckpoint
from codegrid.engine.collectives import is_main, run_on_main
from codegrid.engine.run import Run
from prior import training
from prior.load import copy_origin, find_tokenizer, prior_header
from prior.module import PriorModule
from vqgan.load import load_images, load_tokenizer, make_tags, require_codes

LEARNED_FROM = "the tokenizer whose codes it learns; add ckpt=<run folder of stage=vqgan>"


def train_prior(config: DictConfig) -> dict[str, Any] | None:
    """Encode the data once, all ranks together, and train a prior on the codes; the final figures, on the main rank."""
    with Run.open(config, ckpt=LEARNED_FROM, shards=True) as run:
        config = run.config
        training.check_sizes(config.prior)
        run.seed()
        tokenizer, described = load_tokenizer(find_tokenizer(config.ckpt, run.resume))
        require_codes(tokenizer, f"ckpt={config.ckpt} has no codes to learn")
        images = load_images(described["data"], config.data, config.ckpt, run.resume)
        train, val = training.load_codes(run, tokenizer, images)
        data = CodeDataModule(train, val, config.batch_size, config.seed)
        classes = training.list_classes(images, config.conditional, train, val, run.resume)
        model = instantiate(config.prior, **tokenizer.code_space, classes=len(classes))
        training.count_codes(model, train, val)
        optimizer, schedule = instantiate(config.optimizer), instantiate(config.schedule)
        module = PriorModule(
            model, optimizer, run.training.budget, schedule, config.label_drop,
            config.label_smoothing, clip=run.training.clip, accumulate=run.training.accumulate,
        )  # fmt: skip
        training.prepare_blocks(module, run.training)
        around = [c for c in instantiate(config.callbacks).values() if c is not None]
        if run.is_dry:
            return run.rehearse(module, data, around)
        data.check_batch_fits(run.training.num_processes)
        tags = [*make_tags(config.stage, images.title, tokenizer), type(model).__name__.lower()]
        folder = run.start(images.title, images.describe(), tags, module)
        run_on_main(lambda: copy_origin(tokenizer, described, images, folder))
        header = prior_header(tokenizer, classes)
        best = BestCheckpoint(run.header | header, "val/nats_per_token")
        # The best weights are kept before a callback takes their average out again.
        callbacks = [best, *around, *training.display_callbacks(model, tokenizer)]
        figures = run.fit(module, data, callbacks, header)
        training.report_early_stop(around, module.step)
        if not is_main():
            return None
        return run.finish(
            training.prior_result(figures, best, model, tokenizer, described, train, val)
        )
