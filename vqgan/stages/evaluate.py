"""stage=evaluate of a tokenizer."""

from typing import Any

from omegaconf import DictConfig

from engine.checkpoint import find_checkpoint
from engine.run import open_folder, write_result
from evaluation.judging import (
    describe_evaluation,
    deterministic_float32,
    load_own_features,
    log_evaluation,
    name_images,
    printed_result,
    read_comparison,
)
from evaluation.settings import EvaluationSettings
from evaluation.table import format_codecs
from vqgan.judging import TokenizerJudge, compare_codecs
from vqgan.load import load_images, load_tokenizer


def evaluate_tokenizer(config: DictConfig, settings: EvaluationSettings) -> dict[str, Any]:
    """Score a tokenizer's reconstructions of a split, show the worst and the best, and count its codes."""
    tokenizer, described = load_tokenizer(settings.ckpt)
    images = load_images(described["data"], config)
    n = images.size(settings.split)
    other = read_comparison(settings, "vqgan")
    own = load_own_features(settings, images)
    folder = open_folder(config, find_checkpoint(settings.ckpt).parent.parent.name)
    tokenizer = tokenizer.to(settings.device)
    with deterministic_float32():
        judge = TokenizerJudge(tokenizer, images, settings, own)
        judge.measure_all()
        sheet = judge.scores()
        codecs, absent = compare_codecs(tokenizer, images, settings)
        ends = judge.rank_by_error()
        pictures = judge.save_pictures(folder / "pictures", **ends)
    of = described.get("id")
    result = {
        **describe_evaluation(settings, folder, of, "vqgan", of, n),
        **sheet.values,
        "K": tokenizer.K,
        "grid": list(tokenizer.grid),
        "absent": {**sheet.absent, **absent},
        "provenance": sheet.provenance,
        "references": codecs,
        **name_images(images, settings.split, ends),
        "codes": judge.save_code_counts(folder / "codes.npz"),
        "pictures": [str(path) for path in pictures],
    }
    remark = format_codecs(codecs, result["bits_per_image"])
    log_evaluation(folder, result, list(sheet.values), other, remark)
    return printed_result(write_result(folder, result))
