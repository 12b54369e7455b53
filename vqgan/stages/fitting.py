"""The part of a run that trains a tokenizer which is the same for all of its stages."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.callbacks.progress import Progress
from codegrid.engine.collectives import run_on_main
from codegrid.engine.run import Run
from vqgan.callbacks.codes import CodebookPictures
from vqgan.callbacks.reconstructions import Reconstructions
from vqgan.load import make_tags
from vqgan.module import VQGAN, prepare_layers
from vqgan.starting import Start


def fit_tokenizer(
    run: Run,
    module: VQGAN,
    data: ImageDataModule,
    start: Start,
    progress: dict[str, str],
    header: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Give a module its first weights and train it; the final figures and where everything lies, on the main rank.

    `progress` are the figures of the progress line and their names there; `header` is added to that of the checkpoints.
    """
    around = [c for c in instantiate(run.config.callbacks).values() if c is not None]
    data.check_recorded(run.resume)
    if not run.is_dry:
        data.prepare_data()
        start.fill(module.tokenizer, data)
    prepare_layers(module, run.training)
    if run.is_dry:
        return run.rehearse(data.title, module, data, around, len(data.source("train")))
    data.check_batch_fits(run.launch().world_size)
    tags = [*make_tags(run.config.stage, data.title, module.tokenizer), *start.tags]
    folder = run.start(data.title, data.describe(), tags, module)
    run_on_main(lambda: data.record_images(folder))
    pictures, codes = Reconstructions(), CodebookPictures()
    figures = run.fit(module, data, [*around, Progress(progress), pictures, codes], header)
    shape = module.tokenizer.size_facts
    files = [str(file) for file in (pictures.file, *codes.files)]
    return run.finish({**figures, **shape, **start.origin, "pictures": files})
