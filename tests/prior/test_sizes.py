import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

CONF = Path(__file__).parents[2] / "conf"
SIZES = {"tiny": (128, 4, 4), "small": (192, 6, 6), "medium": (256, 8, 8), "base": (768, 12, 12)}
SIZES |= {"large": (1024, 24, 16), "xl": (1280, 36, 20)}


@cache
def config(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["stage=prior", *overrides])


def parameters(prior: Any) -> float:
    """Millions of parameters, of which none is made."""
    codebook = torch.ones(1, 16384, 8)
    with torch.device("meta"):
        model = instantiate(prior, codebook=codebook, grid=(16, 16))
    return sum(p.numel() for p in model.parameters()) / 1e6


def test_every_size_is_here() -> None:
    assert {file.stem for file in (CONF / "prior/size").glob("*.yaml")} == set(SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_brings_its_width_depth_and_heads(size: str) -> None:
    prior = config(f"prior/size={size}").prior
    assert (prior.width, prior.depth, prior.heads) == SIZES[size]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_as_many_parameters_as_its_file_says(size: str) -> None:
    text = (CONF / f"prior/size/{size}.yaml").read_text()
    [millions] = re.findall(r"([\d.]+)M parameters: prior=gpt at K=16384 on 16x16", text)
    assert parameters(config(f"prior/size={size}").prior) == pytest.approx(
        float(millions), rel=0.01
    )
    for millions in re.findall(r"([\d.]+)M with prior.inputs=embedding", text):
        assert parameters(
            config(f"prior/size={size}", "prior.inputs=embedding").prior
        ) == pytest.approx(float(millions), rel=0.01)


def test_small_is_the_default() -> None:
    assert config() == config("prior/size=small")


def test_larger_sizes_learn_more_slowly_unless_told_otherwise() -> None:
    rates = [config(f"prior/size={size}").optimizer.lr for size in SIZES]
    assert rates == sorted(rates, reverse=True)
    assert (rates[1], rates[3]) == (1.5e-3, 3e-4)
    assert config("prior/size=base", "optimizer.lr=7").optimizer.lr == 7
    assert config("optimizer.lr=7", "prior/size=base").optimizer.lr == 7


def test_a_size_changes_nothing_else_of_the_optimizer() -> None:
    usual, base = config().optimizer, config("prior/size=base").optimizer
    assert {**base, "lr": usual.lr} == dict(usual)


def test_single_settings_override_a_size() -> None:
    prior = config("prior/size=base", "prior.width=256").prior
    assert (prior.width, prior.depth) == (256, 12)


def test_a_size_stays_when_the_prior_is_named() -> None:
    assert config("prior=gpt", "prior/size=large") == config("prior/size=large")


def test_the_demo_is_tiny_unless_told_otherwise() -> None:
    tiny = config("prior/size=tiny", "prior.inputs=embedding").prior
    assert config("experiment=demo_prior").prior == tiny
    assert config("experiment=demo_prior", "prior/size=base").prior.width == 768


def test_the_demo_leaves_other_optimizers_their_settings() -> None:
    adamw = config("experiment=demo_prior", "optimizer=adamw").optimizer
    assert adamw == config("prior/size=tiny").optimizer
    assert config("experiment=demo_prior").optimizer.matrix_lr == 0.01
    assert config("optimizer=muon").optimizer.matrix_lr == 0.02
