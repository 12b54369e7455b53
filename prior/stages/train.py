"""stage=prior: train a prior on a tokenizer's codes."""

from typing import Any

from omegaconf import DictConfig

from codegrid.engine.callbacks.checkpointing import BestCheckpoint
from codegrid.engine.collectives import is_main, run_on_main
from codegrid.engine.run import Run
from prior import training
from prior.conditioning.images import load_conditioned_images, open_labels
from prior.load import copy_origin, find_tokenizer
from prior.stages.building import build_parts
from prior.stages.rehearsing import rehearse_prior
from vqgan.load import load_tokenizer, make_tags, require_codes

LEARNED_FROM = "the tokenizer whose codes it learns; add ckpt=<run folder of stage=vqgan>"


def train_prior(config: DictConfig) -> dict[str, Any] | None:
    """Encode the data once, all ranks together, and train a prior on the codes; the final figures, on the main rank."""
    with Run.open(config, ckpt=LEARNED_FROM, shards=True) as run:
        config = run.config
        training.check_sizes(config.prior)
        run.seed()
        tokenizer, described = load_tokenizer(find_tokenizer(config.ckpt, run.resume))
        require_codes(tokenizer, f"ckpt={config.ckpt} has no codes to learn")
        images = load_conditioned_images(described["data"], config, run.resume)
        if run.is_dry:
            return rehearse_prior(run, tokenizer, images)
        labels = open_labels(config, images, run.resume)
        module, data, header, around = build_parts(run, tokenizer, images, labels)
        data.check_batch_fits(run.training.num_processes)
        tags = [
            *make_tags(config.stage, images.title, tokenizer),
            type(module.model).__name__.lower(),
        ]
        folder = run.start(images.title, images.describe(), tags, module)
        run_on_main(lambda: copy_origin(tokenizer, described, images, folder, labels))
        best = BestCheckpoint(run.header | header, "val/nats_per_token")
        # The best weights are kept before a callback takes their average out again.
        condition = labels.condition if labels else None
        shown = training.display_callbacks(module.model, tokenizer, condition)
        callbacks = [best, *around, *shown]
        figures = run.fit(module, data, callbacks, header)
        training.report_early_stop(around, module.step)
        if not is_main():
            return None
        about = module.model, tokenizer, described, data.codes["train"], data.codes["val"]
        return run.finish(training.prior_result(figures, best, *about))
