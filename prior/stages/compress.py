"""stage=compress: images as files, by arithmetic coding under a prior."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from codegrid.data.endings import readable_suffixes
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, check_int
from codegrid.engine.run import Run
from codegrid.evaluation.judging import printed_result
from prior.coding.codec import Codec
from prior.coding.compressing import (
    CODED_FILES,
    compare_formats,
    compress_all,
    describe_comparison,
    summarize_files,
    write_table,
)
from prior.coding.listing import list_inputs, refuse_failed
from prior.coding.other_formats import check_formats
from prior.load import load_prior
from prior.previews import preview_compression

CODED_UNDER = "the prior to code under; add ckpt=<run folder of stage=prior>"


def compress_files(config: DictConfig) -> dict[str, Any]:
    """Write a .cgz file of each image, and what they need beside other formats."""
    with Run.open(config, ckpt=CODED_UNDER, resumes="has nothing to resume") as run:
        plain: Any = OmegaConf.to_container(run.config, resolve=True)
        check_int("batch_size", plain["batch_size"], 1, "image")
        if not isinstance(plain["verify"], bool):
            raise InputError(f"verify={plain['verify']} must be true or false")
        formats = check_formats(plain["compare"])
        inputs = list_inputs(plain["files"], readable_suffixes(), "images")
        trained = load_prior(plain["ckpt"]).to(run.device)
        tokenizer, codec = trained.tokenizer, Codec(trained.model, trained.tokenizer, run.device)
        labels = trained.label_images(plain["label"], plain["condition"], len(inputs))
        if run.is_dry:
            return preview_compression(run, trained, codec, len(inputs), labels)
        folder = run.start(trained.name)
        coding = plain["batch_size"], plain["verify"], folder
        done = compress_all(codec, tokenizer, inputs, labels, *coding)
        result: dict[str, Any] = {"run": str(folder), "of": trained.config.get("id"), "n": 0}
        if done.coded:
            result |= summarize_files(done, tokenizer)
            paths = [inputs[name] for name in done.coded]
            figures, absent = compare_formats(formats, tokenizer, paths)
            result |= {**figures, "absent": absent, "table": str(write_table(done, folder))}
            for sentence in describe_comparison(result):
                log_line(sentence)
        run.finish(result | {"failed": done.failed})
        refuse_failed(done.failed, len(inputs), folder / CODED_FILES)
        return printed_result(result)
