"""dry_run=true of stage=explore."""

from typing import Any

from codegrid.engine.run import Run
from prior.exploring.subject import Subject
from vqgan.previews import reconstruct_first


def preview_page(run: Run, subject: Subject) -> dict[str, Any]:
    """What stage=explore would do; a batch of images is encoded and decoded."""
    n = run.config.batch_size
    total = len(subject.images.source("val"))
    counted = min(run.config.counted, total)
    parts = "a tokenizer" if subject.prior is None else "a prior and its tokenizer"
    would = f"count the codes of {counted:,} of {total:,} validation images, {n} at a time, and write a page of {parts} to"
    work = reconstruct_first(run, subject.tokenizer, subject.images, n)
    models = {"tokenizer": subject.tokenizer}
    return run.preview(subject.name, would, models, n, work)
