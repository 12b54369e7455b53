"""stage=pipeline: a tokenizer, a prior on its codes, and the evaluation of both, as one run."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.errors import InputError
from codegrid.engine.run import Run
from prior.models.base import describe_codes
from prior.pipeline import check_evaluation, name_group, pipeline_result, run_part, split_config
from prior.stages.rehearsing import rehearse_parts
from prior.training import check_blocks
from vqgan.load import build_tokenizer, require_codes
from vqgan.starting import choose_start
from vqgan.tokenizer import Tokenizer


def run_pipeline(config: DictConfig) -> dict[str, Any] | None:
    """Train a tokenizer and a prior on its codes, and evaluate both, each in its own folder; the main figures of all.

    With resume=<folder>, or in a sweep that is started again, finished parts are skipped and interrupted ones resume.
    """
    with Run.open(config, has_parts=True) as run:
        data: ImageDataModule = instantiate(run.config.data)
        choose_start(run, data)
        parts = split_config(run.config)
        untrained = check_parts(parts)
        if run.is_dry:
            return rehearse_parts(run, data, parts, untrained)
        folder = run.start(data.title)
        tokenizer = run_part(parts["tokenizer"], folder / "tokenizer")
        prior = run_part(parts["prior"], folder / "prior", ckpt=folder / "tokenizer")
        evaluate = parts["evaluate"]
        of_tokenizer = run_part(evaluate, folder / "evaluate_tokenizer", ckpt=folder / "tokenizer")
        of_prior = run_part(evaluate, folder / "evaluate_prior", ckpt=folder / "prior")
        result = pipeline_result(tokenizer, prior, of_tokenizer, of_prior)
        return run.finish({"run": str(folder), "id": run.config.id, **result})


def check_parts(parts: dict[str, DictConfig]) -> Tokenizer:
    """Build both models, since a mistake is best noticed before hours of training; the untrained tokenizer."""
    trainings = {name: Run.open(parts[name].copy()).training for name in ("tokenizer", "prior")}
    for training in trainings.values():
        if training.num_processes > 1:
            devices = f"trainer.devices={training.devices}"
            raise InputError(f"{devices} but stage=pipeline has one; run its stages one by one")
        training.check_budget()
    check_evaluation(parts["evaluate"])
    tokenizer = build_tokenizer(parts["tokenizer"].model, parts["tokenizer"].quantizer)
    require_codes(tokenizer, "stage=pipeline needs a tokenizer whose codes a prior can learn")
    prior = parts["prior"].prior
    model = instantiate(prior, **describe_codes(prior, tokenizer), classes=0)
    with name_group("prior"):
        check_blocks(model, trainings["prior"])
    return tokenizer
