"""Names of earlier versions, which work for one more release on the command line and in the files of earlier runs."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from codegrid.engine.texts import read_texts
from codegrid.engine.version import STAMP, Stamp

RENAMED_KEYS = {  # last parts of an old key -> last part of the new one
    "quantizer.books": "num_codebooks",
    "quantizer.dropout": "nested",
    "prior.book_depth": "codebook_depth",
    "loss.codes_rest": "freeze_codes",
    "adaptive.most": "max_weight",
    "encoder.most": "max_width_mult",
    "decoder.most": "max_width_mult",
    "discriminator.most": "max_width_mult",
    "sampler.given": "init_image",
    "sampler.choice": "choice_temperature",
    "beside": "compare_to",
    "prune.least": "min_others",
    "data.value_range": "range",
}
SWITCHES = {  # end of the key of an old switch -> end of the new key, and what true and false are called there
    ".rotation": (".gradient", {"true": "rotation", "false": "straight_through"}),
}
RENAMED_TARGETS = {  # classes and functions that config.yaml and checkpoints of version 0.1 name
    "prior.callbacks.Doctor": "prior.callbacks.PriorDoctor",
    "prior.evaluate.evaluate": "prior.stages.evaluate.evaluate",
    "prior.pictures.draw": "prior.stages.sample.draw_samples",
    "prior.pipeline.chain": "prior.stages.pipeline.run_pipeline",
    "prior.sampling.Sampler": "prior.decoding.sampling.Sampler",
    "prior.stages.encode": "prior.stages.extract.extract_codes",
    "prior.stages.train": "prior.stages.train.train_prior",
    "vqgan.callbacks.average.Average": "codegrid.engine.callbacks.ema.WeightAverage",
    "vqgan.callbacks.doctor.Doctor": "vqgan.callbacks.doctor.TokenizerDoctor",
    "vqgan.callbacks.prune.Prune": "codegrid.engine.callbacks.pruning.Prune",
    "vqgan.clock.Schedule": "codegrid.engine.clock.Schedule",
    "vqgan.decoder.Decoder": "vqgan.networks.decoder.Decoder",
    "vqgan.encoder.Encoder": "vqgan.networks.encoder.Encoder",
    "vqgan.losses.perceptual.Features": "vqgan.losses.perceptual.DiscriminatorFeatures",
    "vqgan.quantizers.base.Anneal": "vqgan.quantizers.anneal.Anneal",
    "vqgan.report.stage.report": "codegrid.evaluation.report.stage.report",
    "vqgan.run.wandb_logger": "codegrid.engine.loggers.make_wandb_logger",
    "vqgan.series.Series": "codegrid.engine.loggers.CSVSeries",
    "vqgan.stages.train": "vqgan.stages.train.train_tokenizer",
    "vqgan.sweep.Sweep": "codegrid.engine.sweep.Sweep",
}

MOVED_PACKAGES = ("engine", "data", "evaluation")  # at the top up to format 2, in codegrid since
FIRST_FORMAT_OF_CODEGRID = 3
WITH_HEADS = [
    f"prior.models.{name}"
    for name in ("gpt.GPT", "rar.RAR", "rq.RQ", "maskgit.MaskGIT", "diffusion.Diffusion")
]
EARLIER_HEAD = {
    "_target_": "prior.heads.softmax.Softmax", "_partial_": True, "group_share": 0.0, "group_size": 16
}  # fmt: skip
LABELLED_BY_TABLES = ("codegrid.data.folder.Folder", "codegrid.data.layouts.FFHQ")


def rename_key(key: str) -> str:
    """The current name of a key such as quantizer.books, at any depth, as in stage2.sampler.choice."""
    for old, new in RENAMED_KEYS.items():
        if key == old or key.endswith(f".{old}"):
            return f"{key.removesuffix(old.rpartition('.')[2])}{new}"
    return key


def rename_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Command-line words with current keys, and a sentence for each renamed key."""
    renamed: list[str] = []
    sentences: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        prefix = key[: len(key) - len(key.lstrip("+~"))]
        new = prefix + rename_key(key.removeprefix(prefix))
        if new == key:
            new, value = rename_switch(key, value)
        if new != key:
            sentences.append(
                f"{key.removeprefix(prefix)} is called {new.removeprefix(prefix)} now; "
                "the old name works for one more release"
            )
        renamed.append(f"{new}{equals}{value}")
    return renamed, sentences


