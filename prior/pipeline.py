"""The parts of a pipeline: their configs and their figures."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.utils import get_method
from omegaconf import OmegaConf

from codegrid.engine.errors import InputError
from codegrid.engine.places import places_of
from codegrid.engine.sweep import read_metrics, run_once
from codegrid.evaluation.adm.files import AdmFile
from codegrid.evaluation.networks import check_networks
from codegrid.evaluation.scores import pipeline_names
from codegrid.evaluation.settings import EVALUATION_SPLITS

COMMON = (  # settings of every stage, by conf/config.yaml
    "seed", "name", "run_dir", "sweep", "objective", "resume", "id", "dry_run", "trust", "cache_dir",
)  # fmt: skip
OWN = ("prior", "prior_lr", "stage2", "evaluate")  # a pipeline's settings beside its tokenizer's
PART_GROUPS = {
    "prior": "stage2",
    "evaluate": "evaluate",
}  # where the settings of the other parts are
TOKENIZER = {"stage": "vqgan", "run": "vqgan.stages.train.train_tokenizer"}


def run_part(config: Any, folder: Path, ckpt: Path | None = None) -> dict[str, Any]:
    """The figures of a part of a pipeline, computed now or earlier; `ckpt` is the part that it builds on."""
    config = config.copy()
    if ckpt:
        config.ckpt = str(ckpt)
    # The pipeline has compared its whole config; a part stands on its neighbour in the folder, wherever that is.
    changeable = ("trainer", "logger", "ckpt")
    with name_group(config.stage):
        run_once(get_method(config.run), config, folder, changeable)
    return read_metrics(folder)  # what an evaluation returns lacks the reasons for absent scores


@contextmanager
def name_group(stage: str) -> Iterator[None]:
    """Add to the sentence of a mistake in a part where a pipeline has the part's settings."""
    try:
        yield
    except InputError as error:
        if stage not in PART_GROUPS or "=" not in str(error):  # it names no setting
            raise
        group = PART_GROUPS[stage]
        raise InputError(
            f"{error} (in stage=pipeline the settings of stage={stage} are below {group}, as {group}.batch_size)"
        ) from error


def split_config(config: Any) -> dict[str, Any]:
    """The configs of a pipeline's parts, each as its own stage's command would compose it."""
    everything: Any = OmegaConf.to_container(config, resolve=True)
    common = {name: everything[name] for name in COMMON}
    common |= {"run_dir": None, "resume": None, "id": None, "objective": None}
    tokenizer = {name: value for name, value in everything.items() if name not in OWN}
    model = {name: everything[name] for name in ("prior", "prior_lr") if name in everything}
    if everything[
        "resume"
    ]:  # in the places that the command names, which the tokenizer's run did not know
        for name in ("stage2", "evaluate"):
            everything[name]["data"] |= place_images(everything["data"], everything[name]["data"])
    parts = {
        "tokenizer": {**tokenizer, **common, **TOKENIZER},
        "prior": {**common, **everything["stage2"], **model},
        "evaluate": {**common, **everything["evaluate"]},
    }
    return {name: OmegaConf.create(part) for name, part in parts.items()}


def check_evaluation(evaluate: Any) -> None:
    """Raise InputError for settings of stage=evaluate with which a pipeline would end in a mistake after its trainings."""
    if isinstance(evaluate.samples, str):
        raise InputError(
            f"evaluate.samples={evaluate.samples} is a file, and stage=pipeline draws samples; give a number, and score the file "
            "by itself with stage=evaluate"
        )
    check_networks(evaluate.networks)
    if evaluate.reference not in (None, *EVALUATION_SPLITS):
        AdmFile.open("evaluate.reference", evaluate.reference)


def place_images(data: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, Any]:
    """Where the images of a config's `data` are, except for the `places` that a later stage of the pipeline names itself."""
    return {
        name: data[name] for name in places_of(data) if name in data and places.get(name) is None
    }


def main_scores(of_tokenizer: Mapping[str, Any], of_prior: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that a pipeline repeats from the evaluations of its tokenizer and of its prior, and why some are absent."""
    scores: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for stage, evaluation in (("vqgan", of_tokenizer), ("prior", of_prior)):
        names = [name for name in pipeline_names(stage) if name in evaluation]
        scores |= {name: evaluation[name] for name in names}
        reasons = evaluation.get("absent") or {}
        absent |= {name: reasons[name] for name in names if name in reasons}
    return {
        **scores,
        "exact": of_prior["exact"],
        "absent": absent,
    }  # exact: nats are no upper bound


def pipeline_result(
    tokenizer: Mapping[str, Any],
    prior: Mapping[str, Any],
    of_tokenizer: Mapping[str, Any],
    of_prior: Mapping[str, Any],
) -> dict[str, Any]:
    """The main figures of a pipeline, from those of its parts: both trainings and both evaluations."""
    return {
        "K": tokenizer["K"],
        "grid": tokenizer["grid"],
        **main_scores(of_tokenizer, of_prior),
        "unigram_nats_per_token": prior["unigram_nats_per_token"],
        "seconds": round(tokenizer["seconds"] + prior["seconds"], 1),
        "tokenizer_steps": tokenizer["steps"],
        "prior_steps": prior["steps"],
        "alarms": tokenizer["alarms"] + prior["alarms"],
        "pictures": [tokenizer["pictures"][-1], prior["pictures"][0]],
    }
