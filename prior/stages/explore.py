"""stage=explore: a page in which the codes of a model can be edited."""

from typing import Any

from omegaconf import DictConfig

from codegrid.engine.console import log_line
from codegrid.engine.errors import check_int
from codegrid.engine.run import Run
from prior.exploring.document import build_page, check_written_size, write_page
from prior.exploring.graphs import check_libraries, make_networks
from prior.exploring.manifest import describe_page
from prior.exploring.preview import preview_page
from prior.exploring.runtime import load_runtime
from prior.exploring.serving import check_server, serve_model
from prior.exploring.subject import check_page_size, open_subject
from prior.exploring.survey import survey_codes

EXPLORED = "the model to explore; add ckpt=<run folder of stage=vqgan, or of stage=prior>"
PAGE = "explore.html"


def explore_model(config: DictConfig) -> dict[str, Any] | None:
    """Write a model as one HTML file, after its graphs have been compared with it; or serve the page until a signal ends it."""
    with Run.open(config, ckpt=EXPLORED, resumes="has nothing to resume") as run:
        config = run.config
        for name in ("pictures", "counted", "shown", "batch_size", "max_megabytes"):
            check_int(name, config[name], 1)
        check_server(config.serve, config.port)
        subject = open_subject(config.ckpt, config.decoder, config.data)
        if not config.serve:
            check_libraries()
            check_page_size(subject, config.max_megabytes)
        if run.is_dry:
            return preview_page(run, subject)
        engine = None if config.serve else load_runtime(config.runtime, config.cache_dir)
        survey = survey_codes(
            subject.tokenizer, subject.images, config.pictures, config.counted, config.shown,
            config.batch_size, run.device,
        )  # fmt: skip
        networks = None if config.serve else make_networks(subject, survey)
        manifest, parts = describe_page(subject, survey, networks, engine)
        page = build_page(manifest, parts.contents).encode()
        if networks is None:
            serve_model(subject, page, config.port, run.device)
            return None
        check_written_size(page, config.max_megabytes)
        folder = run.start(subject.name)
        write_page(folder / PAGE, page)
        result = {
            "run": str(folder),
            "page": str(folder / PAGE),
            "bytes": len(page),
            "checks": networks.checks,
            "notes": manifest["notes"],
        }
        log_line(f"open {folder / PAGE} in a browser; it needs no network and no other file")
        return run.finish(result)
