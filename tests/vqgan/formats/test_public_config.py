"""Public configs are read with care."""

from typing import Any

import pytest

from codegrid.engine.errors import InputError
from vqgan.formats.base import PublicFile
from vqgan.formats.public_config import check_config, read_section

FILE = PublicFile("weights.ckpt", {})


@pytest.mark.parametrize("config", [{}, {"a": None}, {"a": {"b": [1]}}, {"a": "b"}])
def test_a_section_that_is_none_is_empty(config: dict[str, Any]) -> None:
    assert read_section(config, "a", "b") == {}


def test_a_section_lies_at_any_depth() -> None:
    assert read_section({"a": {"b": {"ch": 32}}}, "a", "b") == {"ch": 32}


def test_sizes_that_a_config_leaves_out_or_has_are_fine() -> None:
    sizes = {"ch": 32, "ch_mult": [1, 2], "z_channels": 4}
    check_config(FILE, {"ch": 32, "ch_mult": (1, 2), "dropout": 0.1}, sizes)


@pytest.mark.parametrize("value", [64, "32", [32], True])
def test_another_size_is_named(value: Any) -> None:
    with pytest.raises(InputError, match="the config says ch=.* where the weights have 32"):
        check_config(FILE, {"ch": value}, {"ch": 32})
