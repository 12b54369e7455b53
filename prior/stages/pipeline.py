"""stage=pipeline: a tokenizer, a prior on its codes, and the evaluation of both, as one run."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.errors import InputError
from codegrid.engine.run import Run
from prior.pipeline import main_scores, run_part, split_config
from vqgan.load import build_tokenizer, require_codes
from vqgan.starting import choose_start


def run_pipeline(config: DictConfig) -> dict[str, Any] | None:
    """Train a tokenizer and a prior on its codes, and evaluate both, each in its own folder; the main figures of all.

    With resume=<folder>, or in a sweep that is started again, finished parts are skipped and interrupted ones resume.
    """
    with Run.open(config, has_parts=True) as run:
        data: ImageDataModule = instantiate(run.config.data)
        choose_start(run, data)
        parts = split_config(run.config)
        check_parts(parts)
        folder = run.start(data.title)
        tokenizer = run_part(parts["tokenizer"], folder / "tokenizer")
        prior = run_part(parts["prior"], folder / "prior", ckpt=folder / "tokenizer")
        evaluate = parts["evaluate"]
        of_tokenizer = run_part(evaluate, folder / "evaluate_tokenizer", ckpt=folder / "tokenizer")
        of_prior = run_part(evaluate, folder / "evaluate_prior", ckpt=folder / "prior")
        return run.finish(
            {
                "run": str(folder),
                "id": run.config.id,
                "K": tokenizer["K"],
                "grid": tokenizer["grid"],
                **main_scores(of_tokenizer, of_prior),
                "unigram_nats_per_token": prior["unigram_nats_per_token"],
                "seconds": round(tokenizer["seconds"] + prior["seconds"], 1),
                "tokenizer_steps": tokenizer["steps"],
                "prior_steps": prior["steps"],
                "alarms": tokenizer["alarms"] + prior["alarms"],
                "pictures": [tokenizer["pictures"][-1], prior["pictures"][0]],
            }
        )


def check_parts(parts: dict[str, DictConfig]) -> None:
    """Build both models, since a mistake is best noticed before hours of training."""
    for name in ("tokenizer", "prior"):
        training = Run.open(parts[name].copy()).training
        if training.num_processes > 1:
            devices = f"trainer.devices={training.devices}"
            raise InputError(f"{devices} but stage=pipeline has one; run its stages one by one")
        training.check_budget()
    tokenizer = build_tokenizer(parts["tokenizer"].model, parts["tokenizer"].quantizer)
    require_codes(tokenizer, "stage=pipeline needs a tokenizer whose codes a prior can learn")
    instantiate(parts["prior"].prior, **tokenizer.code_space, classes=0)
