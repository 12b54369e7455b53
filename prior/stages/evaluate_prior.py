"""stage=evaluate of a prior."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from codegrid.engine.precision import deterministic_float32
from codegrid.engine.run import Run
from codegrid.evaluation.judging import (
    describe_evaluation,
    log_evaluation,
    name_images,
    printed_result,
    read_comparison,
)
from codegrid.evaluation.settings import EvaluationSettings
from prior.judging import PriorJudge, open_image_labels, summarize_likelihoods
from prior.load import load_prior
from vqgan.load import load_images


def evaluate_prior(run: Run, settings: EvaluationSettings) -> dict[str, Any]:
    """Score a prior on a split by the likelihood of its images' codes and by samples."""
    trained = load_prior(settings.ckpt, run.config.get("decoder"))
    images = load_images(trained.data, run.config.data, settings.ckpt)
    about: Any = OmegaConf.to_container(run.config.sampler, resolve=True)
    labels = open_image_labels(trained, images, settings.ckpt, run.config)
    judge = PriorJudge(trained, instantiate(about), about, images, settings, labels)
    other = read_comparison(settings, "prior")
    folder = run.start(trained.name)
    with deterministic_float32():
        sheet = judge.measure_all()
    ends = judge.rank_by_likelihood()
    result = {
        **describe_evaluation(settings, folder, *judge.origin),
        **judge.describe_model(),
        **sheet.values,
        **name_images(images, settings.split, ends),
        **sheet.describe(),
        **judge.save_files(folder, ends),
    }
    log_evaluation(folder, result, list(sheet.values), other, *summarize_likelihoods(result))
    run.finish(result)
    return printed_result(result)
