"""CI has a result on a slow machine too, and says which part of the tests it rests on."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.time_limit import LIMIT, OUT_OF_TIME, count_left_out, skip_if_late

SLOW: Any = SimpleNamespace(get_closest_marker=lambda name: name == "slow")
FAST: Any = SimpleNamespace(get_closest_marker=lambda name: None)


def test_slow_tests_after_the_limit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, str(time.time() - 1))
    with pytest.raises(pytest.skip.Exception, match=OUT_OF_TIME):
        skip_if_late(SLOW)


def test_fast_tests_run_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, str(time.time() - 1))
    skip_if_late(FAST)


def test_slow_tests_run_before_the_limit_and_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, str(time.time() + 100))
    skip_if_late(SLOW)
    monkeypatch.delenv(LIMIT)
    skip_if_late(SLOW)


def test_those_left_out_are_told_from_others_that_are_skipped() -> None:
    reasons = [f"Skipped: {OUT_OF_TIME}", "Skipped: needs a GPU", f"Skipped: {OUT_OF_TIME}"]
    reports: Any = [SimpleNamespace(longrepr=("file", 1, reason)) for reason in reasons]
    assert count_left_out(reports) == 2
