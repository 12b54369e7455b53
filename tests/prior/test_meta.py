"""A step of stage 2 never waits for the device: it runs on the device "meta", whose tensors have no values."""

from functools import partial

import pytest
import torch

from codegrid.engine.clock import Budget, Schedule
from prior.module import PriorModule
from tests.helpers.looks import HostLooks, watch_training
from tests.helpers.priors import PRIORS, build_prior
from tests.helpers.stage2 import UNEVEN_GRID, UNEVEN_K, lightning_warnings, make_code_data
from tests.helpers.parts import make

pytestmark = lightning_warnings
LEARNED = [name for name in PRIORS if name not in ("uniform", "unigram", "bigram")]

@pytest.mark.parametrize("name", LEARNED)
def test_meta(name):
    model = build_prior(PRIORS[name], UNEVEN_K, UNEVEN_GRID, classes=3)
    module = PriorModule(model, partial(torch.optim.AdamW, lr=1e-3, foreach=True), Budget(3), make(Schedule), label_drop=0.1, label_smoothing=0.1, accumulate=2)
    watch_training(HostLooks("meta"), module, make_code_data(name, 16))
    assert module.step == 3
