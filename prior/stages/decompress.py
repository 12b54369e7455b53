"""stage=decompress: the codes and the pictures of files that stage=compress wrote."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from codegrid.engine.console import log_line
from codegrid.engine.errors import check_int
from codegrid.engine.run import Run
from codegrid.evaluation.judging import printed_result
from prior.coding.codec import Codec
from prior.coding.compressing import (
    CODE_ARRAYS,
    PICTURE_FILES,
    decompress_all,
    explain_png,
    read_coded_files,
)
from prior.coding.file import CGZ
from prior.coding.listing import list_inputs, refuse_failed
from prior.load import load_prior
from prior.previews import preview_decompression

WRITTEN_UNDER = "the prior under which they were written; add ckpt=<run folder of stage=prior>"


def decompress_files(config: DictConfig) -> dict[str, Any]:
    """Decode .cgz files into the codes that were written, and a PNG file of each."""
    with Run.open(config, ckpt=WRITTEN_UNDER, resumes="has nothing to resume") as run:
        plain: Any = OmegaConf.to_container(run.config, resolve=True)
        check_int("batch_size", plain["batch_size"], 1, "file")
        inputs = list_inputs(plain["files"], (CGZ,), f"{CGZ} files")
        trained = load_prior(plain["ckpt"], plain["decoder"]).to(run.device)
        tokenizer = trained.tokenizer
        codec = Codec(trained.model, tokenizer, run.device)
        files = read_coded_files(codec, inputs)
        if run.is_dry:
            return preview_decompression(run, trained, codec, list(files.values()))
        if sentence := explain_png(tokenizer):
            log_line(sentence)
        folder = run.start(trained.name)
        done = decompress_all(codec, trained, files, plain["batch_size"], folder)
        n = len(done.codes)
        result: dict[str, Any] = {
            "run": str(folder),
            "of": trained.config.get("id"),
            "n": n,
            "codes": str(folder / CODE_ARRAYS),
            "images": str(folder / PICTURE_FILES),
            "images_per_second": round(n / max(done.seconds, 1e-9), 2),
            "failed": done.failed,
        }
        run.finish(result)
        refuse_failed(done.failed, len(files), folder / PICTURE_FILES)
        return printed_result(result)
