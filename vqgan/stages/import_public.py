"""stage=import: a public tokenizer becomes a run of this program."""

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.errors import InputError
from codegrid.engine.run import Run
from vqgan.formats.files import open_public
from vqgan.formats.load import load_public, make_choices
from vqgan.formats.preview import Preview
from vqgan.formats.record import describe_import, report_import, save_imported
from vqgan.previews import preview_import


def import_tokenizer(config: DictConfig) -> dict[str, Any] | None:
    """Read another program's weights and write them as a run folder, on which all later stages can stand.

    An import that broke off is repeated by the same command with the same run_dir, or with resume=<its folder>.
    """
    with Run.open(config, repeats=True) as run:
        if run.resume and (finished := run.finished) is not None:
            return finished
        config = run.config
        if not config["from"]:
            raise InputError("stage=import needs the weights; add from=<file, folder or hub id>")
        data: ImageDataModule = instantiate(config.data)
        cosine, score, scales = (config.quantizer.get(n) for n in ("cosine", "score", "scales"))
        chosen = cosine, score, scales, config.head_width
        choices = make_choices(data.image_size, data.channels, config.pixels, *chosen)
        contents = open_public(config["from"], config.config, config.ema, config.revision)
        imported = load_public(contents.file, choices)
        data.check_recorded(run.resume)
        if run.is_dry:
            return preview_import(run, imported.tokenizer, data)
        data.prepare_data()
        preview = Preview(imported.tokenizer, data, config.show, run.device)
        config.model, config.quantizer = imported.plan.model, imported.plan.quantizer
        folder = run.start(data.title, data.describe())
        data.record_images(folder)
        pictures = preview.save(folder)
        save_imported(imported.tokenizer, run.header["config"], folder)
        about = describe_import(contents, imported, preview)
        report_import(about, folder)
        return run.finish({"run": str(folder), "id": config.id, **about, "pictures": pictures})
