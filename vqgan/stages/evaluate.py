"""stage=evaluate of a tokenizer."""

from typing import Any

from codegrid.engine.checkpoint import find_checkpoint
from codegrid.engine.folder import PICTURES
from codegrid.engine.precision import deterministic_float32
from codegrid.engine.run import Run
from codegrid.evaluation.adm.reference import open_reference
from codegrid.evaluation.judging import (
    describe_evaluation,
    load_own_features,
    log_evaluation,
    name_images,
    printed_result,
    read_comparison,
)
from codegrid.evaluation.settings import EvaluationSettings
from codegrid.evaluation.table import format_codecs, format_rates
from vqgan.judging import TokenizerJudge, compare_codecs
from vqgan.load import load_images, load_tokenizer


def evaluate_tokenizer(run: Run, settings: EvaluationSettings) -> dict[str, Any]:
    """Score a tokenizer's reconstructions of a split, show the worst and the best, and count its codes."""
    tokenizer, described = load_tokenizer(settings.ckpt)
    images = load_images(described["data"], run.config.data, settings.ckpt)
    n = images.size(settings.split)
    other = read_comparison(settings, "vqgan")
    own = load_own_features(settings, images)
    reference = open_reference(settings, images, images.cache_dir)
    folder = run.start(find_checkpoint(settings.ckpt).parent.parent.name)
    with deterministic_float32():
        judge = TokenizerJudge(tokenizer.to(settings.device), images, settings, own, reference)
        judge.measure_all()
        sheet = judge.scores()
        codecs, absent_codecs = compare_codecs(tokenizer, images, settings)
        sheet.absent |= absent_codecs
        ends = judge.rank_by_error()
        rates = judge.rates.scores(sheet)
        pictures = judge.save_pictures(folder / PICTURES, **ends)
        pictures += judge.save_rates(folder, rates, sheet, codecs)
    of = (described.get("id"), "vqgan", described.get("id"))
    result = {
        **describe_evaluation(settings, folder, *of, n),
        **sheet.values,
        "K": tokenizer.K,
        "grid": list(tokenizer.grid),
        **sheet.describe(),
        "references": codecs,
        "rates": rates,
        **name_images(images, settings.split, ends),
        "codes": judge.save_code_counts(folder / "codes.npz"),
        "pictures": [str(path) for path in pictures],
    }
    remarks = format_codecs(codecs, result["bits_per_image"], absent_codecs), format_rates(rates)
    log_evaluation(folder, result, list(sheet.values), other, *remarks)
    run.finish(result)
    return printed_result(result)
