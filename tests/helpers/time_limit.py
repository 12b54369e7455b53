"""Slow tests that are left out when a machine is so slow that CI would be cut off before it has a result."""

import os
import time

import pytest

LIMIT = "CODEGRID_TESTS_UNTIL"  # seconds since 1970; without it there is no limit
OUT_OF_TIME = "left out: no time"


def skip_if_late(item: pytest.Item) -> None:
    """Skip a slow test that would start after the limit."""
    if item.get_closest_marker("slow") and time.time() > float(os.environ.get(LIMIT, "inf")):
        pytest.skip(OUT_OF_TIME)


def count_left_out(skipped: list[pytest.TestReport]) -> int:
    """How many of the skipped tests were too late."""
    return sum(OUT_OF_TIME in str(report.longrepr) for report in skipped)