def rename_switch(key: str, value: str) -> tuple[str, str]:
    """A key of a quantizer and its value, or values, on the command line, as they are called today."""
    for old, (new, names) in SWITCHES.items():
        if "quantizer." in key and key.endswith(old):
            values = [names.get(word.strip().lower(), word) for word in value.split(",")]
            return key.removesuffix(old) + new, ",".join(values)
    return key, value


def upgrade_config(config: Any, stamp: Stamp | None = None) -> Any:
    """The config of an earlier run, a container or OmegaConf's, with current names; texts are no numbers.

    `stamp` is the program that wrote it, by default the one that the config names. Interpolations stay unresolved.
    """
    if isinstance(config, DictConfig | ListConfig):
        return OmegaConf.create(
            upgrade_config(OmegaConf.to_container(config, resolve=False), stamp)
        )
    return read_texts(upgrade_names(config, stamp))


def upgrade_names(content: Any, stamp: Stamp | None = None) -> Any:
    """The content of a file of an earlier run, in plain containers, with current names of keys and classes."""
    if stamp is None:
        stamp = Stamp.read(content.get(STAMP) if isinstance(content, Mapping) else None)
    return _upgrade(content, "", stamp)


def rename_target(target: str, stamp: Stamp) -> str:
    """The current full name of a class or function that the program of `stamp` has written.

    A user may have a package data of their own by now, whose names stay.
    """
    target = RENAMED_TARGETS.get(target, target)
    is_moved = stamp.format < FIRST_FORMAT_OF_CODEGRID and target.split(".")[0] in MOVED_PACKAGES
    return f"codegrid.{target}" if is_moved else target


@cache
def _default_reader_timeout() -> Any:
    file = Path(__file__).parents[1] / "conf" / "images" / "default.yaml"
    return OmegaConf.load(file).reader_timeout


def _add_reader_timeout(node: dict[Any, Any]) -> dict[Any, Any]:
    """The settings of images with a time limit for their readers, which earlier versions did not have."""
    if not {"num_workers", "cache"} <= node.keys() or "reader_timeout" in node:
        return node
    is_dataset = (
        "_target_" in node
    )  # else it replaces settings of a dataset, and null replaces nothing
    return {**node, "reader_timeout": _default_reader_timeout() if is_dataset else None}


def _add_image_settings(node: dict[Any, Any]) -> dict[Any, Any]:
    """The settings of a dataset with what earlier versions did: pixels of 8 bits, cut out of the middle, and no tables."""
    if not {"_target_", "num_workers", "cache", "image_size"} <= node.keys():
        return node
    earlier: dict[str, Any] = {"depth": 8, "fit": "crop"}
    if node["_target_"] in LABELLED_BY_TABLES and "labels" not in node:
        earlier |= {"columns": [], "mismatch": "stop"}
    return {**earlier, **node}


def _add_learners(node: dict[Any, Any]) -> dict[Any, Any]:
    """The settings of a tokenizer's run with those that say what learns, which earlier versions did not have."""
    if node.get("stage") not in ("vqgan", "pipeline") or "quantizer" not in node or "learn" in node:
        return node
    return {**node, "learn": "all", "grow": False}


@cache
def _read_conf(name: str) -> Any:
    file = Path(__file__).parents[1] / "conf" / f"{name}.yaml"
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


