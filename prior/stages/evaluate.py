"""stage=evaluate: score a prior, a tokenizer if ckpt is one, or samples in a file."""

from typing import Any

from omegaconf import DictConfig

from codegrid.engine.checkpoint import read_checkpoint
from codegrid.engine.run import Run
from codegrid.evaluation.settings import EvaluationSettings
from prior.load import refuse_decoder
from prior.previews import preview_evaluation
from prior.stages.evaluate_prior import evaluate_prior
from prior.stages.evaluate_samples import evaluate_samples
from vqgan.losses.perceptual import check_lpips
from vqgan.stages.evaluate import evaluate_tokenizer

EVALUATE_NEEDS = "the run to evaluate; add ckpt=<run folder of stage=vqgan or stage=prior>"


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Score a prior on a split by the likelihood of its images' codes and by samples; or a tokenizer, if `ckpt` is one; or the
    samples in the .npz that `samples` names."""
    needed = None if isinstance(config.samples, str) else EVALUATE_NEEDS
    with Run.open(config, ckpt=needed, resumes="has nothing to resume") as run:
        settings = EvaluationSettings.read(run.config, run.device)
        check_lpips(settings.lpips)
        if isinstance(settings.samples, str):
            return evaluate_samples(run, settings)
        if run.is_dry:
            return preview_evaluation(run, settings)
        if read_checkpoint(settings.ckpt, "vqgan", "prior")["codegrid"]["stage"] == "vqgan":
            refuse_decoder(settings.ckpt, run.config.get("decoder"))
            return evaluate_tokenizer(run, settings)
        return evaluate_prior(run, settings)
