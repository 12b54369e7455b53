"""benchmarks/codec.py at a small size."""

import json

import pytest
import torch

from benchmarks.codec import CODED_PRIORS, Trial, main, make_random_prior
from prior.models.base import PriorModel
from tests.helpers.configs import compose_plain
from tests.helpers.runs import SMALL_PRIOR


def test_rows_say_what_files_cost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Trial(("prior=gpt", *SMALL_PRIOR), 16)
    monkeypatch.setattr("benchmarks.codec.GRID", (2, 3))
    monkeypatch.setitem(CODED_PRIORS, "gpt", trial)
    monkeypatch.setattr("sys.argv", ["codec", "--only", "gpt", "--images", "3", "--batch", "2"])
    main()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["prior"], row["K"], row["codes"]) == ("gpt", 16, 6)
    assert abs(row["rounding"]) < 0.5
    assert row["noise"] < 1e-12 < row["margin"]
    assert min(row["write"], row["read"], row["bytes"]) > 0


@pytest.mark.parametrize("name", CODED_PRIORS)
def test_every_prior_of_the_benchmark_composes(name: str) -> None:
    assert compose_plain("stage=prior", *CODED_PRIORS[name].words)["prior"]


def test_a_random_prior_is_not_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.codec.GRID", (2, 3))
    model: PriorModel = make_random_prior(Trial(("prior=gpt", *SMALL_PRIOR), 16))
    with torch.no_grad():
        logits = model.judge(torch.zeros(1, 6, dtype=torch.int64), None).logits
    assert 0.5 < float(logits.std()) < 8
