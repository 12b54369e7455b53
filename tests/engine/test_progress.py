"""The bar over a run."""

from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from codegrid.engine.callbacks.progress import Progress
from tests.helpers.stage1 import fit, lightning_warnings, make_module

pytestmark = lightning_warnings


def test_the_bar_reads_figures_at_logged_steps_validations_and_the_end_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each reading waits for the device."""
    progress = Progress({"train/rec": "rec", "val/psnr": "PSNR"})
    shown: list[dict[str, float]] = []

    class Record(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            shown.append(dict(progress._figures))

    fit(make_module(steps=8), [progress, Record()], log_every_n_steps=3)
    losses = [figures.get("train/rec") for figures in shown]  # after steps 1 to 8
    assert losses[0] is losses[1] is None
    assert losses[2] is not None
    assert losses[2] == losses[3]
    assert losses[5] == losses[6] != losses[4]
    assert losses[7] != losses[6]
    # The validation is after step 4.
    assert ["val/psnr" in figures for figures in shown] == [False] * 4 + [True] * 4
    line = capsys.readouterr().err
    assert f"rec {losses[7]:.4g}" in line
    assert "PSNR" in line
