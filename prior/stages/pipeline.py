"""stage=pipeline: a tokenizer, a prior on its codes, and the judgement of both, as one run."""

from pathlib import Path
from typing import Any

from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from engine.distributed import count_processes
from engine.environment import find_device
from engine.errors import InputError
from engine.run import make_budget, open_folder, resolve_config, write_result
from engine.sweep import run_once
from evaluation.scores import pipeline_names
from vqgan.load import build_tokenizer

COMMON = (
    "seed",
    "name",
    "run_dir",
    "sweep",
    "objective",
    "resume",
    "id",
    "cache_dir",
)  # what every stage has, by conf/config.yaml

OWN = (
    "prior",
    "prior_lr",
    "stage2",
    "evaluate",
)  # what a pipeline has beside the settings of its tokenizer

TOKENIZER = {
    "stage": "vqgan",
    "run": "vqgan.stages.train.train_tokenizer",
}  # which a pipeline's own stage and function stand before


def run_pipeline(config: DictConfig) -> dict[str, Any]:
    """Train a tokenizer, train a prior on its codes, and judge both, each in a folder of its own; the main figures of all.

    With resume=<folder>, or in a sweep that is started again, what is finished is left out and what broke off goes on.
    """
    config = resolve_config(config, chain=True)
    parts = split_config(config)
    title = check_parts(parts)
    folder = open_folder(config, title)
    tokenizer, prior = folder / "tokenizer", folder / "prior"
    trained = run_part(parts["tokenizer"], tokenizer)
    learned = run_part(parts["prior"], prior, ckpt=tokenizer)
    of_tokenizer = run_part(parts["evaluate"], folder / "evaluate_tokenizer", ckpt=tokenizer)
    of_prior = run_part(parts["evaluate"], folder / "evaluate_prior", ckpt=prior)
    result = {
        "run": str(folder),
        "id": config.id,
        "K": trained["K"],
        "grid": trained["grid"],
        **{name: of_tokenizer[name] for name in pipeline_names("vqgan") if name in of_tokenizer},
        **{name: of_prior[name] for name in pipeline_names("prior") if name in of_prior},
        "exact": of_prior["exact"],
        "unigram_nats_per_token": learned["unigram_nats_per_token"],
        "seconds": round(trained["seconds"] + learned["seconds"], 1),
        "tokenizer_steps": trained["steps"],
        "prior_steps": learned["steps"],
        "alarms": trained["alarms"] + learned["alarms"],
        "pictures": [trained["pictures"][-1], learned["pictures"][0]],
    }
    return write_result(folder, result)


def run_part(config: DictConfig, folder: Path, ckpt: Path | None = None) -> dict[str, Any]:
    """The figures of a part of the chain, made now or before."""
    config = config.copy()
    if ckpt:
        config.ckpt = str(ckpt)
    figures = run_once(get_method(config.run), config, folder)
    assert figures
    return figures


def split_config(config: DictConfig) -> dict[str, DictConfig]:
    """The configs of a pipeline's parts, each as its own stage's command would make it."""
    whole: Any = OmegaConf.to_container(config, resolve=True)
    common = {
        **{name: whole[name] for name in COMMON},
        "run_dir": None,
        "resume": None,
        "id": None,
        "objective": None,
    }
    configs = {
        "tokenizer": {
            **{name: value for name, value in whole.items() if name not in OWN},
            **common,
            **TOKENIZER,
        },
        "prior": {
            **common,
            **whole["stage2"],
            **{name: whole[name] for name in ("prior", "prior_lr") if name in whole},
        },
        "evaluate": {**common, **whole["evaluate"]},
    }
    return {name: OmegaConf.create(made) for name, made in configs.items()}


def check_parts(parts: dict[str, DictConfig]) -> str:
    """What the run is called, after its images; both models have been built by then, for a mistake is best found before hours."""
    for name in ("tokenizer", "prior"):
        make_budget(resolve_config(parts[name].copy()))
        trainer = parts[name].trainer
        if count_processes(trainer, find_device(trainer.accelerator).type) > 1:
            raise InputError(
                f"trainer.devices={trainer.devices} but stage=pipeline has one; run its stages one by one"
            )
    tokenizer = build_tokenizer(parts["tokenizer"])
    if tokenizer.K is None:
        raise InputError(
            "stage=pipeline needs a tokenizer whose codes a prior can learn; choose quantizer=ema"
        )
    instantiate(
        parts["prior"].prior, codebook=tokenizer.quantizer.vectors(), grid=tokenizer.grid, classes=0
    )
    title: str = instantiate(parts["tokenizer"].data).title
    return title
