"""stage=evaluate: score a prior, or a tokenizer if ckpt is one."""

import secrets
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from engine.checkpoint import read_checkpoint
from engine.run import open_folder, write_result
from evaluation.judging import (
    describe_evaluation,
    deterministic_float32,
    log_evaluation,
    name_images,
    printed_result,
    read_comparison,
)
from evaluation.settings import EvaluationSettings
from prior.judging import PriorJudge, summarize_likelihoods
from prior.load import load_prior
from vqgan.load import load_images
from vqgan.losses.perceptual import check_lpips
from vqgan.stages.evaluate import evaluate_tokenizer


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Score a prior on a split by the likelihood of its images' codes and by samples; or a tokenizer, if `ckpt` is one."""
    config.id = config.id or secrets.token_hex(4)
    settings = EvaluationSettings.from_mapping(config)
    check_lpips(settings.lpips)
    if read_checkpoint(settings.ckpt, "vqgan", "prior")["codegrid"]["stage"] == "vqgan":
        return evaluate_tokenizer(config, settings)
    trained = load_prior(settings.ckpt)
    images = load_images(trained.data, config)
    about_sampler: Any = OmegaConf.to_container(config.sampler, resolve=True)
    judge = PriorJudge(trained, instantiate(config.sampler), about_sampler, images, settings)
    other = read_comparison(settings, "prior")
    folder = open_folder(config, trained.name)
    with deterministic_float32():
        sheet = judge.measure_all()
    ends = judge.rank_by_likelihood()
    judge.save_likelihoods(folder / "likelihoods.npz")
    pictures = judge.save_pictures(folder / "pictures", ends)
    of = (trained.config.get("id"), "prior", trained.tokenizer_of)
    result = {
        **describe_evaluation(settings, folder, *of, judge.n),
        **judge.describe_model(),
        **sheet.values,
        "white": round(judge.white_level(), 2),
        **name_images(images, settings.split, ends),
        "absent": sheet.absent,
        "provenance": sheet.provenance,
        "likelihoods": str(folder / "likelihoods.npz"),
        "pictures": [str(path) for path in pictures],
    }
    remarks = summarize_likelihoods(result)
    log_evaluation(folder, result, list(sheet.values), other, *remarks)
    return printed_result(write_result(folder, result))
