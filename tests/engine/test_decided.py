"""Settings that a run's images decide, and that its config then has."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from codegrid.engine.sweep import config_difference

RECORDED = {
    "_target_": "codegrid.data.folder.Folder",
    "root": "a",
    "classes": ["1", "2"],
    "range": [0, 4095],
    "depth": 16,
    "number_type": "uint16",
    "alpha": "white",
}


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> Any:
    return config_difference(OmegaConf.create({"data": mine}), OmegaConf.create({"data": theirs}))


@pytest.mark.parametrize("value_range", [None, "auto", "percentiles"])
@pytest.mark.parametrize("recorded", [[0, 4095], [[0, 4095], [-1, 1]]])
def test_what_a_run_has_decided_is_no_difference_to_the_command_that_started_it(
    value_range: str | None, recorded: list[Any]
) -> None:
    open_settings: dict[str, Any] = dict.fromkeys(("classes", "depth", "number_type", "alpha"))
    mine = {**RECORDED, **open_settings, "range": value_range}
    assert difference(mine, {**RECORDED, "range": recorded}) is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [("classes", ["2", "1"]), ("range", [0, 1023]), ("depth", 8), ("alpha", "ignore"), ("classes", "sorted")],
)  # fmt: skip
def test_what_a_command_says_itself_is_one(setting: str, value: Any) -> None:
    differs = difference({**RECORDED, setting: value}, RECORDED)
    assert differs
    assert differs[0].startswith(f"data.{setting}")
    assert difference(RECORDED, RECORDED) is None