def _add_code_losses(node: dict[Any, Any]) -> dict[Any, Any]:
    """The settings of a tokenizer's run with what prepares it for a prior, all of it off, which earlier versions did not have."""
    loss = node.get("loss")
    if node.get("stage") not in ("vqgan", "pipeline") or not isinstance(loss, dict):
        return node
    if "perceptual_weight" not in loss or "perturb" in loss:
        return node
    model = _read_conf("loss/code_model/neighbours")
    return {
        **node,
        "loss": {**loss, **_read_conf("loss/on_codes/default"), "code_model": model},
        "codes": None,
        "redraw": _read_conf("stage/vqgan")["redraw"],
    }


def _add_score(node: dict[Any, Any]) -> dict[Any, Any]:
    """The settings of quantizer=ibq with its choice of a code, which earlier versions did not have."""
    is_ibq = node.get("_target_") == "vqgan.quantizers.ibq.IBQ"
    return {**node, "score": "nearest"} if is_ibq and "score" not in node else node


def _add_head(node: dict[Any, Any]) -> dict[Any, Any]:
    """The settings of a transformer prior with a logit of each code, the only head of earlier versions."""
    has_head = node.get("_target_") in WITH_HEADS
    return {**node, "head": EARLIER_HEAD} if has_head and "head" not in node else node


def _complete_quantizer(node: dict[Any, Any]) -> dict[Any, Any]:
    """The settings of a quantizer with codes, as it was before it had a choice of gradients, activations and its begin."""
    if not str(node.get("_target_")).startswith("vqgan.quantizers.") or "K" not in node:
        return node
    earlier: dict[str, Any] = {"from": 0}
    if node["_target_"] == "vqgan.quantizers.fsq.FSQ":
        earlier |= {"activation": "tanh", "gradient": "straight_through", "decay": 0.9}
    if "rotation" in node:
        _, names = SWITCHES[".rotation"]
        earlier["gradient"] = names[str(bool(node["rotation"])).lower()]
    return earlier | {key: value for key, value in node.items() if key != "rotation"}


def _add_tokens(node: dict[Any, Any]) -> dict[Any, Any]:
    """The settings of a vision transformer with a number of tokens, which earlier versions had as a grid of one row."""
    is_vit = str(node.get("_target_")).startswith("vqgan.networks.vit.ViT")
    return {**node, "tokens": None} if is_vit and "tokens" not in node else node


def _add_evaluation(node: dict[Any, Any]) -> dict[Any, Any]:
    """The settings of stage=evaluate, also in a pipeline, without the judge of shapes, the curve of rates, perturbed codes, the
    linear probe and the reference, which earlier versions did not have."""
    evaluates = {"inception", "proxy", "neighbours"} <= node.keys()
    earlier = {
        "validity": 0, "rates": False, "perturb": 0, "perturb_nearest": 8, "probe": 0, "reference": None, "rounding": None,
    }  # fmt: skip
    return {**node, **{k: v for k, v in earlier.items() if k not in node}} if evaluates else node


def _add_sampler_settings(node: dict[Any, Any]) -> dict[Any, Any]:
    """The settings of a sampler with what earlier versions did: code by code in each prior's own order, and no code drawn twice."""
    is_sampler = node.get("_target_") == "prior.decoding.sampling.Sampler"
    added = {"order": None, "corrector": 0, "remask": 0.0, "parallel": 1}
    return {**added, **node} if is_sampler else node


ADDITIONS = (
    _add_reader_timeout, _add_image_settings, _add_learners, _add_score, _complete_quantizer, _add_evaluation, _add_tokens,
    _add_sampler_settings, _add_head, _add_code_losses,
)  # fmt: skip


def _upgrade(node: Any, path: str, stamp: Stamp) -> Any:
    if isinstance(node, Mapping):
        upgraded = {}
        for key, value in node.items():
            where = rename_key(f"{path}.{key}" if path else str(key))
            upgraded[where.rpartition(".")[2] if isinstance(key, str) else key] = _upgrade(
                value, where, stamp
            )
        for add in ADDITIONS:
            upgraded = add(upgraded)
        return upgraded
    if isinstance(node, list):
        return [_upgrade(value, path, stamp) for value in node]
    if isinstance(node, str) and path.rpartition(".")[2] in ("_target_", "run"):
        return rename_target(node, stamp)
    return node
