"""The device of the tests that ask whether a GPU computes what the CPU computes."""

import os

import pytest
import torch


@pytest.fixture
def device() -> str:
    """cuda; the test is skipped where there is none. CODEGRID_TEST_DEVICE=cpu tries the tests themselves."""
    chosen = os.environ.get("CODEGRID_TEST_DEVICE", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no usable GPU")
    return chosen
