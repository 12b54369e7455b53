"""The device of the tests that ask whether a GPU computes what the CPU computes."""

import json
import os
from pathlib import Path

import pytest
import torch


@pytest.fixture
def device() -> str:
    """cuda; the test is skipped where there is none. CODEGRID_TEST_DEVICE=cpu tries the tests themselves."""
    chosen = os.environ.get("CODEGRID_TEST_DEVICE", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no usable GPU")
    return chosen


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a line of JSON for each test to the file CODEGRID_TEST_ROWS as soon as it ends: the tests may be cut off."""
    file = os.environ.get("CODEGRID_TEST_ROWS")
    if file is None or (report.when != "call" and report.passed):
        return
    text = report.longreprtext
    if isinstance(report.longrepr, tuple):  # of a skipped test: file, line and reason
        text = report.longrepr[2]
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    row = {
        "name": report.nodeid.rpartition("::")[2],
        "result": report.outcome,
        "seconds": report.duration,
        "why": " ".join(errors or text.splitlines())[:1000],
    }
    with Path(file).open("a") as rows:
        rows.write(json.dumps(row) + "\n")
