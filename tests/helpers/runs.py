"""Run folders of small models that nobody trained, for tests of what stands on them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.checkpoint import build_trusted, make_header, save_atomically
from codegrid.engine.folder import LAST
from prior.load import copy_tokenizer
from prior.models.base import PriorModel, describe_codes
from tests.helpers.configs import SMALL, compose_plain
from vqgan.load import build_tokenizer
from vqgan.tokenizer import Tokenizer

SMALL_PRIOR = ["prior.width=16", "prior.depth=1", "prior.heads=2"]


def save_tokenizer_run(folder: Path, *words: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A run folder of stage=vqgan with random weights; returns its tokenizer and config."""
    torch.manual_seed(0)
    small = [word for word in SMALL if "quantizer=kl" not in words or "quantizer.K" not in word]
    config = compose_plain(*small, *words)
    tokenizer = build_tokenizer(config["model"], config["quantizer"]).eval()
    tokenizer.initialise(torch.randn(64, tokenizer.encoder.channels, 16, 16))
    state = {f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    header = make_header("vqgan", config)
    save_atomically({"codegrid": header, "state_dict": state}, folder / LAST)
    return tokenizer, config


def save_prior_run(
    folder: Path,
    *words: str,
    classes: int | Sequence[str] = 0,
    seed: int = 0,
    tokenizer_words: Sequence[str] = (),
) -> None:
    """A run folder of stage=prior with random weights, and with the tokenizer that it needs. `words` replace SMALL_PRIOR;
    `classes` are names, or the number of classes without names."""
    names = classes if isinstance(classes, int) else tuple(classes)
    contents, random_state = _prior_run(words, names, seed, tuple(tokenizer_words))
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    torch.set_rng_state(random_state)


@cache
def _prior_run(
    words: tuple[str, ...],
    classes: int | tuple[str, ...],
    seed: int,
    tokenizer_words: tuple[str, ...],
) -> tuple[dict[Path, bytes], Tensor]:
    """The files of a prior's run, made once per process, and the state of torch's generator afterwards."""
    with TemporaryDirectory() as folder:
        _build_prior_run(Path(folder), words, classes, seed, tokenizer_words)
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        contents = {file.relative_to(folder): file.read_bytes() for file in files}
    return contents, torch.get_rng_state()


def _build_prior_run(
    folder: Path,
    words: Sequence[str],
    classes: int | Sequence[str],
    seed: int,
    tokenizer_words: Sequence[str],
) -> None:
    few = ["data.n_train=32", "data.n_val=8", *tokenizer_words]
    tokenizer, described = save_tokenizer_run(folder / "tokenizer", *few)
    torch.manual_seed(seed)
    config = compose_plain("stage=prior", *(words or SMALL_PRIOR))
    names = [] if isinstance(classes, int) else list(classes)
    num_classes = classes if isinstance(classes, int) else len(names)
    code_space = {**describe_codes(config["prior"], tokenizer), "classes": num_classes}
    model = build_trusted({**config["prior"], **code_space}, PriorModel)  # type: ignore[type-abstract]
    for p in model.parameters():
        p.data += torch.randn_like(p) / 4
    copy_tokenizer(tokenizer, described, folder)
    about = {"tokenizer": tokenizer.fingerprint(), "classes": num_classes}
    if names:
        about |= {"class_names": names, "class_labels": list(range(num_classes))}
    header = make_header("prior", config) | about
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_atomically({"codegrid": header, "state_dict": state}, folder / LAST)
