"""stage=evaluate of samples in a file, of any model."""

from typing import Any

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.checkpoint import read_checkpoint
from codegrid.engine.precision import deterministic_float32
from codegrid.engine.run import Run
from codegrid.evaluation.adm.files import AdmFile
from codegrid.evaluation.adm.samples import SamplesJudge
from codegrid.evaluation.judging import (
    describe_evaluation,
    log_evaluation,
    printed_result,
    read_comparison,
)
from codegrid.evaluation.settings import EvaluationSettings
from prior.load import load_prior
from vqgan.load import load_images, load_tokenizer


def evaluate_samples(run: Run, settings: EvaluationSettings) -> dict[str, Any]:
    """Score the samples in an .npz against `reference`, and with `ckpt` against the images of that run."""
    file = AdmFile.open("samples", str(settings.samples))
    judge = SamplesJudge(file, settings, open_images(run, settings), run.config.cache_dir)
    other = read_comparison(settings, "samples")
    if run.is_dry:
        return run.preview(
            judge.name, f"score {judge.file.num_images:,} images of {judge.file.path} in"
        )
    judge.load_networks()
    folder = run.start(judge.name)
    with deterministic_float32():
        sheet = judge.measure_all()
    result = {
        **describe_evaluation(settings, folder, None, "samples", None, judge.file.num_images),
        **judge.describe_file(),
        **sheet.values,
        **sheet.describe(),
    }
    log_evaluation(folder, result, list(sheet.values), other)
    run.finish(result)
    return printed_result(result)


def open_images(run: Run, settings: EvaluationSettings) -> ImageDataModule | None:
    """The images of the run that `ckpt` names, if it names one."""
    if not settings.ckpt:
        return None
    stage = read_checkpoint(settings.ckpt, "vqgan", "prior")["codegrid"]["stage"]
    if stage == "vqgan":
        data = load_tokenizer(settings.ckpt)[1]["data"]
    else:
        data = load_prior(settings.ckpt).data
    return load_images(data, run.config.data, settings.ckpt)
