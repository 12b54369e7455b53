"""stage=distill: train a small decoder against that of a tokenizer."""

from functools import partial
from typing import Any

from omegaconf import DictConfig

from codegrid.engine.run import Run
from vqgan.distilling import STUDENT_LEARNS, Distillation, Teacher, TeacherStart, adopt_tokenizer
from vqgan.load import load_tokenizer
from vqgan.stages.building import build_module
from vqgan.stages.fitting import fit_tokenizer

TAUGHT_BY = "the tokenizer whose decoder teaches; add ckpt=<run folder of stage=vqgan>"
TEACHING_PROGRESS = {
    "train/rec_to_teacher": "rec",
    "val/psnr_to_teacher": "PSNR to teacher",
    "val/psnr": "PSNR",
}


def distill_decoder(config: DictConfig) -> dict[str, Any] | None:
    """Train a decoder on the codes of a trained tokenizer; its run has a tokenizer as any other, of the same codes."""
    with Run.open(config, ckpt=TAUGHT_BY, writes="vqgan") as run:
        run.seed()
        tokenizer, described = load_tokenizer(run.config.ckpt)
        data = adopt_tokenizer(run, tokenizer, described)
        teacher = Teacher(tokenizer, run.config.teacher_share, run.config.mix)
        make = partial(Distillation, teacher=teacher)
        module = build_module(run.config, run.training, STUDENT_LEARNS, make)
        start = TeacherStart(teacher, described.get("id"), resumes=run.resume is not None)
        header = {"teacher": tokenizer.fingerprint()}
        return fit_tokenizer(run, module, data, start, TEACHING_PROGRESS, header)
